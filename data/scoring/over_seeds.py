"""A figure that was measured once with each of several seeds: its mean and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .linear_fit import t_quantile


class Estimate(NamedTuple):
    """A mean and half of its 95 % interval; for a single seed the latter is NaN."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Student's interval of the mean."""
        if len(values) < 2:
            return cls(values[0], math.nan)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), t_quantile(0.95, freedom=len(values) - 1) * error)

    def shown(self, *, percent: bool = False, signed: bool = False) -> str:
        """Return the mean and its interval, in percent or as they are."""
        scale, digits, sign = (100, 1, "+" if signed else "") if percent else (1, 3, "+" if signed else "")
        mean, half = self.mean * scale, self.half_width * scale
        if math.isnan(half):
            return f"{mean:{sign}.{digits}f}"
        return f"{mean:{sign}.{digits}f} [{mean - half:{sign}.{digits}f}, {mean + half:{sign}.{digits}f}]"
