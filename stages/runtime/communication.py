"""How much of a step a rank spends on nothing but collectives: what faster links, or fewer bytes, would save.

One step of each start is watched by torch's profiler: the third, when all that is made once has been made. Collectives
are NCCL's kernels on a GPU, gloo's work on threads of its own on a CPU. What runs at the same time, other kernels, or
on a CPU other operators, hides them; the rest is exposed. A collective lasts until its last rank has come: on the rank
that waits least the links are what it costs, on the others also the slower ones (stragglers.py names these).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from .world import World

# Steps after a start: the first ones make buffers, handles and connections.
WATCHED_STEP = 3
# What calls collectives, or waits for them, and is no work of its own.
NO_WORK = ("c10d", "autograd", "torch", "gloo", "nccl")

Interval = tuple[float, float]


class CommunicationWatch:
    """Watches one step; `metrics` are empty before it, and on a single rank."""

    def __init__(self, world: World):
        self.world, self.steps = world, 0
        self.metrics: dict[str, float] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enclose a step of training, on all ranks."""
        self.steps += 1
        if self.world.size == 1 or self.steps != WATCHED_STEP:
            yield
            return
        is_cuda = self.world.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
            began = time.perf_counter()
            yield
            if is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        collectives, work = sort_events(profiler.events(), is_cuda=is_cuda)
        shares = self.world.gather(exposed(collectives, work) / 1e6 / seconds)
        self.metrics = {
            "train/communication_frac": sum(shares) / len(shares),
            "train/communication_frac_least": min(shares),
        }


def sort_events(events: Iterable[FunctionEvent], *, is_cuda: bool) -> tuple[list[Interval], list[Interval]]:
    """Return when collectives ran and when anything else did, in microseconds."""
    collectives, work = [], []
    for event in events:
        when = (event.time_range.start, event.time_range.end)
        if is_cuda:
            if event.device_type == DeviceType.CUDA:  # not the call that has started it
                (collectives if event.name.startswith("nccl") else work).append(when)
        elif event.name.startswith("gloo:"):
            collectives.append(when)
        elif "::" in event.name and not event.name.startswith(NO_WORK):
            work.append(when)
    return collectives, work


def exposed(collectives: Iterable[Interval], work: Iterable[Interval]) -> float:
    """Return for how long a collective ran and no work did."""
    both = [*collectives, *work]
    return covered(both) - covered(work) if both else 0.0


def covered(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
