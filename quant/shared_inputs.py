"""Which modules of a block read the same tensor: q, k and v; gate and up. They share one H.

Found by running the block and looking at the tensors themselves, not at names: two modules share an input if they are
called with the same object, which nothing has written to in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .block_input import BlockInput


class InputGroup(NamedTuple):
    """Modules with one input, in the order of their calls; whether each is called once in a pass of the block."""

    names: tuple[str, ...]
    once: bool


@torch.no_grad()
def input_groups(block: nn.Module, modules: Mapping[str, nn.Module], inputs: Sequence[BlockInput]) -> list[InputGroup]:
    """Return the groups of `modules` in the order in which activations pass them; those never called are in none.

    One batch shows them all, as a rule; further ones are run only while modules (of rarely used experts) are missing.
    """
    groups: list[InputGroup] = []
    for given in inputs:
        seen = {name for group in groups for name in group.names}
        missing = {name: module for name, module in modules.items() if name not in seen}
        if not missing:
            break
        groups += _groups_of_one_pass(block, missing, given)
    return groups


def _groups_of_one_pass(block: nn.Module, modules: Mapping[str, nn.Module], given: BlockInput) -> list[InputGroup]:
    calls: list[tuple[str, Tensor, int]] = []  # the tensors are held: a freed one's id could be another's
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0], args[0]._version)))
        for name, module in modules.items()
    ]
    try:
        block(*given.args, **given.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, _, _ in calls]
    found: dict[tuple, list[str]] = {}
    for name, tensor, version in calls:
        key = (id(tensor), version) if names.count(name) == 1 else (name,)
        if name not in found.setdefault(key, []):
            found[key].append(name)
    return [InputGroup(tuple(group), names.count(group[0]) == 1) for group in found.values()]
