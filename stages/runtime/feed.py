"""Planned steps in, this rank's batches out.

Of a step's M planned micro-batches, rank r of R takes those at r, r + R, ...; which worker process loads one changes
nothing, because a batch is a pure function of its planned micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from ...data.batches import PlannedBatches, make_loader
from ...data.plan import MicroBatch
from .world import World


class FedStep(NamedTuple):
    """A planned step, the same on all ranks, and this rank's M / R batches of it."""

    planned: Any
    batches: list[Any]

    @property
    def share(self) -> list[MicroBatch]:
        """This rank's planned micro-batches, which `batches` were read from."""
        mine = {batch.index for batch in self.batches}
        return [micro_batch for micro_batch in self.planned.micro_batches if micro_batch.index in mine]


class _RankShare:
    """Sampler: yields this rank's micro-batches and notes the steps that they belong to. The loader reads it ahead."""

    def __init__(self, steps: Iterator[Any], world: World):
        self.steps = steps
        self.world = world
        self.ahead: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        for step in self.steps:
            self.ahead.append(step)
            yield from step.share(self.world.rank, world_size=self.world.size)


def feed(
    source: PlannedBatches, *, world: World, num_workers: int = 0, cursor: Any = None, epochs: int | None = None
) -> Iterator[FedStep]:
    """Yield planned steps from `cursor` on with this rank's batches, loaded by `num_workers` processes (0: here)."""
    share = _RankShare(source.plan.steps(cursor=cursor, epochs=epochs), world)
    loader = make_loader(source, share, num_workers=num_workers, pin_memory=world.device.type == "cuda")
    batches = iter(loader)
    while True:
        first = list(islice(batches, 1))
        if not first:
            return
        planned = share.ahead.popleft()
        rest = len(planned.micro_batches) // world.size - 1
        yield FedStep(planned, first + list(islice(batches, rest)))
