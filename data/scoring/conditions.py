"""One recogniser under several conditions: without context, with the right one, with a wrong one.

Condition "none" is the context-free one; its files lie in the folder itself, those of every other in a folder of its
name, and context.json has what context.py says of each. All of it is scored again from the hyp.jsonl alone.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .context import ContextReport, Ratio, score_context
from .errors import METRICS
from .files import finite, interval_entry, rate_entry, read_hypotheses, read_summary, write_score_folder
from .normalize import Normalizer
from .result import ScoredUtterance, ScoreReport, compare, score

NONE = "none"
CONTEXT_FILE = "context.json"
FORMAT = 1


@dataclass(frozen=True)
class ConditionScores:
    """Reports by condition, "none" first. `contexts` is empty where there are neither keywords nor contexts."""

    reports: dict[str, ScoreReport]
    contexts: dict[str, ContextReport]

    @property
    def plain(self) -> ScoreReport:
        return self.reports[NONE]

    def metrics(self) -> dict[str, float]:
        """Return every rate as a fraction: those of "none" under their own names, the others' as CONDITION/NAME."""
        found: dict[str, float | None] = {name: rate.fraction for name, rate in self.plain.rates.items()}
        headline = self.plain.headline
        if self.plain.merged:
            found[f"{headline.metric}_sound_alikes_merged"] = self.plain.merged.fraction
        if headline.interval:
            found |= {
                f"{headline.metric}_low": headline.interval.low,
                f"{headline.metric}_high": headline.interval.high,
            }
        for condition, report in self.reports.items():
            prefix = "" if condition == NONE else f"{condition}/"
            if condition != NONE:
                found[f"{prefix}{report.headline.metric}"] = report.headline.fraction
            found |= {f"{prefix}{lang}/{rate.metric}": rate.fraction for lang, rate in report.languages.items()}
            if condition in self.contexts:
                found |= {prefix + name: value for name, value in _fractions(self.contexts[condition]).items()}
            found |= {f"{prefix}rtf": report.rtf, f"{prefix}peak_memory_gb": report.memory_gb}
        return {name: value for name, value in found.items() if value is not None and finite(value) is not None}

    def table(self) -> dict[str, dict[str, float | None]]:
        """Return {condition: {rate: fraction}}, the conditions side by side."""
        return {
            name: {report.headline.metric: finite(report.headline.fraction), **_fractions(self.contexts[name])}
            for name, report in self.reports.items()
            if name in self.contexts
        }

    def over_limit(self, max_echo: Mapping[str, float]) -> list[str]:
        """Say of each condition whose echo rate is above its limit, a fraction, or unknown, what is wrong."""
        found = []
        for name, limit in max_echo.items():
            rate = self.contexts[name].rates["echo_rate"] if name in self.contexts else Ratio(None)
            if rate.fraction is None:
                found.append(
                    f"max_echo.{name} is {limit:g} and no utterance has a context under condition "
                    f"{name!r}, so that nothing can be checked; leave it out, or give contexts.{name} such contexts"
                )
            elif rate.fraction > limit:
                found.append(
                    f"condition {name!r} has an echo rate of {rate.fraction:.2%} ({rate.count} of {rate.of} "
                    f"utterances), above its limit max_echo.{name} of {limit:.2%}"
                )
        return found


def score_conditions(
    records: Mapping[str, Iterable[ScoredUtterance]],
    *,
    normalizer: str | Normalizer | None = None,
    unit: str | None = None,
    equivalences: Sequence[Collection[str]] | None = None,
    seed: int = 0,
) -> ConditionScores:
    """Score the same utterances under each condition; "none" is required, and what the others are judged against."""
    reports = {
        name: score(records[name], normalizer=normalizer, unit=unit, equivalences=equivalences, seed=seed)
        for name in [NONE, *(name for name in records if name != NONE)]
    }
    plain = reports[NONE]
    for name in reports:
        require_no_language(name, plain.languages)
    if len(reports) == 1 and not any(plain.keywords):
        return ConditionScores(reports, {})
    contexts = {name: score_context(report, plain=plain, seed=seed) for name, report in reports.items()}
    return ConditionScores(reports, contexts)


def require_no_language(condition: str, languages: Collection[str]) -> None:
    """Refuse a condition whose metrics would overwrite those of a language of the corpus."""
    if condition in languages:
        raise ValueError(
            f"contexts.{condition}: the corpus has utterances in {condition!r}, whose metrics have the same names; "
            f"choose another name for the condition, such as {condition}-contexts"
        )


def write_conditions(
    scores: ConditionScores, out: str | Path, *, model_hash: str | None = None, decode: Mapping | None = None
) -> None:
    """Write the files of every condition and context.json; the summary.json of "none" comes last."""
    out = Path(out)
    for name, report in scores.reports.items():
        if name != NONE:
            write_score_folder(report, out / name, model_hash=model_hash, decode=decode)
    if scores.contexts:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_context_entries(scores), indent=1, ensure_ascii=False, allow_nan=False)
        (out / CONTEXT_FILE).write_text(text + "\n", encoding="utf-8")
    write_score_folder(scores.plain, out, model_hash=model_hash, decode=decode, conditions=scores.table())


def read_conditions(folder: str | Path) -> dict[str, list[ScoredUtterance]]:
    """Return the records of every condition that `write_conditions` wrote to a folder, "none" first."""
    folder, names = Path(folder), [NONE]
    if (folder / CONTEXT_FILE).is_file():
        names = list(json.loads((folder / CONTEXT_FILE).read_text(encoding="utf-8"))["conditions"])
    return {name: read_hypotheses((folder if name == NONE else folder / name) / "hyp.jsonl") for name in names}


def rescore_conditions(
    folder: str | Path,
    out: str | Path,
    *,
    normalizer: str | Normalizer | None = None,
    unit: str | None = None,
    equivalences: Sequence[Collection[str]] | None = None,
    seed: int = 0,
) -> ConditionScores:
    """Score what `write_conditions` wrote again, from the raw texts of every hyp.jsonl, and write it to `out`."""
    folder = Path(folder)
    known, records = read_summary(folder), read_conditions(folder)
    scores = score_conditions(records, normalizer=normalizer, unit=unit, equivalences=equivalences, seed=seed)
    write_conditions(scores, out, model_hash=known.get("model_hash"), decode=known.get("decode"))
    return scores


def _fractions(context: ContextReport) -> dict[str, float | None]:
    """Return the fractions that mean something: echoes, their chance level and the strict subset need contexts."""
    rates = {name: ratio.fraction for name, ratio in context.rates.items()}
    if not context.with_context:
        return {name: rates[name] for name in rates if name not in ("strict_recall", "echo_rate", "conflict_rate")}
    return rates | {"echo_rate_chance": context.chance["echo_rate"].fraction}


def _context_entries(scores: ConditionScores) -> dict:
    entries = {}
    for name, context in scores.contexts.items():
        report = scores.reports[name]
        change = None
        if name != NONE and len(report.utterances) > 1 and report.headline.counts.reference_tokens:
            change = compare(scores.plain, report, seed=report.seed)._asdict()
        entries[name] = {
            METRICS[report.stamp.unit]: rate_entry(report.headline),
            "change": change,  # of that rate from "none", paired bootstrap
            "utterances": context.utterances,
            "with_context": context.with_context,
            "rates": {rate: _ratio_entry(ratio) for rate, ratio in context.rates.items()},
            "chance": {rate: _ratio_entry(ratio) for rate, ratio in context.chance.items()},
            "echoes": context.echoes,
            "conflicts": context.conflicts,
        }
    stamp = scores.plain.stamp._asdict()
    return {"format": FORMAT, "stamp": stamp, "bootstrap_seed": scores.plain.seed, "conditions": entries}


def _ratio_entry(ratio: Ratio) -> dict:
    interval = interval_entry(ratio.interval) if ratio.interval else None
    return {"fraction": ratio.fraction, "count": ratio.count, "of": ratio.of, "interval": interval}
