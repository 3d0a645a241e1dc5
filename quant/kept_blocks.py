"""A finished block as tensors and a few words, and back: what a run that is started again takes instead of solving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .linear import Layout, PackedLinear
from .packed_experts import PackedExperts


def packed_block(model: nn.Module, block: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all of a block's tensors on the CPU, norms included, and what its packed modules are, by full name."""
    module, packed = model.get_submodule(block), {}
    for name, one in module.named_modules():
        full = f"{block}.{name}" if name else block
        if isinstance(one, PackedLinear):
            packed[full] = {"layout": list(one.layout)}
        elif isinstance(one, PackedExperts):
            forms = {"gate_up": one.gate_up, "down": one.down}
            packed[full] = {
                "bits": {key: form.bits for key, form in forms.items()},
                "group_size": {key: form.group_size for key, form in forms.items()},
            }
    # Cloned: tensors that share memory cannot be written.
    return {key: value.detach().cpu().clone().contiguous() for key, value in module.state_dict().items()}, packed


def install_block(
    model: nn.Module, block: str, tensors: dict[str, Tensor], packed: dict[str, Any], *, scale_dtype: torch.dtype
) -> None:
    """Make a block what `packed_block` found."""
    for name, form in packed.items():
        was = model.get_submodule(name)
        if "layout" in form:
            device = was.weight.device
            place = PackedLinear.empty(Layout(*form["layout"]), scale_dtype=scale_dtype, bias=was.bias, device=device)
        else:
            device = next(was.parameters()).device
            place = PackedExperts.empty(was, **form, scale_dtype=scale_dtype, name=name, device=device)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, place)
    model.get_submodule(block).load_state_dict(tensors)
