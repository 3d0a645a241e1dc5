"""Sums between two log lines, and the metrics that they give. Averages are sums over sums, never means of means."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from .engine import StepResult
from .gpus import known_gpu
from .metrics import Histogram, Metrics, add_metrics
from .stragglers import Stragglers
from .world import World

T = TypeVar("T")


class Meters:
    """Collects steps since the last reading. Sums of the loss stay on the device until they are read."""

    def __init__(self, world: World):
        self.world = world
        self.flops_per_second, self.precision = 0.0, ""  # of padded audio; what its products run in
        self.stragglers = Stragglers(world)
        self.remarks: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.steps = 0
        self.waiting = self.count = self.seconds = self.padded_seconds = 0.0
        self.characters = self.padded_characters = 0.0
        self.sums: Metrics = {}
        self.grad_norm = 0.0

    def know_work(self, flops: float, *, padded_seconds: float, precision: str) -> None:
        """Note the operations of a micro-batch: those of others are taken to be as many for a second of audio."""
        self.precision = precision
        self.flops_per_second = flops / padded_seconds if padded_seconds else 0.0

    def waited(self, steps: Iterator[T]) -> Iterator[T]:
        """Yield the same items, adding up the time spent waiting for them."""
        while True:
            before = time.perf_counter()
            item = next(steps, None)
            self.waiting += time.perf_counter() - before
            if item is None:
                return
            yield item

    def add(self, result: StepResult, agreed: Any) -> None:
        """Count one step. A step that was dropped counts as time, audio and text, not in the loss."""
        self.steps += 1
        self.seconds += agreed.seconds
        self.padded_seconds += agreed.padded_seconds
        self.characters += agreed.characters
        self.padded_characters += agreed.padded_characters
        self.count += agreed.count
        if result.applied:
            # The global count is known already: rank 0 alone brings it, so that the sum over ranks is right.
            count = agreed.count if self.world.is_main else 0.0
            add_metrics(self.sums, {"loss": (result.loss_sum, count), **result.metrics})
            self.grad_norm = result.grad_norm

    def read(self) -> dict[str, float]:
        """Return train/* and what has a prefix of its own since the last reading, over all ranks, and start anew.

        What has no audio speaks of none. `remarks` then has what is to be said in words.
        """
        forward = self.sums.get("time/forward_s", (0.0, 0))
        busy = (self.waiting + float(forward[0])) / max(1, self.steps)
        slowest, self.remarks = self.stragglers.compare(busy)
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        values = mean_metrics(self.sums, world=self.world)
        metrics = {name if "/" in name else f"train/{name}": value for name, value in values.items()}
        metrics |= {
            "train/grad_norm": self.grad_norm,
            "train/tokens_per_s": self.count / elapsed,
            "train/data_wait_frac": min(1.0, self.waiting / elapsed),
            "train/mem_peak_gb": peak_memory_gb(),
            **slowest,
        }
        if self.padded_seconds:
            metrics["train/audio_hours_per_s"] = self.seconds / 3600 / elapsed
            metrics["train/padding_frac_audio"] = 1 - self.seconds / self.padded_seconds
            metrics |= self._work(elapsed)
        if self.padded_characters:
            metrics["train/padding_frac_text"] = 1 - self.characters / self.padded_characters
        self.reset()
        return metrics

    def _work(self, elapsed: float) -> dict[str, float]:
        """Return a rank's operations a second without recomputing, and MFU where the peak of the device is known."""
        if not self.flops_per_second:
            return {}
        reached = self.flops_per_second * self.padded_seconds / elapsed / self.world.size
        device = self.world.device
        gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return {"train/tflops_per_s": reached / 1e12} | (
            {"train/mfu": reached / gpu.peak(self.precision)} if gpu else {}
        )


def mean_metrics(sums: Metrics, *, world: World) -> dict[str, float]:
    """Return {name: sum / count}, and what histograms say, over ranks, which must all call it.

    Means that only some ranks know are fine; histograms must be the same ones on all ranks.
    """
    pairs, values = {}, {}
    for name, metric in sorted(sums.items()):
        if isinstance(metric, Histogram):
            values |= metric.numbers(world.sum_integers(metric.counts.cpu()))
        else:
            pairs[name] = (float(metric[0]), float(metric[1]))
    total: Metrics = {}
    for share in world.gather(pairs):
        add_metrics(total, share)
    values |= {name: value / count for name, (value, count) in total.items() if count}
    return dict(sorted(values.items()))


def reset_peak_memory() -> None:
    """Let the peak begin anew. Where the system does not allow it, the peak stays that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is set to what is in use now


def resident_gb() -> float:
    """What the process has in memory before a model is in it; 0 on a GPU, where only tensors are counted."""
    if torch.cuda.is_available():
        return 0.0
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def peak_memory_gb() -> float:
    """This process's peak memory: of the GPU where there is one, else of the host (Linux counts it in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
