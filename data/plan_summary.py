"""An epoch in numbers: sums over its windows, or over some of them.

Shape letters: U utterances of a window, N micro-batches of a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .packing import slice_max

if TYPE_CHECKING:
    from .plan import MicroBatch, _Window

MAX_REFUSED_LISTED = 10_000


class Refused(NamedTuple):
    """An utterance outside the limits, and why."""

    shard: str
    row: int
    key: str
    reason: str


class PlanSummary(NamedTuple):
    """An epoch in numbers. `seconds` is valid audio; `largest` the dearest micro-batch (numbered within its epoch).

    With `sampled_windows` it is an estimate from so many windows, evenly spread: counts are scaled up, `largest` is the
    dearest and `refused` are the refused of those.
    """

    steps: int
    micro_batches: int
    utterances: int
    seconds: float
    padding_fraction: float
    largest: MicroBatch
    refused: list[Refused]  # the first MAX_REFUSED_LISTED of them
    num_refused: int
    sampled_windows: int = 0


class Tally:
    """Counts windows."""

    def __init__(self):
        self.micro_batches = self.utterances = 0
        self.seconds = self.padded = 0.0
        self.largest: MicroBatch | None = None
        self._largest_price = (-1.0, -1)

    def add(self, window: _Window, *, epoch: int) -> None:
        count_N = window.slices_N2[:, 1] - window.slices_N2[:, 0]
        price_N = slice_max(window.cost_U, window.slices_N2) * count_N
        tokens_N = slice_max(window.tokens_U, window.slices_N2) * count_N
        if len(count_N):
            top = np.lexsort((tokens_N, price_N))[-1]
            if (price := (float(price_N[top]), int(tokens_N[top]))) > self._largest_price:
                self.largest = window.micro_batch(top, index=self.micro_batches + int(top), epoch=epoch)
                self._largest_price = price
        self.padded += float((slice_max(window.seconds_U, window.slices_N2) * count_N).sum())
        ends = np.concatenate([[0.0], np.cumsum(window.seconds_U)])
        self.seconds += float((ends[window.slices_N2[:, 1]] - ends[window.slices_N2[:, 0]]).sum())
        self.utterances += int(count_N.sum())
        self.micro_batches += len(count_N)

    def summary(
        self, micro_batches_per_step: int, *, of: int, refused: list[Refused], scale: float = 1.0
    ) -> PlanSummary:
        """Return the sums, times `scale`, for a plan `of` so many utterances."""
        if self.largest is None:
            raise ValueError(
                f"of {of} utterances none of those looked at is within the limits; widen data.limits or see "
                "`seedling check-data`"
            )
        micro_batches, utterances = round(self.micro_batches * scale), round(self.utterances * scale)
        return PlanSummary(
            micro_batches // micro_batches_per_step,
            micro_batches,
            utterances,
            self.seconds * scale,
            1 - self.seconds / self.padded,
            self.largest,
            refused,
            of - utterances,
        )
