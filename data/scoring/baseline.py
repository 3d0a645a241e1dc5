"""An evaluation against an earlier one of the same corpus, the baseline: what has become better, and what did it cost?

Every difference is paired: a bootstrap replicate draws the same utterances for both. Strict recall stands twice, since
each recogniser misses other keywords without a context:

strict_recall        each by its own measure: of the keywords that it misses itself
strict_recall_fixed  of the keywords that the baseline misses: the same words for both. One that has learnt to hear
                     half of them by itself loses no recall here; by its own measure it may, as the hard half is left
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .bootstrap import Interval, paired_statistic
from .conditions import NONE, ConditionScores, read_conditions, score_conditions
from .context import made_of, score_context
from .files import read_summary
from .result import ScoreReport, compare, same_utterances

FIXED = "strict_recall_fixed"
SLACK = 1e-9  # two equal rates may differ in their last bit


class Change(NamedTuple):
    """A rate before and after, as fractions, None where there is nothing to divide by; the interval of `difference`."""

    before: float | None
    after: float | None
    interval: Interval | None = None

    @property
    def difference(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Comparison:
    """Changes {condition: {rate: change}} from the evaluation called `name`; `metric` is the error rate among them.

    `improved` is the share of replicates in which the error rate has become lower, by condition.
    """

    name: str
    metric: str
    changes: dict[str, dict[str, Change]]
    improved: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Return every difference as RATE_change, a fraction, named as `ConditionScores.metrics` names its rates."""
        found: dict[str, float | None] = {}
        for condition, changes in self.changes.items():
            prefix = "" if condition == NONE else f"{condition}/"
            found |= {f"{prefix}{rate}_change": change.difference for rate, change in changes.items()}
            if interval := changes[self.metric].interval:
                error_rate = f"{prefix}{self.metric}_change"
                found |= {f"{error_rate}_low": interval.low, f"{error_rate}_high": interval.high}
            if FIXED in changes:
                found[f"{prefix}{FIXED}"] = changes[FIXED].after
        return {name: value for name, value in found.items() if value is not None}

    def over_limits(self, *, max_rise: Mapping[str, float], max_recall_fall: Mapping[str, float]) -> list[str]:
        """Say of each condition whose error rate has risen, or whose strict recall has fallen, by more than its limit.

        Limits are fractions by condition; the recall is that of the keywords that the baseline misses.
        """
        limits = [
            *(("max_rise", name, self.metric, +1, limit) for name, limit in max_rise.items()),
            *(("max_recall_fall", name, FIXED, -1, limit) for name, limit in max_recall_fall.items()),
        ]
        found = []
        for option, name, rate, sign, limit in limits:
            change = self.changes.get(name, {}).get(rate, Change(None, None))
            if change.difference is None:
                found.append(f"{option}.{name} is {limit:g}, and condition {name!r} has no {rate} to compare")
            elif sign * change.difference > limit + SLACK:
                found.append(
                    f"condition {name!r} has a {rate} of {change.after:.2%} and {change.before:.2%} in {self.name}: "
                    f"{difference_shown(change)} points, beyond its limit {option}.{name} of {100 * limit:.2f}"
                )
        return found


@dataclass(frozen=True)
class Baseline:
    """An earlier evaluation: its folder, and what its hypotheses score."""

    folder: Path
    scores: ConditionScores

    @classmethod
    def read(
        cls, folder: str | Path, *, equivalences: Sequence[Collection[str]] | None = None, seed: int = 0
    ) -> "Baseline":
        """Score the raw texts in a folder again, by the normaliser and the unit that they were scored by."""
        folder = Path(folder)
        stamp = read_summary(folder).get("stamp")
        if stamp is None or not (folder / "hyp.jsonl").is_file():
            raise ValueError(
                f"baseline {folder}: no hyp.jsonl and summary.json here; name the artifact of an evaluation"
            )
        records, normalizer, unit = read_conditions(folder), stamp["normalizer"], stamp["unit"]
        scores = score_conditions(records, normalizer=normalizer, unit=unit, equivalences=equivalences, seed=seed)
        return cls(folder, scores)

    @property
    def name(self) -> str:
        """The folder's name; that of the run, where it is a run's artifact."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "artifact" else folder.name

    def require_limits(self, *, max_rise: Mapping[str, float], max_recall_fall: Mapping[str, float]) -> None:
        """Refuse limits that cannot be checked against this baseline, whatever will be decoded."""
        for option, limits in (("max_rise", max_rise), ("max_recall_fall", max_recall_fall)):
            for name in limits:
                if name not in self.scores.reports:
                    raise ValueError(
                        f"{option}.{name}: baseline {self.folder} has no condition {name!r}, only "
                        f"{', '.join(self.scores.reports)}; evaluate it with contexts.{name}, or leave the limit out"
                    )
        for name in max_recall_fall:
            context = self.scores.contexts.get(name)
            if context is None or context.rates["strict_recall"].fraction is None:
                raise ValueError(
                    f"max_recall_fall.{name}: baseline {self.folder} misses no keyword without context, so that none "
                    "can be lost; leave the limit out"
                )

    def require_comparable(self, reports: Mapping[str, ScoreReport]) -> None:
        """Refuse reports (by condition) of other utterances, references, normaliser, keywords or contexts than these.

        Hypotheses are not looked at: there may be none yet.
        """
        for name in self._shared(reports):
            report, earlier = reports[name], self.scores.reports[name]
            try:
                order_N = same_utterances(report, earlier)
            except ValueError as error:
                raise ValueError(f"baseline {self.folder}: {error}") from None
            for one, at in zip(report.utterances, order_N):
                for given in ("keywords", "phrases", "context"):
                    if getattr(one, given) != getattr(earlier.utterances[at], given):
                        raise ValueError(
                            f"baseline {self.folder}: utterance {one.id!r} had other {given} there under condition "
                            f"{name!r}; evaluate both with the same contexts"
                        )
            if len(order_N) < 2 or not report.headline.counts.reference_tokens:
                raise ValueError(
                    f"baseline {self.folder}: a comparison needs two utterances or more, and words in their references"
                )

    def compare(self, after: ConditionScores, *, seed: int = 0) -> Comparison:
        """Compare an evaluation with this one, under every condition that both have."""
        self.require_comparable(after.reports)
        changes, improved = {}, {}
        for condition in self._shared(after.reports):
            first, second = self.scores.reports[condition], after.reports[condition]
            change = compare(first, second, seed=seed)
            interval = Interval(change.low, change.high, change.confidence, change.replicates)
            error_rate = Change(first.headline.fraction, second.headline.fraction, interval)
            context_rates = _context_changes(self.scores, after, condition, seed=seed)
            changes[condition] = {second.headline.metric: error_rate, **context_rates}
            improved[condition] = change.probability_of_improvement
        return Comparison(self.name, after.plain.headline.metric, changes, improved)

    def _shared(self, reports: Mapping[str, ScoreReport]) -> list[str]:
        return [name for name in reports if name in self.scores.reports]


def _context_changes(
    before: ConditionScores, after: ConditionScores, condition: str, *, seed: int
) -> dict[str, Change]:
    """Return the changes of what score_context says of a condition; {} where it says nothing."""
    if condition not in before.contexts or condition not in after.contexts:
        return {}
    report = after.reports[condition]
    order_N = same_utterances(report, before.reports[condition])
    first_NC, second_NC = before.contexts[condition].counts_NC[order_N], after.contexts[condition].counts_NC
    found = {rate: _change(first_NC, second_NC, rate, seed=seed) for rate in ("recall", "f1")}
    if before.contexts[condition].with_context:
        found["strict_recall"] = _change(first_NC, second_NC, "strict_recall", seed=seed)
        fixed_NC = score_context(report, plain=before.plain, seed=seed).counts_NC
        found[FIXED] = _change(first_NC, fixed_NC, "strict_recall", seed=seed)
        found["echo_rate"] = _change(first_NC, second_NC, "echo_rate", seed=seed)
    return found


def _change(first_NC: np.ndarray, second_NC: np.ndarray, rate: str, *, seed: int) -> Change:
    (first_NC, statistic), (second_NC, _) = made_of(first_NC, rate), made_of(second_NC, rate)
    values = [float(statistic(side_NC.sum(axis=0, keepdims=True))[0]) for side_NC in (first_NC, second_NC)]
    before, after = (None if np.isnan(value) else value for value in values)
    return Change(before, after, paired_statistic(first_NC, second_NC, statistic, seed=seed))


def difference_shown(change: Change) -> str:
    """Return the difference and its interval in points, as `-0.22 [-0.60, 0.15]`; "-" where there is none."""
    if change.difference is None:
        return "-"
    points = f"{100 * change.difference:+.2f}"
    interval = change.interval
    return f"{points} [{100 * interval.low:.2f}, {100 * interval.high:.2f}]" if interval else points
