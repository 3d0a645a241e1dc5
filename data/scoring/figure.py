"""A figure as one SVG file: lines, dots and bands over a labelled axis, legible by itself in a browser or an editor.

charts.py draws the small charts inside a report, whose page brings colours and tooltips; a figure brings its own and
loads nothing. Colours are the page's, in light and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from .charts import SERIES_COLOURS, Line, nice_ticks, short_number

WIDTH, HEIGHT = 680, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 44, 52
LEGEND_ROW = 18
KINDS = ("line", "dashed", "dots", "band")
STYLE = """
svg { --paper: #ffffff; --ink: #1c1d21; --soft: #62656f; --rule: #e2e0d9;
  --s0: #2a6fc9; --s1: #d9622b; --s2: #1f9d6c; --s3: #7a4fc0; --s4: #b8860b;
  font: 13px system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
@media (prefers-color-scheme: dark) { svg { --paper: #1c1e23; --ink: #eceae4; --soft: #9da1ab; --rule: #30333a;
  --s0: #6aa7f5; --s1: #f59163; --s2: #4fcb99; --s3: #b394f0; --s4: #e0b64a; } }
.paper { fill: var(--paper); } .title { fill: var(--ink); font-size: 15px; font-weight: 600; }
.label { fill: var(--ink); } .tick { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--rule); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 4; stroke-width: 1.6; } .dot { fill: var(--c); } .band { fill: var(--c); opacity: .15; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); } .s4 { --c: var(--s4); }
"""


@dataclass
class Mark(Line):
    """A Line with a shape. `lows` is the lower edge of a band, whose upper edge is `values`.

    Marks without a name are not in the legend. `colour` is one of five; None takes the next one.
    """

    kind: str = "line"
    lows: list[float] = field(default_factory=list)
    colour: int | None = None


def svg_figure(
    marks: Sequence[Mark],
    *,
    title: str,
    x_label: str,
    y_label: str,
    percent: bool = False,
    x_ticks: dict[float, str] | None = None,
) -> str:
    """Return the text of an SVG file. `x_ticks` are {place: label}; without them round numbers are found."""
    assert all(mark.kind in KINDS for mark in marks)
    xs = [x for mark in marks for x in mark.steps] + list(x_ticks or {})
    ys = [y for mark in marks for y in [*mark.values, *mark.lows] if math.isfinite(y)]
    if not ys:
        raise ValueError(f"figure {title!r} has no finite point to draw")
    y_ticks = nice_ticks(min(ys), max(ys), 5)
    named = [mark for mark in marks if mark.name]
    top = TOP + LEGEND_ROW * -(-len(named) // 2)
    x_low, x_high = min(xs), max(xs)
    margin = 0.04 * (x_high - x_low) or 0.5

    def x(value: float) -> float:
        return LEFT + (value - x_low + margin) / (x_high - x_low + 2 * margin) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - top - BOTTOM)

    if x_ticks is None:
        x_ticks = {tick: short_number(tick) for tick in nice_ticks(x_low, x_high, 8) if x_low <= tick <= x_high}
    colours = _colours(marks)
    parts = [
        f"<rect class='paper' width='{WIDTH}' height='{HEIGHT}'/>",
        f"<text class='title' x='{LEFT}' y='24'>{escape(title)}</text>",
        *(_legend(mark, colours[id(mark)], number) for number, mark in enumerate(named)),
        *(_horizontal(y(tick), _tick_label(tick, percent)) for tick in y_ticks),
        *(_below(x(tick), label) for tick, label in x_ticks.items()),
        f"<text class='label' x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 12}' text-anchor='middle'>"
        f"{escape(x_label)}</text>",
        f"<text class='label' transform='translate(16 {(top + HEIGHT - BOTTOM) / 2}) rotate(-90)' "
        f"text-anchor='middle'>{escape(y_label)}</text>",
        *(_shape(mark, x, y, colour=f"s{colours[id(mark)]}") for mark in marks),
    ]
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{escape(title, quote=True)}'><style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _colours(marks: Sequence[Mark]) -> dict[int, int]:
    free = iter(range(len(marks)))
    return {id(m): (next(free) if m.colour is None else m.colour) % SERIES_COLOURS for m in marks}


def _legend(mark: Mark, colour: int, number: int) -> str:
    """One entry of a legend in two columns below the title."""
    left, top = LEFT + (number % 2) * (WIDTH - LEFT) / 2, TOP - 2 + LEGEND_ROW * (number // 2)
    key = {
        "dots": f"<circle class='dot' cx='{left + 11}' cy='{top - 4}' r='4'/>",
        "band": f"<rect class='band' x='{left}' y='{top - 9}' width='22' height='10'/>",
    }.get(mark.kind, f"<path class='line {mark.kind}' d='M{left} {top - 4}h22'/>")
    return f"<g class='s{colour}'>{key}<text class='tick' x='{left + 28}' y='{top}'>{escape(mark.name)}</text></g>"


def _horizontal(height: float, label: str) -> str:
    return (
        f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{height:.1f}' y2='{height:.1f}'/>"
        f"<text class='tick' x='{LEFT - 8}' y='{height + 4:.1f}' text-anchor='end'>{label}</text>"
    )


def _below(place: float, label: str) -> str:
    return f"<text class='tick' x='{place:.1f}' y='{HEIGHT - BOTTOM + 18}' text-anchor='middle'>{escape(label)}</text>"


def _tick_label(tick: float, percent: bool) -> str:
    return f"{short_number(100 * tick)}%" if percent else short_number(tick)


def _shape(mark: Mark, x, y, *, colour: str) -> str:
    points = [(x(at), y(value)) for at, value in zip(mark.steps, mark.values) if math.isfinite(value)]
    if mark.kind == "dots":
        return "".join(f"<circle class='dot {colour}' cx='{px:.1f}' cy='{py:.1f}' r='4'/>" for px, py in points)
    if mark.kind == "band":
        points += [(x(at), y(low)) for at, low in reversed(list(zip(mark.steps, mark.lows)))]
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    return (
        f"<path class='{colour} band' d='{path}Z'/>"
        if mark.kind == "band"
        else (f"<path class='{colour} line {mark.kind}' d='{path}'/>")
    )
