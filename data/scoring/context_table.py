"""The part of report.html about contexts: the conditions side by side, and what was copied from a context in error."""

import math
from collections.abc import Mapping
from html import escape

from .conditions import ConditionScores
from .context import ContextReport, Ratio
from .result import ScoreReport

SHOWN = 12  # utterances with an echo, of each condition
LEGEND = (
    "B: errors on the words of keywords. U: on all others. Strict recall: of the keywords that are missed without "
    "context. Echo: utterances with a word of the context that was not said, nor anything like it; beside it the share "
    "that would echo by chance, having heard no context. Conflict: a word of the context in place of one that sounds "
    "alike. Intervals are of 95 %, over utterances."
)


def context_section(scores: ConditionScores) -> str:
    """Return the section as HTML, "" where there are neither keywords nor contexts."""
    if not scores.contexts:
        return ""
    metric = scores.plain.headline.metric.upper()
    heads = ["condition", "with context", metric, f"B-{metric}", f"U-{metric}", "recall", "strict recall", "precision"]
    heads += ["F1", "echo", "echo by chance", "conflict"]
    rows = [_row(name, scores.reports[name], context) for name, context in scores.contexts.items()]
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return (
        f"<h2>Contexts</h2><div class='card scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class='note'>{LEGEND}</p>{_echoes(scores.contexts)}"
    )


def _row(name: str, report: ScoreReport, context: ContextReport) -> str:
    metric = report.headline.metric
    cells = [f"{context.with_context:,} of {context.utterances:,}"]
    cells.append(_cell(Ratio(report.headline.fraction, report.headline.interval)))
    wanted = [f"b_{metric}", f"u_{metric}", "recall", "strict_recall", "precision", "f1"]
    cells += [_cell(context.rates[rate]) for rate in wanted]
    cells += [_cell(ratio) for ratio in (context.rates["echo_rate"], context.chance["echo_rate"])]
    cells.append(_cell(context.rates["conflict_rate"]))
    return f"<tr><td>{escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _cell(ratio: Ratio) -> str:
    if ratio.fraction is None or not math.isfinite(ratio.fraction):
        return ""
    shown = f"{100 * ratio.fraction:.2f}"
    if ratio.interval:
        shown += f" <small>({100 * ratio.interval.low:.1f} to {100 * ratio.interval.high:.1f})</small>"
    return shown


def _echoes(contexts: Mapping[str, ContextReport]) -> str:
    cards = []
    for name, context in contexts.items():
        for title, found in (("echoes", context.echoes), ("conflicts", context.conflicts)):
            items = "".join(
                f"<li><bdi>{escape(', '.join(pieces))}</bdi><em>{escape(id_)}</em></li>"
                for id_, pieces in list(found.items())[:SHOWN]
            )
            if items:
                cards.append(
                    f"<div class='card'><h3>{escape(name)}: {title} ({len(found):,})</h3>"
                    f"<ol class='plain'>{items}</ol></div>"
                )
    return f"<div class='columns'>{''.join(cards)}</div>" if cards else ""
