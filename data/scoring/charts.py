"""Learning curves as inline SVG, from metrics rows ({"step": 10, "train/loss": 2.3, "valid/dev/wer": 0.12, ...}).

One small chart per metric name (the last part of the key), one line per prefix, so that train/loss and valid/dev/loss
share a chart. Colours are CSS classes of page.py, so that they follow light and dark mode. A long noisy line is drawn
faint with its moving average on top. Non-finite values leave no point.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 26
MAX_POINTS = 400  # of one line; a chart has about as many pixels
MAX_CHARTS = 9  # of one run
SERIES_COLOURS = 5
SMOOTH_FROM = 80  # points; shorter lines are drawn as they are
# What a reader wants first; other metrics follow by name while there is room.
FIRST = ("loss", "wer", "cer", "mer", "ctc_loss", "mask_acc", "reward_mean", "kl", "lr", "grad_norm", "layer_err")
# Counters and machine load are no learning curves.
LEFT_OUT = {"step", "epoch", "samples_seen", "time", "seconds", "eta_s", "skipped_steps"}
RATES = {"wer", "cer", "mer", "accuracy", "mask_acc", "keyword_f1"}


@dataclass
class Line:
    """One line of a chart: `name` for the legend, points in the order of the steps."""

    name: str
    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def curves(rows: Iterable[Mapping]) -> dict[str, list[Line]]:
    """Group metrics rows into {metric name: lines}; metrics with fewer than two points in all are left out."""
    lines: dict[str, dict[str, Line]] = {}
    for row in rows:
        step = row.get("step")
        if step is None or not _is_number(step):
            continue
        for key, value in row.items():
            prefix, _, name = key.rpartition("/")
            if name not in LEFT_OUT and _is_number(value):
                line = lines.setdefault(name, {}).setdefault(prefix, Line(prefix or name))
                line.steps.append(step)
                line.values.append(value)
    rank = {name: position for position, name in enumerate(FIRST)}
    names = sorted(lines, key=lambda name: (rank.get(name, len(FIRST)), name))
    return {name: list(lines[name].values()) for name in names if sum(len(x.steps) for x in lines[name].values()) > 1}


def charts(rows: Iterable[Mapping]) -> str:
    """Return the HTML of a run's charts: the first MAX_CHARTS metrics, and a line that names the others."""
    found = curves(rows)
    shown, hidden = list(found)[:MAX_CHARTS], list(found)[MAX_CHARTS:]
    figures = "".join(chart(found[name], title=name) for name in shown)
    rest = f"<p class='note'>Not drawn: {escape(', '.join(hidden))}</p>" if hidden else ""
    return f"<div class='charts'>{figures}</div>{rest}"


def chart(lines: list[Line], *, title: str) -> str:
    """Return one figure. The points travel in a data attribute, for the tooltip."""
    percent = title in RATES
    lines = [_thin(line) for line in lines]
    steps = [step for line in lines for step in line.steps]
    values = [value for line in lines for value in line.values]
    x_ticks, y_ticks = nice_ticks(min(steps), max(steps), 4), nice_ticks(*_value_range(values, percent), 4)
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (min(max(value, y_low), y_high) - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(x, y, [t for t in x_ticks if x_low <= t <= x_high], y_ticks, percent=percent)]
    for number, line in enumerate(lines):
        parts.append(_draw(line, x, y, colour=f"s{number % SERIES_COLOURS}"))
    points = [{"n": line.name, "p": [[s, v, x(s), y(v)] for s, v in zip(line.steps, line.values)]} for line in lines]
    data = escape(json.dumps(_rounded(points), ensure_ascii=False, separators=(",", ":")))
    legend = "".join(
        f"<span class='key s{number % SERIES_COLOURS}'>{escape(line.name)}</span>" for number, line in enumerate(lines)
    )
    return (
        f"<figure class='chart' data-points=\"{data}\" data-percent='{int(percent)}'>"
        f"<figcaption><b>{escape(title)}</b><span class='legend'>{legend}</span></figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title)} over steps'>{''.join(parts)}"
        "</svg><div class='tip' hidden></div></figure>"
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that enclose [low, high]; at least two, also for low == high."""
    if high <= low:
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short_number(number: float) -> str:
    """Write a tick label: 1500 as 1.5k, 0.0003 as 3e-4."""
    if number and (abs(number) < 1e-3 or abs(number) >= 1e7):
        return f"{number:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    if abs(number) >= 1e6:
        return f"{number / 1e6:g}M"
    return f"{number / 1e3:g}k" if abs(number) >= 1e3 else f"{number:.4g}"


def _value_range(values: list[float], percent: bool) -> tuple[float, float]:
    """A single spike must not flatten the rest: the top is cut a little above the 98th percentile."""
    ordered = sorted(values)
    high = ordered[-1]
    if len(ordered) > 20:
        body = ordered[int(0.98 * (len(ordered) - 1))]
        high = min(high, body + 0.5 * (body - ordered[0]))
    low = 0.0 if percent or 0 <= ordered[0] < 0.5 * high else ordered[0]
    return low, high


def _axes(x, y, x_ticks: list[float], y_ticks: list[float], *, percent: bool) -> str:
    parts = []
    for tick in y_ticks:
        label = f"{short_number(100 * tick)}%" if percent else short_number(tick)
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>")
        parts.append(f"<text class='tick' x='{LEFT - 7}' y='{y(tick) + 3.5:.1f}' text-anchor='end'>{label}</text>")
    for tick in x_ticks:
        label = short_number(tick)
        parts.append(f"<text class='tick' x='{x(tick):.1f}' y='{HEIGHT - 8}' text-anchor='middle'>{label}</text>")
    return "".join(parts)


def _draw(line: Line, x, y, *, colour: str) -> str:
    if len(line.steps) == 1:
        return f"<circle class='dot {colour}' cx='{x(line.steps[0]):.1f}' cy='{y(line.values[0]):.1f}' r='4'/>"
    if len(line.steps) < SMOOTH_FROM or not _is_noisy(line.values):
        return f"<path class='line {colour}' d='{_path(line.steps, line.values, x, y)}'/>"
    raw = f"<path class='line faint {colour}' d='{_path(line.steps, line.values, x, y)}'/>"
    return raw + f"<path class='line {colour}' d='{_path(line.steps, _smooth(line.values), x, y)}'/>"


def _path(steps: list[float], values: list[float], x, y) -> str:
    return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in zip(steps, values))


def _is_noisy(values: list[float]) -> bool:
    """A schedule goes up and down once: its path is twice its range. Only what wanders far more needs an average."""
    travelled = sum(abs(after - before) for before, after in pairwise(values))
    return travelled > 4 * (max(values) - min(values))


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over a fortieth of the line, without the bias of its start."""
    keep = 1 - 40 / max(len(values), 80)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _thin(line: Line) -> Line:
    """Average neighbouring points until at most MAX_POINTS are left; first and last step stay in place."""
    size = -(-len(line.steps) // MAX_POINTS)
    if size == 1:
        return line
    blocks = range(0, len(line.steps), size)
    steps = [line.steps[start] for start in blocks]
    steps[-1] = line.steps[-1]
    means = [sum(block) / len(block) for block in (line.values[start : start + size] for start in blocks)]
    return Line(line.name, steps, means)


def _rounded(points: list[dict]) -> list[dict]:
    return [
        {"n": line["n"], "p": [[s, float(f"{v:.5g}"), round(px, 1), round(py, 1)] for s, v, px, py in line["p"]]}
        for line in points
    ]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
