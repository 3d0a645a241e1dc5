"""Which settings of a search use a context best? Most names recalled with the right one, no harm by a wrong one.

A trial is one setting, scored with right and with wrong contexts beside the search without any. It is allowed where
wrong contexts raise neither the error rate by more than `max_loss` nor the echo rate above chance (what is emitted of
those contexts without having seen them) by more than `max_echo`. Of those allowed the one with the highest strict
recall is chosen, then with the lowest error rate with the right contexts, then with the smallest weight. What has no
context is decoded without one under any setting, so there is nothing to lose.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .conditions import NONE, ConditionScores
from .figure import Mark, svg_figure

RIGHT, WRONG = "right", "wrong"
# Columns of the table: title, condition, rate ("" is the error rate).
COLUMNS = (
    ("strict recall", RIGHT, "strict_recall"),
    ("recall", RIGHT, "recall"),
    ("{metric}, right", RIGHT, ""),
    ("{metric}, wrong", WRONG, ""),
    ("echo, wrong", WRONG, "echo_rate"),
    ("conflict, wrong", WRONG, "conflict_rate"),
)


class Trial(NamedTuple):
    """One setting and its rates, {condition: {rate: fraction}}; `metric` names the error rate among them."""

    settings: dict[str, Any]
    rates: dict[str, dict[str, float | None]]
    metric: str

    @classmethod
    def of(cls, settings: dict[str, Any], scores: ConditionScores) -> "Trial":
        return cls(settings, scores.table(), scores.plain.headline.metric)

    def rate(self, condition: str, name: str = "") -> float:
        """Return a rate, by default the error rate; 0 where there is none of that name: nothing is there to count."""
        return self.rates[condition].get(name or self.metric) or 0.0

    @property
    def loss(self) -> float:
        """By how much wrong contexts raise the error rate."""
        return self.rate(WRONG) - self.rate(NONE)

    @property
    def echo(self) -> float:
        """By how much wrong contexts raise the echo rate above chance."""
        return self.rate(WRONG, "echo_rate") - self.rate(WRONG, "echo_rate_chance")

    def harm(self, *, max_loss: float, max_echo: float) -> float:
        """Return by how much limits are passed; 0: the trial is allowed."""
        # Two equal rates may differ in their last bit.
        return sum(excess for excess in (self.loss - max_loss, self.echo - max_echo) if excess > 1e-9)


class Choice(NamedTuple):
    """The trial to use; where none is `allowed`, the least harmful one."""

    trial: Trial
    allowed: bool


def choose(trials: Sequence[Trial], *, max_loss: float, max_echo: float) -> Choice:
    """Return the best of the trials."""

    def cost(trial: Trial) -> tuple:
        return (
            trial.harm(max_loss=max_loss, max_echo=max_echo),
            -trial.rate(RIGHT, "strict_recall"),
            trial.rate(RIGHT),
            trial.settings.get("context_alpha", 0.0),
        )

    best = min(trials, key=cost)
    return Choice(best, allowed=best.harm(max_loss=max_loss, max_echo=max_echo) == 0)


def tuning_table(trials: Sequence[Trial], chosen: Trial, *, max_loss: float, max_echo: float) -> str:
    """Return all trials as a Markdown table, the chosen one marked; the first row is the search without context."""
    first = trials[0]
    names = list(first.settings)
    titles = [name.removeprefix("context_") for name in names]
    titles += [*(title.format(metric=first.metric.upper()) for title, _, _ in COLUMNS), ""]
    plain = [f"{first.rate(NONE):.2%}" if rate == "" else "-" for _, _, rate in COLUMNS]
    plain[1] = f"{first.rate(NONE, 'recall'):.1%}"
    plain[4] = f"{first.rate(WRONG, 'echo_rate_chance'):.2%} by chance"
    rows = [["no context", *["-"] * (len(names) - 1), *plain, ""]]
    for trial in trials:
        harm = trial.harm(max_loss=max_loss, max_echo=max_echo)
        note = "**chosen**" if trial is chosen else "harms" if harm else ""
        cells = [f"{trial.rate(condition, rate):.2%}" for _, condition, rate in COLUMNS]
        rows.append([*(_shown(trial.settings.get(name, "-")) for name in names), *cells, note])
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def tuning_figure(trials: Sequence[Trial], chosen: Trial, *, along: str, max_loss: float) -> str:
    """Return the trade-off as an SVG: strict recall over the error rate with wrong contexts, a line for each setting of
    everything but `along`."""
    names = [name for name in trials[0].settings if name != along]
    varied = [name for name in names if len({trial.settings[name] for trial in trials}) > 1]
    lines: dict[str, list[Trial]] = {}
    for trial in trials:
        others = ", ".join(f"{name.removeprefix('context_')} {_shown(trial.settings[name])}" for name in varied)
        lines.setdefault(others, []).append(trial)
    marks = []
    for colour, (name, of) in enumerate(lines.items()):
        of = sorted(of, key=lambda trial: trial.settings.get(along, 0.0))
        points = {
            "steps": [100 * trial.rate(WRONG) for trial in of],
            "values": [trial.rate(RIGHT, "strict_recall") for trial in of],
        }
        marks += [Mark(name, **points, colour=colour), Mark("", **points, kind="dots", colour=colour)]
    limit = 100 * (trials[0].rate(NONE) + max_loss)
    top = max(trial.rate(RIGHT, "strict_recall") for trial in trials)
    marks.append(Mark("limit", [limit, limit], [0.0, top or 1.0], kind="dashed", colour=4))
    at = [100 * chosen.rate(WRONG)], [chosen.rate(RIGHT, "strict_recall")]
    marks.append(Mark("chosen", *at, kind="dots", colour=4))
    return svg_figure(
        marks,
        title="What a context gives, and what a wrong one costs",
        x_label=f"{trials[0].metric.upper()} with wrong contexts, %",
        y_label="strict recall with right contexts",
        percent=True,
    )
