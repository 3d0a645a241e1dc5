"""How a comparison with a baseline is shown: baseline.json, baseline.txt, the section of report.html."""

import json
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

from .baseline import FIXED, Change, Comparison, difference_shown
from .files import interval_entry

JSON_FILE, TEXT_FILE = "baseline.json", "baseline.txt"
FORMAT = 1
TITLES = {
    "recall": "recall",
    "f1": "F1",
    "strict_recall": "strict recall, of its own misses",
    FIXED: "strict recall, of the baseline's misses",
    "echo_rate": "echo",
}
LEGEND = (
    "In percent; differences in points, with 95 % intervals of a paired bootstrap over utterances. Misses are keywords "
    "not found without context: those of each recogniser itself, or, the same for both, those of the baseline."
)


class Row(NamedTuple):
    """A change as people read it."""

    condition: str
    rate: str
    before: str
    after: str
    difference: str
    note: str


def write_comparison(comparison: Comparison, out: str | Path) -> None:
    """Write baseline.json and baseline.txt to `out` (made if absent)."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    conditions = {
        name: {
            "improved": comparison.improved[name],  # share of replicates in which the error rate is lower
            "rates": {rate: _entry(change) for rate, change in changes.items()},
        }
        for name, changes in comparison.changes.items()
    }
    entry = {"format": FORMAT, "baseline": comparison.name, "metric": comparison.metric, "conditions": conditions}
    text = json.dumps(entry, indent=1, ensure_ascii=False, allow_nan=False)
    (out / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    (out / TEXT_FILE).write_text(comparison_text(comparison), encoding="utf-8")


def comparison_text(comparison: Comparison) -> str:
    """Return the comparison as a table for terminals."""
    rows = [Row(*Row._fields)._replace(note=""), *_rows(comparison)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(Row._fields))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if name in ("before", "after") else cell.ljust(width)
            for name, cell, width in zip(Row._fields, row, widths)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([f"Against {comparison.name}", "", *lines, "", *textwrap.wrap(LEGEND, 100), ""])


def comparison_section(comparison: Comparison) -> str:
    """Return the section of report.html."""
    head = "".join(f"<th>{name}</th>" for name in Row._fields[:-1])
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[:-2]) + f"<td>{escape(row.difference)}"
        f"{f' <small>{escape(row.note)}</small>' if row.note else ''}</td></tr>"
        for row in _rows(comparison)
    )
    return (
        f"<h2>Against {escape(comparison.name)}</h2><div class='card scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p class='note'>{LEGEND}</p>"
    )


def _rows(comparison: Comparison) -> Iterator[Row]:
    for condition, changes in comparison.changes.items():
        for rate, change in changes.items():
            note = f"lower in {comparison.improved[condition]:.0%} of replicates" if rate == comparison.metric else ""
            shown = [_percent(change.before), _percent(change.after), difference_shown(change)]
            yield Row(condition, TITLES.get(rate, rate.upper()), *shown, note)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def _entry(change: Change) -> dict:
    interval = interval_entry(change.interval) if change.interval else None
    return {"before": change.before, "after": change.after, "difference": change.difference, "interval": interval}
