"""report.html: what a system gets wrong, in one file that opens offline on any machine.

Headline rates with intervals, stages, learning curves, what is confused with what, error rate by utterance length, and
the worst utterances with coloured alignments and a player. Text comes from models and corpora: all of it is escaped.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path

import numpy as np

from .baseline import Comparison
from .baseline_table import comparison_section
from .charts import charts
from .conditions import NONE, ConditionScores
from .context_table import context_section
from .errors import DELETION, HIT, INSERTION, SUBSTITUTION, ErrorRate
from .page import page
from .result import ScoreReport

# key -> (encoded audio, MIME type), or None where there is none: lambda key: (flac_bytes, "audio/flac")
AudioSource = Callable[[str], tuple[bytes, str] | None]
RATE_KEYS = ("wer", "cer", "mer", "rate", "recall", "precision", "f1")


def write_report(
    report: ScoreReport,
    path: str | Path,
    *,
    title: str = "Recognition report",
    others: Mapping[str, ScoreReport] | None = None,
    conditions: ConditionScores | None = None,
    comparison: Comparison | None = None,
    stages: Mapping[str, Mapping] | None = None,
    runs: Mapping[str, Iterable[Mapping]] | None = None,
    details: Mapping[str, object] | None = None,
    audio: AudioSource | None = None,
    worst: int = 40,
    max_audio_bytes: int = 16_000_000,
) -> Path:
    """Write one self-contained HTML file and return its path.

    others: further sets or systems for the rates table, by name. conditions: of which `report` is the one without
    context; the others are put beside it. comparison: with an earlier evaluation. stages: {stage: {metric: value}},
    as in a pipeline's summary.json. runs: {stage: rows of its metrics.jsonl}. details: facts for the foot (model hash,
    decode options).
    audio: called with utterance ids, worst first, until max_audio_bytes (of encoded audio, all together) are used.
    """
    beside = {name: other for name, other in conditions.reports.items() if name != NONE} if conditions else {}
    sections = [
        _headline(report, title),
        _rates_table(report, beside | dict(others or {})),
        context_section(conditions) if conditions else "",
        comparison_section(comparison) if comparison else "",
        _stage_table(stages) if stages else "",
        _learning_curves(runs) if runs else "",
        _patterns(report),
        _worst(report, worst, audio, max_audio_bytes),
        _foot(report, details or {}),
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, "\n".join(section for section in sections if section)), encoding="utf-8")
    return path


def read_metrics(path: str | Path) -> list[dict]:
    """Read a metrics.jsonl; an unfinished last line, as a running job leaves it, is passed over."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not JSON; remove the line or the file") from None
    return rows


def _headline(report: ScoreReport, title: str) -> str:
    rate = report.headline
    interval = ""
    if rate.interval:
        low, high, confidence, _ = rate.interval
        interval = f"{confidence:.0%} interval {_percent(low)} to {_percent(high)}"
    checks = report.diagnostics
    right = 1 - checks.sentence_error_rate
    stats = [(_percent(other.fraction), name.upper()) for name, other in report.rates.items() if other is not rate]
    if report.merged:
        stats.insert(0, (_percent(report.merged.fraction), f"{rate.metric.upper()}, sound-alikes merged"))
    stats += [
        (_percent(right), "utterances without error"),
        (f"{len(report.utterances):,}", "utterances"),
        (_duration(report.seconds), "of audio"),
        (_percent(checks.repetition_rate), f"looping ({len(checks.looping)})"),
        (_percent(checks.insertion_rate), "insertions per reference token"),
    ]
    if checks.refusing:
        stats.append((_percent(checks.refusal_rate), f"refusing ({len(checks.refusing)})"))
    if report.rtf is not None:
        stats.append((f"{report.rtf:.3g}", "real-time factor"))
    cells = "".join(f"<div><b>{value}</b><span>{escape(label)}</span></div>" for value, label in stats)
    stamp = report.stamp
    return (
        f"<h1>{escape(title)}</h1><p class='note'>Normaliser {escape(stamp.normalizer)} "
        f"({escape(stamp.normalizer_version)}), scored by {escape(stamp.unit)}</p>"
        f"<div class='card hero'><div><div class='label'>{rate.metric.upper()}</div>"
        f"<div class='big'>{_percent(rate.fraction)[:-1]}<small>%</small></div><p class='note'>{interval}</p></div>"
        f"<div class='stats'>{cells}</div></div>"
    )


def _rates_table(report: ScoreReport, others: Mapping[str, ScoreReport]) -> str:
    rows = [_rate_row(name.upper(), rate, main=rate is report.headline) for name, rate in report.rates.items()]
    if report.merged:
        rows.append(_rate_row(f"{report.merged.metric.upper()}, sound-alikes merged", report.merged))
    rows += [_rate_row(f"{lang}: {rate.metric.upper()}", rate) for lang, rate in report.languages.items()]
    for name, other in others.items():
        # Numbers under another normaliser or unit may stand in the table only with a warning.
        warning = "" if other.stamp.comparable(report.stamp) else " (scored differently: not comparable)"
        rows.append(_rate_row(f"{name}: {other.headline.metric.upper()}{warning}", other.headline))
        rows += [
            _rate_row(f"{name}, {lang}: {rate.metric.upper()}{warning}", rate) for lang, rate in other.languages.items()
        ]
    heads = "<th>rate</th><th>%</th><th>interval</th><th>errors</th><th>tokens</th><th>sub</th><th>del</th><th>ins</th>"
    keys = "".join(
        f"<span class='dotkey {kind}'></span>{label}"
        for kind, label in ((SUBSTITUTION, "substitutions"), (DELETION, "deletions"), (INSERTION, "insertions"))
    )
    return (
        f"<h2>Rates</h2><div class='card scroll'><table><thead><tr>{heads}<th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class='note'>{keys}</p>"
    )


def _rate_row(name: str, rate: ErrorRate, *, main: bool = False) -> str:
    c = rate.counts
    span = f"{100 * rate.interval.low:.2f} to {100 * rate.interval.high:.2f}" if rate.interval else "none"
    numbers = (c.errors, c.reference_tokens, c.substitutions, c.deletions, c.insertions)
    cells = "".join(f"<td>{number:,}</td>" for number in numbers)
    parts = ((SUBSTITUTION, c.substitutions), (DELETION, c.deletions), (INSERTION, c.insertions))
    bar = "".join(f"<i class='{kind}' style='flex:{count}'></i>" for kind, count in parts if count)
    return (
        f"<tr><td>{escape(name)}</td><td class='{'main' if main else ''}'>{_percent(rate.fraction)[:-1]}</td>"
        f"<td>{span}</td>{cells}<td><div class='bar'>{bar}</div></td></tr>"
    )


def _stage_table(stages: Mapping[str, Mapping]) -> str:
    columns = list(dict.fromkeys(key for row in stages.values() for key in row))
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td>"
        + "".join(f"<td>{escape(_stage_value(column, row.get(column)))}</td>" for column in columns)
        + "</tr>"
        for name, row in stages.items()
    )
    return (
        f"<h2>Stages</h2><div class='card scroll'><table><thead><tr><th>stage</th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _stage_value(column: str, value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    last = column.rsplit("/", 1)[-1]
    if any(last == key or last.startswith(f"{key}_") or last.endswith(f"_{key}") for key in RATE_KEYS):
        return _percent(value)
    if last == "seconds" or last.endswith("_seconds"):
        return _duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _learning_curves(runs: Mapping[str, Iterable[Mapping]]) -> str:
    return "<h2>Learning curves</h2>" + "".join(f"<h3>{escape(name)}</h3>{charts(rows)}" for name, rows in runs.items())


def _patterns(report: ScoreReport) -> str:
    confusions = report.confusions
    lists = [
        (
            "Substitutions",
            [(f"{_visible(r)} → {_visible(h)}", n) for (r, h), n in confusions.substitutions.most_common(12)],
        ),
        ("Deletions", [(_visible(token), count) for token, count in confusions.deletions.most_common(12)]),
        ("Insertions", [(_visible(token), count) for token, count in confusions.insertions.most_common(12)]),
        (f"{report.headline.metric.upper()} by reference tokens (utterances)", _by_length(report)),
    ]
    cards = "".join(
        f"<div class='card'><h3>{escape(name)}</h3><ol class='plain'>"
        + ("".join(f"<li><bdi>{escape(label)}</bdi><em>{value}</em></li>" for label, value in rows) or "<li>none</li>")
        + "</ol></div>"
        for name, rows in lists
    )
    return f"<h2>Patterns</h2><div class='columns'>{cards}</div>"


def _by_length(report: ScoreReport) -> list[tuple[str, str]]:
    """Error rate of up to five groups of equal size by reference length."""
    errors_N = report.counts_NC[:, :3].sum(axis=1)
    lengths_N = report.counts_NC[:, [0, 1, 3]].sum(axis=1)
    edges = np.unique(np.quantile(lengths_N, [0.2, 0.4, 0.6, 0.8], method="lower"))
    group_N = np.searchsorted(edges, lengths_N)
    rows = []
    for group in np.unique(group_N):
        errors, lengths = errors_N[group_N == group], lengths_N[group_N == group]
        if lengths.sum():
            span = f"{lengths.min()} to {lengths.max()}" if lengths.min() < lengths.max() else f"{lengths.min()}"
            rows.append((f"{span} ({len(lengths):,})", _percent(errors.sum() / lengths.sum())))
    return rows


def _worst(report: ScoreReport, limit: int, audio: AudioSource | None, budget: int) -> str:
    cards = []
    for index in report.worst(limit):
        player, used = _player(report.utterances[index].id, audio, budget)
        budget -= used
        cards.append(_utterance(report, index, player))
    if not cards:
        return "<h2>Worst utterances</h2><p class='note'>Every utterance is right.</p>"
    tools = (
        "<div class='tools' hidden><input id='find' type='search' placeholder='Find an id or a word' aria-label='Find'>"
        "<select id='order' aria-label='Order'><option value='errors'>most errors first</option>"
        "<option value='rate'>highest rate first</option><option value='seconds'>longest first</option></select></div>"
    )
    return (
        f"<h2>Worst utterances ({len(cards)})</h2><p class='note'>Reference above, hypothesis below.</p>"
        f"{tools}<div id='worst'>{''.join(cards)}</div>"
    )


def _player(key: str, audio: AudioSource | None, budget: int) -> tuple[str, int]:
    """Return the player's HTML and the bytes used; over budget, or without audio, a note stands in its place."""
    if audio is None:
        return "", 0
    try:
        found = audio(key)
    except (OSError, ValueError, KeyError) as error:
        # One unreadable file must not cost the report; its reason is shown where the player would be.
        return f"<span class='badge'>no audio: {escape(str(error))}</span>", 0
    if found is None:
        return "<span class='badge'>no audio</span>", 0
    content, mime = found
    if len(content) > budget:
        return "<span class='badge'>audio left out: the report's size limit is reached</span>", 0
    encoded = base64.b64encode(content).decode()
    return f"<audio controls preload='metadata' src='data:{escape(mime)};base64,{encoded}'></audio>", len(content)


def _utterance(report: ScoreReport, index: int, player: str) -> str:
    utterance, counts = report.utterances[index], report.counts(index)
    rate = _percent(counts.fraction) if counts.reference_tokens else "empty reference"
    badges = [f"{counts.errors} of {counts.reference_tokens}", rate]
    badges += [f"{utterance.seconds:.1f} s"] if utterance.seconds else []
    badges += ["looping"] if utterance.id in report.diagnostics.looping else []
    badges += [utterance.lang] if report.languages and utterance.lang else []
    badges += ["refusing"] if utterance.id in report.diagnostics.refusing else []
    order = counts.fraction if math.isfinite(counts.fraction) else 1e9
    raw = [("reference", utterance.reference), ("hypothesis", utterance.hypothesis)]
    raw += [("keywords", ", ".join(utterance.keywords))] if utterance.keywords else []
    raw += [(f"{n}-best", text) for n, text in enumerate(_scored_nbest(utterance), 1)]
    rows = "".join(f"<dt>{escape(name)}</dt><dd dir='auto'>{escape(text)}</dd>" for name, text in raw)
    pairs = "".join(_pair(*pair) for pair in report.alignment(index))
    marks = "".join(f"<span class='badge'>{escape(badge)}</span>" for badge in badges)
    return (
        f"<article class='utt' data-errors='{counts.errors}' data-rate='{order:.6g}' "
        f"data-seconds='{utterance.seconds}'><header><b>{escape(utterance.id)}</b>{marks}{player}"
        f"</header><div class='pairs {report.stamp.unit}' dir='auto'>{pairs}</div>"
        f"<details><summary>raw text</summary><dl>{rows}</dl></details></article>"
    )


def _scored_nbest(utterance) -> list[str]:
    scores = [f"  ({score:.3f})" for score in utterance.scores] or [""] * len(utterance.nbest)
    return [text + score for text, score in zip(utterance.nbest, scores)]


def _pair(kind: str, reference: str | None, hypothesis: str | None) -> str:
    above, below = (escape(_visible(token)) if token is not None else "" for token in (reference, hypothesis))
    if kind == HIT:
        return f"<span class='pair hit'><span>{above}</span><span>{below}</span></span>"
    return f"<span class='pair {kind}'><s>{above}</s><u>{below}</u></span>"


def _foot(report: ScoreReport, details: Mapping[str, object]) -> str:
    facts = {**report.stamp._asdict(), "bootstrap seed": report.seed, **details}
    if report.equivalences:
        facts["equivalences"] = "; ".join(" = ".join(group) for group in report.equivalences)
    rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_fact(value))}</dd>" for key, value in facts.items())
    return f"<h2>How this was scored</h2><div class='card details'><dl>{rows}</dl></div>"


def _fact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else str(value)


def _visible(token: str) -> str:
    return "\u2423" if token == " " else token  # a space that counts as a character must be seen


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%" if math.isfinite(fraction) else "\u221e%"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
