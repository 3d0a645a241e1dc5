"""A straight line through few points, with intervals: least squares under normal errors of unknown size.

Slope and intercept have Student's t distribution with n - 2 degrees of freedom, so three points are the fewest that say
anything, and four still give wide intervals. The quantile is found from the distribution's closed form for whole
degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4): no library of statistics is needed to run.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

FEWEST_POINTS = 3


class LinearFit(NamedTuple):
    """y = slope * x + intercept; intervals are (low, high) at `confidence`."""

    slope: float
    intercept: float
    slope_interval: tuple[float, float]
    intercept_interval: tuple[float, float]
    residual_deviation: float  # with n - 2 degrees of freedom
    points: int
    confidence: float
    mean_x: float
    spread_x: float  # sum of squared deviations of x
    quantile: float

    def at(self, x: float) -> float:
        return self.slope * x + self.intercept

    def half_width(self, x: float) -> float:
        """Return half the width of the interval of the line itself at x, which is not that of a further point."""
        away = (x - self.mean_x) ** 2 / self.spread_x
        return self.quantile * self.residual_deviation * math.sqrt(1 / self.points + away)


def fit_line(xs: Sequence[float], ys: Sequence[float], *, confidence: float = 0.95) -> LinearFit:
    """Fit a line; ValueError with fewer than three different places x."""
    n = len(xs)
    if n != len(ys) or len(set(xs)) < FEWEST_POINTS:
        raise ValueError(
            f"a line through {len(set(xs))} points has no interval: at least {FEWEST_POINTS} different sizes are needed"
        )
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    spread_x = math.fsum((x - mean_x) ** 2 for x in xs)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / spread_x
    intercept = mean_y - slope * mean_x
    squares = math.fsum((y - slope * x - intercept) ** 2 for x, y in zip(xs, ys))
    deviation, quantile = math.sqrt(squares / (n - 2)), t_quantile(confidence, freedom=n - 2)
    slope_half = quantile * deviation / math.sqrt(spread_x)
    intercept_half = quantile * deviation * math.sqrt(1 / n + mean_x**2 / spread_x)
    return LinearFit(
        slope,
        intercept,
        (slope - slope_half, slope + slope_half),
        (intercept - intercept_half, intercept + intercept_half),
        deviation,
        n,
        confidence,
        mean_x,
        spread_x,
        quantile,
    )


def t_quantile(confidence: float, *, freedom: int) -> float:
    """Return t with P(|T| < t) = confidence, for Student's distribution with `freedom` degrees of freedom."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside
