"""What all ranks know of a step before it runs: a few numbers, added up over them on the CPU."""

from __future__ import annotations

from typing import NamedTuple

from .feed import FedStep
from .stage import TrainingStage
from .world import World


class Agreed(NamedTuple):
    """Sums over the ranks. `count` is the loss's normaliser, `stop` how many ranks were asked to stop."""

    count: float
    seconds: float
    padded_seconds: float
    characters: float
    padded_characters: float
    utterances: float
    bad: float
    stop: float


def agree(fed: FedStep, stage: TrainingStage, *, stop: bool, world: World) -> Agreed:
    """Return what this rank's batches of a step and those of all others come to."""
    mine = Agreed(
        count=sum(stage.count(batch) for batch in fed.batches),
        seconds=sum(batch.seconds for batch in fed.batches),
        padded_seconds=sum(batch.padded_seconds for batch in fed.batches),
        characters=sum(batch.characters for batch in fed.batches),
        padded_characters=sum(batch.padded_characters for batch in fed.batches),
        utterances=sum(batch.utterances for batch in fed.batches),
        bad=sum(len(batch.bad) for batch in fed.batches),
        stop=stop,
    )
    return Agreed(*world.sum([float(x) for x in mine]))
