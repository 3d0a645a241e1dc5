"""The two shapes of a stage, and what its loss returns. Nothing here knows about audio, text or models.

A stage is an instance that the runtime drives: `build` comes first, so a stage may keep what it needs from its config.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from .artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .metrics import Metrics


class StepOutput(NamedTuple):
    """`loss_sum` is the sum over what `stage.count` counts, never a mean.

    Metrics are {name: (sum, count)}, or histograms where a number is no mean (metrics.py). Logs show `name` as
    `train/name`, and a name that has a slash as it is.
    """

    loss_sum: Tensor
    metrics: Metrics = {}


class Batch(Protocol):
    """What the runtime reads of a batch. `index` is the micro-batch's running number: it seeds the forward pass."""

    index: int
    epoch: int
    bad: list

    @property
    def seconds(self) -> float: ...
    @property
    def padding(self) -> float: ...
    def to(self, device: Any) -> Batch: ...
    def __len__(self) -> int: ...


class Plan(Protocol):
    """Planned steps of M micro-batches each, a pure function of the data, the seed and the limits."""

    fingerprint: str

    def steps(self, cursor: Any = None, epochs: int | None = None) -> Iterator[Any]: ...
    def summary(self, epoch: int = 0) -> Any: ...


class PlannedBatches(Protocol):
    """A plan and the map-style dataset that turns one of its micro-batches into a batch.

    `fingerprint` covers the plan and the targets, where these are not in the data.
    """

    plan: Plan
    dataset: Any

    @property
    def fingerprint(self) -> str: ...


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


class RunStage(Protocol):
    """A stage without gradients: computes its artifact in one go, called on every rank (`init_world()` says which)."""

    consumes: ClassVar[dict[str, ArtifactSpec]]
    produces: ClassVar[str]
    Config: ClassVar[type]

    def run(self, cfg: Any, inputs: dict[str, Artifact], writer: ArtifactWriter) -> None: ...
