"""Capture what stands at the door of a part: the hidden states at its first block, and what each block is called with.

The part runs as far as its last block and is stopped there, as some LLMs call their layers with different masks and
positions (sliding and full attention), which only a run through all of them shows. A tensor that several blocks get is
kept once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activations import Surroundings, moved
from .blocks import Start


class _AtTheLastDoor(Exception):
    """Stops the run of a part: nobody needs what would follow."""


class Captured(NamedTuple):
    hidden_BTD: Tensor  # at the first block
    surroundings: dict[str, Surroundings]  # by block


@torch.no_grad()
def capture(model: nn.Module, blocks: list[str], start: Start) -> Captured:
    """Run a part on one batch up to its last block and return what it met, on the CPU."""
    first: list[Tensor] = []
    calls: dict[str, tuple[tuple, dict]] = {}

    def listener(name: str) -> Any:
        def listen(module: nn.Module, args: tuple, kwargs: dict) -> None:
            rest = dict(kwargs)
            hidden_BTD = args[0] if args else rest.pop("hidden_states")
            if not first:
                first.append(hidden_BTD.detach())
            calls[name] = (args[1:], rest)
            if name == blocks[-1]:
                raise _AtTheLastDoor

        return listen

    hooks = [model.get_submodule(n).register_forward_pre_hook(listener(n), with_kwargs=True) for n in blocks]
    try:
        start.run()
    except _AtTheLastDoor:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in blocks if name not in calls]
    if missing:
        raise ValueError(f"{missing[0]}: a calibration batch never reaches this block; it cannot be quantised")
    valid_BT, seen = _valid(start.valid, first[0]), {}
    return Captured(
        first[0].cpu(),
        {
            name: Surroundings(moved(args, "cpu", seen), moved(kwargs, "cpu", seen), valid_BT)
            for name, (args, kwargs) in calls.items()
        },
    )


def _valid(valid: Tensor | None, hidden_BTD: Tensor) -> Tensor | None:
    """Return a mask [B, T] on the CPU of lengths [B], of a mask, or None."""
    if valid is None:
        return None
    T = hidden_BTD.shape[1]
    valid_BT = torch.arange(T) < valid.cpu()[:, None] if valid.dim() == 1 else valid.cpu().bool()
    assert valid_BT.shape == hidden_BTD.shape[:2], "the mask has other positions than the hidden states"
    return valid_BT
