"""Where the time of a step goes, by part. On a GPU events are put into its queue, and nothing waits for them."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

from .metrics import Metrics


class Stopwatch:
    """Laps since it was made; each lap has the name of the part that has just ended."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.laps: list[tuple[str, Any]] = []
        self.lap("")

    def lap(self, part: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.laps.append((part, event))
        else:
            self.laps.append((part, time.perf_counter()))

    def read(self) -> Metrics:
        """Return {part: (seconds, 1)}: means over the steps of a log line are seconds a step."""
        if self.on_gpu:
            self.laps[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (_, before), (part, after) in pairwise(self.laps):
            passed = before.elapsed_time(after) / 1000 if self.on_gpu else after - before
            seconds[part] = seconds.get(part, 0.0) + passed
        return {part: (passed, 1) for part, passed in seconds.items()}
