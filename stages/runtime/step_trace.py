"""What one micro-batch of a stage costs, found by running its loss forward and backward on fake tensors.

The batch is the real one: lengths and token ids keep their values. Weights have shapes only, and so has all that meets
them. The memory of activations, of the loss's temporaries and of gradients on their way is what `Allocations` sees;
gradients leave as soon as they are whole, and `Segment`s note when, as who keeps them is ZeRO's matter
(zero_memory.py). Floating point operations are those of matrix products, convolutions and attention, as torch counts
them for the shapes that come: attention by the square of its length, nothing for gradients that nobody takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from .allocations import Allocations
from .engine import StageLoss
from .stage import TrainingStage, another_model, give_shapes
from .zero_3_linear import linear_layers

aten = torch.ops.aten
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


class Segment(NamedTuple):
    """A stretch of the backward pass: the most bytes in it, and the elements of the gradient that is whole at its end.

    Gradients that are whole are not in `peak`.
    """

    peak: int
    gradient: int


class Flops(NamedTuple):
    """Of a micro-batch. `recomputed` is what activation checkpointing runs a second time."""

    forward: float
    backward: float
    recomputed: float

    @property
    def model(self) -> float:
        """What MFU counts: recomputing is no progress."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        return self.model + self.recomputed


class StepTrace(NamedTuple):
    """`saved` is alive between forward and backward; `forward_peak` the most during forward; both without weights."""

    saved: int
    forward_peak: int
    segments: list[Segment]
    flops: Flops
    batch: int  # bytes of its tensors

    @property
    def activations(self) -> int:
        """The most at any time, gradients that are whole left out."""
        return max(self.forward_peak, *(segment.peak for segment in self.segments))


def _ctc_loss(log_probs_TBV: Tensor, targets: Tensor, input_lengths_B: Tensor, target_lengths_B: Tensor, *_) -> tuple:
    T, B, _ = log_probs_TBV.shape
    return log_probs_TBV.new_empty(B), log_probs_TBV.new_empty(B, T, 2 * int(target_lengths_B.max()) + 1)


# Operations that know their output's shape only from values, which here are real: lengths of texts.
SHAPE_RULES = {
    aten._ctc_loss.Tensor: _ctc_loss,
    aten._ctc_loss_backward.Tensor: lambda grad, log_probs_TBV, *_: torch.empty_like(log_probs_TBV),
}


class OperationCounter(TorchDispatchMode):
    """Sums the floating point operations of matrix products, convolutions and attention, by pass."""

    def __init__(self):
        super().__init__()
        self.sums = {"forward": 0.0, "backward": 0.0, "recomputed": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        rule = SHAPE_RULES.get(func, func) if args and isinstance(args[0], FakeTensor) else func
        out = rule(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.sums[_which_pass()] += formula(*args, **kwargs, out_val=out)
        return out

    @property
    def flops(self) -> Flops:
        return Flops(**self.sums)


def _which_pass() -> str:
    if torch._C._current_graph_task_id() == -1:
        return "forward"
    # A backward pass takes no gradients, and leaves forward-mode ones as they are. What runs in it with gradients is
    # recomputed, and so is a Function's forward pass (ZeRO 3 has one for every linear layer), where both are off.
    recomputed = torch.is_grad_enabled() or not torch._C._is_fwd_grad_enabled()
    return "recomputed" if recomputed else "backward"


def trace_step(
    stage: TrainingStage, model: nn.Module, batch: Any, *, precision: str, zero_3: bool = False
) -> StepTrace:
    """Run forward and backward of `batch` through a model that was built on the meta device, or was traced before.

    `zero_3`: with the linear layers of that stage. `requires_grad` must be set as in training. Raises ValueError where
    an operation needs values that nobody has.
    """
    module = StageLoss(stage, model, bf16=precision != "fp32").train()
    if any(parameter.is_meta for parameter in module.parameters()):  # not traced before
        if precision == "bf16":
            module.bfloat16()  # as DeepSpeed does, frozen ones too
        give_shapes(stage, module)
    counter, segments = OperationCounter(), []
    tensors = batch_tensors(batch)
    models = [each for each in (module, another_model(stage)) if each is not None]
    known = [tensor for each in models for tensor in (*each.parameters(), *each.buffers())]
    with Allocations([*known, *tensors]) as memory:
        with counter, linear_layers(zero_3=zero_3), _gradients_leave(module, memory, segments):
            try:
                loss = module(batch, torch.device("cpu"))
                saved, forward_peak = memory.live, memory.restart_peak()
                loss.backward()
            except NEEDS_VALUES as error:
                raise ValueError(
                    f"stage {type(stage).__name__}: {error.func} needs the values of its input, so the memory of a "
                    "step cannot be known from shapes; see the peak that a dry run of `seedling run` prints"
                ) from error
        segments.append(Segment(memory.restart_peak(), 0))
    del loss
    gc.collect()
    size = sum(t.untyped_storage().nbytes() for t in tensors)
    return StepTrace(saved, forward_peak, segments, counter.flops, size)


@contextmanager
def _gradients_leave(module: nn.Module, memory: Allocations, segments: list[Segment]) -> Iterator[None]:
    def whole(parameter: nn.Parameter) -> None:
        peak, parameter.grad = memory.peak, None
        memory.restart_peak()  # without the gradient that has just left
        segments.append(Segment(peak, parameter.numel()))

    handles = [p.register_post_accumulate_grad_hook(whole) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch's fields."""
    values = [getattr(batch, f.name) for f in fields(batch)] if is_dataclass(batch) else list(vars(batch).values())
    return [value for value in values if isinstance(value, Tensor)]


@register_flop_formula(aten._grouped_mm)
def _grouped_mm_flops(a: tuple, b: tuple, *_, out_shape: Any = None, **__) -> int:
    """Rows that belong to experts, each times its expert's matrix: 2 M K N, however they are shared out."""
    return 2 * a[-2] * a[-1] * b[-1]


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(query: tuple, key: tuple, value: tuple, *_, out_shape: Any = None, **__) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(grad: tuple, query: tuple, key: tuple, value: tuple, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
