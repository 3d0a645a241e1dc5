"""Which modules of a block read the same tensor: q, k and v; gate and up. They share one H.

Found by running the block and looking at the tensors themselves, not at names: two modules share an input if they are
called with the same object, which nothing has written to in between. Fused experts, each of which has tokens of its
own, share with nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .block_input import BlockInput
from .expert_layout import fused_experts


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

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensor = first_input(args, kwargs)
            calls.append((name, tensor, tensor._version))

        return note

    hooks = [module.register_forward_pre_hook(noting(name), with_kwargs=True) for name, module in modules.items()]
    try:
        block(*given.args, **given.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    names, experts = [name for name, _, _ in calls], fused_experts(block)
    alone = {name for name, module in modules.items() if any(module is one for one in experts.values())}
    found: dict[tuple, list[str]] = {}
    for name, tensor, version in calls:
        key = (name,) if name in alone or names.count(name) > 1 else (id(tensor), version)
        if name not in found.setdefault(key, []):
            found[key].append(name)
    return [InputGroup(tuple(group), names.count(group[0]) == 1) for group in found.values()]


def first_input(args: tuple, kwargs: dict) -> Tensor:
    """Return what a module is called with, by position or by whatever name."""
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
