"""A finished block as tensors and a few words, and back: what a run that is started again takes instead of solving."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from .hf import DecoupleQConfig, freeze_packed, place_packed
from .packed_model import forms
from .ranks import Ranks


class Kept(Protocol):
    """Where finished blocks are kept: stages/runtime/kept_work.py."""

    def save(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None: ...
    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None: ...


def kept_for_all(kept: Kept | None, name: str, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return what is kept by a name, on all ranks or on none; all call it, and rank 0 says which.

    A rank that looked for itself could find what rank 0 has just kept, and take another way than the others.
    """
    if kept is None:
        return None
    found = kept.load(name) if ranks.rank == 0 else None
    if not ranks.gather(found is not None)[0]:
        return None
    found = kept.load(name) if found is None else found
    assert found is not None, f"rank {ranks.rank} does not see {name}, which rank 0 has: all ranks share one folder"
    return found


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
