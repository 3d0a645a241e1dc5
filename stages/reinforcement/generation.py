"""Who makes the hypotheses that a stage learns from: the training process itself, or workers beside it (workers.py).

Both call `stage.generate(model, batch)` as a pure function of weights and micro-batch, so that it changes nothing who
does it, and in which order. The version of hypotheses is the step before which training had the weights that made them,
their age the steps trained since. Scores of old ones are the stage's to compute anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ...model.decoding import Hypothesis
from ..runtime.feed import FedStep
from ..runtime.seeds import micro_batch_seed
from ..runtime.stage import TrainingStage
from ..runtime.train_config import TrainConfig

NBests = list[list[Hypothesis]]  # an N-best list for each utterance of a batch
WholeModel = Callable[[], AbstractContextManager[nn.Module]]  # what the trainer gives as `weights`


@dataclass
class GenerationConfig:
    """Workers get new weights before every step that is a multiple of `every`, and where a run begins or goes on.

    So hypotheses are at most every - 1 steps old. A run that is resumed between two deliveries makes the hypotheses up
    to the next one with the weights of its checkpoint; with `every` = 1 it ends exactly as if never interrupted.
    """

    workers: int = 0  # processes beside each rank, on its device; 0: the training process generates itself
    every: int = 1  # steps between two deliveries of weights to the workers
    max_staleness: int | None = None  # steps; older hypotheses are refused and made again. null: every - 1
    worker_threads: int = 1  # torch threads of each worker, whatever their number
    max_restarts: int = 3  # of workers that die over one micro-batch; one more ends the run
    timeout_seconds: float = 1800.0  # a worker that is silent for so long counts as dead; it is when it loads its model

    def __post_init__(self):
        lowest = {"workers": 0, "every": 1, "worker_threads": 1, "max_restarts": 0, "timeout_seconds": 1e-3}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"generation.{name} is {getattr(self, name)}; it must be at least {low}")
        if self.every > 1 and not self.workers:
            raise ValueError(
                f"generation.every is {self.every} and generation.workers is 0: the training process generates with "
                "the weights that it has; set generation.workers=1 or generation.every=1"
            )
        if self.max_staleness is not None and self.max_staleness < self.every - 1:
            raise ValueError(
                f"generation.max_staleness is {self.max_staleness} and generation.every is {self.every}, which makes "
                f"hypotheses up to {self.every - 1} steps old; set generation.every={max(self.max_staleness, 0) + 1}, "
                f"or generation.max_staleness={self.every - 1} or null"
            )

    @property
    def oldest(self) -> int:
        """Steps that hypotheses may be old."""
        return self.every - 1 if self.max_staleness is None else self.max_staleness


class GeneratingStage(TrainingStage, Protocol):
    """A training stage that makes hypotheses. Its config has a section `generation`.

    `generate` is given the model in eval mode, without gradients and with torch seeded for the micro-batch.
    """

    def generate(self, model: Any, batch: Any, **known: Any) -> NBests: ...


class Generated(NamedTuple):
    """The hypotheses of one batch, and what is worth a line in the log about them."""

    hypotheses: NBests
    version: int
    seconds: float  # that making them took, in whatever process
    age: int = 0
    waited: float = 0.0  # seconds that training stood still for them


class Generation(Protocol):
    """Where hypotheses come from. A stage makes one in `build` and passes the trainer's `prepared` on to it."""

    refused: int  # batches of hypotheses made again, as their weights were not those asked for
    restarts: int  # of workers

    @property
    def pids(self) -> Sequence[int]:
        """The process ids of the workers."""
        ...

    def prepared(self, steps: Iterator[FedStep], *, weights: WholeModel, step: int) -> Iterator[FedStep]:
        """Yield `steps` as they are, and know which step it is (`LooksAhead` in runtime/stage.py)."""
        ...

    def of(self, model: nn.Module, batch: Any, **known: Any) -> Generated:
        """Return the hypotheses of a batch of the step that was yielded last; a replay of it gets the same ones.

        `known` is what of the batch has been computed already, and is passed on where it is of use.
        """
        ...


def require_workers_under_zero_3(generation: GenerationConfig, train: TrainConfig) -> None:
    """Raise ValueError where the training process is to generate with weights that it has to gather for each pass."""
    if train.effective_zero_stage == 3 and not generation.workers:
        raise ValueError(
            "train.zero_stage is 3 and generation.workers is 0: ranks whose hypotheses differ in length would run "
            "different numbers of forward passes, and wait for one another for ever; set generation.workers=1 or "
            "train.zero_stage=2"
        )


class InProcess:
    """Generation in the training process, with the weights of the step."""

    refused = restarts = 0
    pids = ()

    def __init__(self, stage: GeneratingStage, cfg: Any):
        require_workers_under_zero_3(cfg.generation, cfg.train)
        self.stage, self.seed, self.step = stage, cfg.seed, 0

    def prepared(self, steps: Iterator[FedStep], *, weights: WholeModel, step: int) -> Iterator[FedStep]:
        for self.step, fed in enumerate(steps, start=step):
            yield fed

    def of(self, model: nn.Module, batch: Any, **known: Any) -> Generated:
        start = time.perf_counter()
        hypotheses = generate(self.stage, model, batch, seed=self.seed, **known)
        seconds = time.perf_counter() - start
        return Generated(hypotheses, self.step, seconds, waited=seconds)


def generate(stage: GeneratingStage, model: nn.Module, batch: Any, *, seed: int, **known: Any) -> NBests:
    """Call `stage.generate` as the pure function that it is to be; the model's mode and torch's state are as before."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(micro_batch_seed(seed, batch.index, purpose="generation"))
            hypotheses = stage.generate(model, batch, **known)
    finally:
        model.train(training)
    assert len(hypotheses) == len(batch), f"generate gave {len(hypotheses)} lists for {len(batch)} utterances"
    return hypotheses
