"""What steps and ranks add up before a number is made of it: a sum and its count, or a histogram."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Histogram:
    """Counts (int64) and how to read them, for numbers that are no means of batches, such as an entropy.

    `numbers` gets the total over steps and ranks, on the CPU, and returns {name: value} with names of its own.
    """

    counts: Tensor
    numbers: Callable[[Tensor], dict[str, float]]


Metrics = dict[str, tuple[Any, Any] | Histogram]


def add_metrics(total: Metrics, new: Metrics) -> None:
    """Add to `total` in place, tensors detached and left where they are."""
    for name, value in new.items():
        old = total.get(name)
        if isinstance(value, Histogram):
            assert old is None or isinstance(old, Histogram), f"metric {name} is a histogram in one step only"
            total[name] = Histogram(value.counts if old is None else old.counts + value.counts, value.numbers)
        else:
            assert not isinstance(old, Histogram), f"metric {name} is a histogram in one step only"
            total[name] = tuple(a + _detached(b) for a, b in zip(old or (0, 0), value))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
