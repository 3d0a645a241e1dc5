"""Which rank keeps the others waiting: one slow GPU or disk sets the pace of all.

A step takes all ranks equally long, because they wait for one another. What differs is how long a rank is busy on its
own: waiting for its data and in the forward pass. Under ZeRO-3 the forward pass waits too, and only the data show.
"""

from __future__ import annotations

import statistics

from .world import World

# A rank this much slower than the median, for so many log intervals in a row, is named.
SLOWER = 1.2
INTERVALS = 3
# Below this a step's difference is noise.
LEAST_SECONDS = 0.01


class Stragglers:
    """Compares the ranks once a log interval. All ranks call it."""

    def __init__(self, world: World):
        self.world = world
        self.slow_for = [0] * world.size

    def compare(self, busy_seconds: float) -> tuple[dict[str, float], list[str]]:
        """Take this rank's busy seconds a step; return metrics, and a line for each rank to be named now."""
        if self.world.size == 1:
            return {}, []
        busy = self.world.gather(busy_seconds)
        median = statistics.median(busy)
        lines = []
        for rank, seconds in enumerate(busy):
            slow = seconds > SLOWER * median and seconds - median > LEAST_SECONDS
            self.slow_for[rank] = self.slow_for[rank] + 1 if slow else 0
            if self.slow_for[rank] == INTERVALS:
                lines.append(
                    f"rank {rank} is slow: busy {seconds:.3g} s a step with its data and the forward pass, the median "
                    f"rank {median:.3g} s, for {INTERVALS} log intervals"
                )
        return {"train/slowest_rank_vs_median": max(busy) / median if median else 1.0}, lines
