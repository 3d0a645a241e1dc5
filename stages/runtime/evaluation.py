"""The validation sets of a run, measured on the model as it is; a request to stop is seen between their batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...data.batches import PlannedBatches
from .engine import Engine
from .feed import FedStep, feed
from .meters import mean_metrics
from .signals import StopAgreed, StopRequest
from .stage import TrainingStage
from .watchdog import Watchdog
from .world import World

# Batches of a rank between two agreements: each makes the ranks wait for the slowest of them.
BATCHES_A_LOOK = 8


def require_set_of(metric: str, sets: dict[str, PlannedBatches]) -> None:
    """Refuse a train.keep_best of no validation set; which metrics a set has shows when it is evaluated."""
    if metric and not any(metric.startswith(f"valid/{name}/") for name in sets):
        known = ", ".join(f"valid/{name}/..." for name in sets) or "nothing: data.valid is empty"
        raise ValueError(f"train.keep_best is {metric!r}; what is evaluated is {known}")


class Evaluation:
    """One pass over every validation set, each rank with its share of the batches.

    A rank has as many batches as any other, so all look for a request to stop after the same ones.
    """

    def __init__(
        self,
        stage: TrainingStage,
        engine: Engine,
        sets: dict[str, PlannedBatches],
        *,
        world: World,
        num_workers: int,
        watchdog: Watchdog,
    ):
        self.stage, self.engine, self.sets = stage, engine, sets
        self.world, self.num_workers, self.watchdog = world, num_workers, watchdog

    def measure(self, *, step: int, stop: StopRequest) -> dict[str, float]:
        """Return {valid/SET/METRIC: value}; StopAgreed, on all ranks, when one of them was asked to stop."""
        values = {}
        for name, data in self.sets.items():
            with self.engine.evaluating() as model:
                fed = feed(data, world=self._sharers(), num_workers=self.num_workers, epochs=1)
                sums = self.stage.evaluate(model, self._batches(fed, stop, what=f"{name} after step {step}"))
            means = mean_metrics(sums, world=self.world)
            values |= {f"valid/{name}/{metric}": value for metric, value in means.items()}
        return values

    def _batches(self, steps: Iterator[FedStep], stop: StopRequest, *, what: str) -> Iterator[Any]:
        """Yield a set's batches on this rank's device; each counts as progress."""
        batches = (batch for step in steps for batch in step.batches)
        for number, batch in enumerate(batches):
            if number % BATCHES_A_LOOK == 0 and any(self.world.sum([float(stop.requested)])):
                raise StopAgreed
            self.watchdog.beat(f"evaluating batch {number + 1} of {what}")
            yield batch.to(self.world.device)

    def _sharers(self) -> World:
        """The ranks that share a validation set: all of them, but under ZeRO-3 each one takes the whole of it.

        Decoding runs as many forward passes as a batch's longest text has tokens, and under ZeRO-3 each pass is a
        collective: ranks with different batches would wait for one another for ever. Means over R copies are the same.
        """
        return World(0, 1, self.world.device) if self.engine.zero_stage == 3 else self.world
