"""The moments of what a block's modules receive, from one pass of the block over the calibration batches.

One H for each group of modules that read the same tensor, padding left out, summed over ranks.
Shape letters: B, T batch and positions, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activations import StoredInputs
from .moments import InputMoments
from .ranks import Ranks
from .shared_inputs import InputGroup, first_input, input_groups


def shared_groups(
    block: nn.Module, modules: Mapping[str, nn.Module], inputs: Sequence, ranks: Ranks
) -> list[InputGroup]:
    """Return the same groups on all ranks: those of rank 0, and what only other ranks' batches reach after them."""
    groups, known = [], set()
    for share in ranks.gather(input_groups(block, modules, inputs)):
        for group in share:
            names = tuple(name for name in group.names if name not in known)
            known |= set(names)
            groups += [InputGroup(names, group.once)] if names else []
    return groups


class _Enough(Exception):
    """Ends a pass of a block where nothing behind is needed."""


def block_moments(
    block: nn.Module,
    groups: Sequence[InputGroup],
    modules: Mapping[str, nn.Module],
    inputs: StoredInputs,
    *,
    arithmetic: str,
    ranks: Ranks,
) -> dict[str, InputMoments]:
    """Return the moments of each group's input, by the group's first name, from one pass over the batches."""
    moments = {
        group.names[0]: InputMoments(
            modules[group.names[0]].in_features,
            name=group.names[0],
            device=modules[group.names[0]].weight.device,
            arithmetic=arithmetic,
        )
        for group in groups
    }
    last = groups[-1].names[0] if len(groups) == 1 and groups[0].once else None
    if groups:
        _take_moments(block, moments, modules, inputs, last=last)
    for one in moments.values():
        one.merge(ranks)
    return moments


@torch.no_grad()
def _take_moments(
    block: nn.Module,
    moments: Mapping[str, InputMoments],
    modules: Mapping[str, nn.Module],
    inputs: StoredInputs,
    *,
    last: str | None,
) -> None:
    now: dict[str, Any] = {}

    def listener(name: str) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_input(args, kwargs)
            moments[name].add(x, _mask_of(x, now["valid_BT"], name), batch=now["number"])
            if name == last:
                raise _Enough

        return listen

    hooks = [modules[name].register_forward_pre_hook(listener(name), with_kwargs=True) for name in moments]
    try:
        for number, given in zip(inputs.batches, _each(inputs)):
            now |= {"number": number, "valid_BT": given.valid_BT}
            try:
                block(*given.args, **given.kwargs)
            except _Enough:
                pass
    finally:
        for hook in hooks:
            hook.remove()


def _each(inputs: StoredInputs) -> Iterator:
    return (inputs[at] for at in range(len(inputs)))


def _mask_of(x: Tensor, valid_BT: Tensor | None, name: str) -> Tensor | None:
    """Return which rows of x count. x is [B, T, K], or [B * T, K] as experts and routers see it."""
    if valid_BT is None or x.shape[:-1] == valid_BT.shape:
        return valid_BT
    if x.dim() == 2 and len(x) == valid_BT.numel():
        return valid_BT.reshape(-1)
    raise ValueError(
        f"{name}: its inputs {list(x.shape)} do not lie as its block's positions {list(valid_BT.shape)}, so that "
        "padding cannot be told apart; leave the module out with a rule of bits=16"
    )
