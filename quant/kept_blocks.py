"""A finished block as tensors and a few words, and back: what a run that is started again takes instead of solving."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .hf import DecoupleQConfig, freeze_packed, place_packed
from .packed_model import forms


def finished_block(model: nn.Module, block: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all of a block's tensors on the CPU, norms included, and the forms of its packed matrices by full name."""
    module = model.get_submodule(block)
    matrices = {".".join(filter(None, (block, name))): form for name, form in forms(module).items()}
    # Cloned: tensors that share memory cannot be written.
    return {key: value.detach().cpu().clone().contiguous() for key, value in module.state_dict().items()}, matrices


def install_block(model: nn.Module, block: str, tensors: dict[str, Tensor], matrices: dict[str, Any]) -> None:
    """Make a block, full precision as yet, what `finished_block` found."""
    place_packed(model, DecoupleQConfig(matrices=matrices))
    module = model.get_submodule(block)
    module.load_state_dict(tensors)
    freeze_packed(module)
