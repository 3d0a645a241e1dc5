"""What each expert of a layer receives in calibration: the inputs of its gate_up projection, and those of its down.

gate_up sees the tokens that are routed to the expert, down what those become behind the activation. A padding token
counts for neither. Routing weights do not scale an expert's input and have no part in it.
Shape letters: n tokens, k experts per token, K input channels, E experts; B, T batch and positions.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .block_input import BlockInput
from .expert_layout import DOWN, GATE_UP, ExpertLayout, activation_of
from .expert_routing import route
from .packed_experts import PackedMatrices


class ExpertCall(NamedTuple):
    """One call of a fused experts module. `batch` is the calibration batch that it belongs to."""

    hidden_nK: Tensor
    index_nk: Tensor
    valid_n: Tensor | None = None  # False for padding
    batch: int = 0

    @classmethod
    def of(
        cls, module: nn.Module, args: tuple, kwargs: dict, *, valid_BT: Tensor | None = None, batch: int = 0
    ) -> "ExpertCall":
        """Return the call of `module` with these arguments, as a forward pre-hook gets them."""
        hidden, index, _ = inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()
        hidden_nK, index_nk = hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1])
        valid_n = None if valid_BT is None else valid_BT.reshape(-1).to(hidden.device)
        if not len(hidden_nK) == len(index_nk) == len(hidden_nK if valid_n is None else valid_n):
            raise ValueError(
                f"{type(module).__name__} is called with {list(hidden.shape)} for a batch of {list(valid_BT.shape)} "  # type: ignore[union-attr]
                "positions, so that padding cannot be told apart; leave it out with a rule of bits=16"
            )
        return cls(hidden_nK, index_nk, valid_n, batch)

    def everyone(self) -> Tensor:
        """Return all valid tokens."""
        return self.hidden_nK if self.valid_n is None else self.hidden_nK[self.valid_n]


class ReplayedCalls:
    """The calls of an experts module inside a block, one per batch, made again whenever they are iterated over.

    Nothing is stored: the price is a forward pass of the block up to its experts. A list of ExpertCall does as well
    where n x K values per layer fit into memory. `numbers` are the batches' among those of all ranks, for errors.
    """

    def __init__(self, block: nn.Module, module: nn.Module, inputs: Sequence[BlockInput], *, numbers: Sequence[int]):
        assert len(inputs) == len(numbers)
        self.block, self.module, self.inputs, self.numbers = block, module, inputs, numbers

    @torch.no_grad()
    def __iter__(self) -> Iterator[ExpertCall]:
        for at, number in enumerate(self.numbers):
            yield self._call(self.inputs[at], number)

    def _call(self, batch: BlockInput, number: int) -> ExpertCall:
        def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Reached(ExpertCall.of(module, args, kwargs, valid_BT=batch.valid_BT, batch=number))

        handle = self.module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.block(*batch.args, **batch.kwargs)
        except _Reached as reached:
            return reached.call
        finally:
            handle.remove()
        raise AssertionError(f"the block never called its {type(self.module).__name__}")


class _Reached(Exception):
    """Ends a block's forward pass at its experts: what lies behind them is not needed."""

    def __init__(self, call: ExpertCall):
        super().__init__()
        self.call = call


def expert_inputs(
    module: nn.Module,
    call: ExpertCall,
    *,
    layout: ExpertLayout,
    projection: str,
    experts: Collection[int],
    starved: Collection[int] = (),
    gate_up: PackedMatrices | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (expert, inputs_nK of its projection) for those of `experts` that the call has tokens for.

    `starved` experts get all valid tokens instead of those routed to them. Inputs of down are computed with the
    weights of `gate_up` where it is given (the quantised ones, so that down is fitted to what it will receive), else
    with the module's.
    """
    activate = activation_of(module)
    routing = route(call.index_nk, experts=layout.experts, valid_n=call.valid_n)
    routed = dict(zip(routing.experts, routing.tokens_S.split(routing.counts)))
    for expert in experts:
        if expert in starved:
            x_nK = call.everyone()
        elif expert in routed:
            x_nK = call.hidden_nK[routed[expert]]
        else:
            continue
        if projection == DOWN:
            x_nK = activate(_gate_up(module, x_nK, expert, layout=layout, packed=gate_up))
        yield expert, x_nK


def _gate_up(
    module: nn.Module, x_nK: Tensor, expert: int, *, layout: ExpertLayout, packed: PackedMatrices | None
) -> Tensor:
    if packed is not None:
        return packed.one(x_nK, expert)
    bias_EN = layout.bias_EN(module, GATE_UP)
    bias_N = None if bias_EN is None else bias_EN[expert].to(x_nK.dtype)
    return nn.functional.linear(x_nK, layout.weight_NK(module, GATE_UP, expert).to(x_nK.dtype), bias_N)
