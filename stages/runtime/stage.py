"""The two shapes of a stage, and what its loss returns. Nothing here knows about audio, text or models.

A stage is an instance that the runtime drives: `build` comes first, so a stage may keep what it needs from its config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...data.batches import PlannedBatches
from .artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .feed import FedStep
from .metrics import Metrics

LATE = 2**40  # index of a micro-batch that comes after any phase of a run: early steps may use a part of the model only


def on_meta() -> bool:
    """Whether a stage's model is only being measured (`seedling check`): shapes without weights, and no audio read."""
    return torch.get_default_device().type == "meta"


def only_shapes(model: nn.Module) -> bool:
    """Whether the weights have shapes and no values, as in the loss that `seedling check` takes."""
    from torch._subclasses import FakeTensor

    return isinstance(next(model.parameters()), FakeTensor)


class StepOutput(NamedTuple):
    """`loss_sum` is the sum over what `stage.count` counts, never a mean.

    Metrics are {name: (sum, count)}, or histograms where a number is no mean (metrics.py). Logs show `name` as
    `train/name`, and a name that has a slash as it is.
    """

    loss_sum: Tensor
    metrics: Metrics = {}


class Batch(Protocol):
    """What the runtime reads of a batch. `index` is the micro-batch's running number: it seeds the forward pass.

    Seconds are of audio, characters of text, each with and without padding; 0 where a batch has none. `utterances` is
    its length, but that a joined one counts as all that it was joined from. `amount` says in words what is in it.
    """

    index: int
    epoch: int
    bad: list

    @property
    def seconds(self) -> float: ...
    @property
    def padded_seconds(self) -> float: ...
    @property
    def characters(self) -> int: ...
    @property
    def padded_characters(self) -> int: ...
    @property
    def utterances(self) -> int: ...
    @property
    def amount(self) -> str: ...
    def to(self, device: Any) -> Batch: ...
    def __len__(self) -> int: ...


class TrainingStage(Protocol):
    """A stage with gradients. `trainable` names the optimizer group of a parameter, or None for a frozen one.

    `count(batch)` is the loss's normaliser (tokens, frames, utterances), known before the forward pass. `evaluate` gets
    this rank's share of the batches and returns {metric: (sum, count)} or histograms, which the runtime adds up over
    ranks and divides. `batches(cfg, "valid")` may return None, one set, or {set name: planned batches}.
    """

    consumes: ClassVar[dict[str, ArtifactSpec]]
    produces: ClassVar[str]
    Config: ClassVar[type]

    def build(self, cfg: Any, inputs: dict[str, Artifact]) -> nn.Module: ...
    def trainable(self, parameter_name: str) -> str | None: ...
    def batches(self, cfg: Any, split: str) -> Any: ...
    def count(self, batch: Any) -> int: ...
    def loss(self, model: nn.Module, batch: Any) -> StepOutput: ...
    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> Metrics: ...
    def export(self, model: nn.Module, writer: ArtifactWriter) -> None: ...


@runtime_checkable
class LooksAhead(Protocol):
    """What a training stage has besides where it wants its steps before they are trained on.

    `prepared` is a generator that yields `steps` unchanged; the trainer draws one before each optimizer step, and what
    stands between two yields runs on all ranks between two of them. It may pull steps ahead: where the run stands moves
    with what it yields. `step` is the first one's number. `weights()` is to be entered on all ranks together; it yields
    the model in eval mode with all its weights, under ZeRO-3 in the CPU's memory. The generator is closed when training
    ends, by an error too. The dry run comes before it, with a batch that is in no step.
    """

    def prepared(
        self, steps: Iterator[FedStep], *, weights: Callable[[], AbstractContextManager[nn.Module]], step: int
    ) -> Iterator[FedStep]: ...


@runtime_checkable
class HoldsAnother(Protocol):
    """What a training stage has besides where each rank holds a second model, one that does not learn.

    It is whole under every ZeRO stage, on the device of the first from the first loss on; None where there is none.
    """

    @property
    def another(self) -> nn.Module | None: ...


def another_model(stage: TrainingStage) -> nn.Module | None:
    """Return the model that a stage holds beside the one that learns."""
    return stage.another if isinstance(stage, HoldsAnother) else None


def give_shapes(stage: TrainingStage, model: nn.Module) -> None:
    """Give what was built on meta weights that have a shape and no values: the model, and the one held beside it."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        _fill(model)
        if (another := another_model(stage)) is not None:
            _fill(another)


def _fill(model: nn.Module) -> None:
    """`to_empty` makes two parameters of one that has two places, as the matrix of a tied head: leave it one."""
    places = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
    model.to_empty(device="cpu")
    filled: dict[int, nn.Parameter | None] = {}
    for module, name, before in places:
        module._parameters[name] = filled.setdefault(id(before), module._parameters[name])


def validation_sets(stage: TrainingStage, cfg: Any) -> dict[str, PlannedBatches]:
    """Return a stage's validation sets by name; one without a name is "dev"."""
    valid = stage.batches(cfg, "valid")
    return valid if isinstance(valid, dict) else {"dev": valid} if valid else {}


class RunStage(Protocol):
    """A stage without gradients: computes its artifact in one go, called on every rank (`init_world()` says which)."""

    consumes: ClassVar[dict[str, ArtifactSpec]]
    produces: ClassVar[str]
    Config: ClassVar[type]

    def run(self, cfg: Any, inputs: dict[str, Artifact], writer: ArtifactWriter) -> None: ...
