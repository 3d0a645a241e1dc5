"""Activations between two blocks, one tensor a calibration batch, on the host up to a limit and in files past it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .block_input import BlockInput


class ActivationStore:
    """Tensors by the number of their batch. Files lie in `folder`, which all ranks see, and are overwritten in place.

    At most `limit_bytes` stay in memory; every further tensor is a file of its own.
    """

    def __init__(self, folder: Path, name: str, *, limit_bytes: float):
        self.folder, self.name, self.limit_bytes = folder, name, limit_bytes
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    def put(self, batch: int, value: Tensor) -> None:
        value = value.detach().cpu().contiguous()
        before = self._kept.pop(batch, None)
        self._bytes -= before.nbytes if before is not None else 0
        if self._bytes + value.nbytes <= self.limit_bytes:
            self._kept[batch] = value
            self._bytes += value.nbytes
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(value.clone(), self._file(batch))  # clone: a view would be saved with all that it views

    def get(self, batch: int) -> Tensor:
        kept = self._kept.get(batch)
        return torch.load(self._file(batch), weights_only=True) if kept is None else kept

    def copy_to(self, other: ActivationStore, batches: Sequence[int]) -> None:
        for batch in batches:
            other.put(batch, self.get(batch))

    def clear(self) -> None:
        """Forget everything, files included."""
        self._kept.clear()
        self._bytes = 0
        for file in self.folder.glob(f"{self.name}-*.pt"):
            file.unlink(missing_ok=True)

    def _file(self, batch: int) -> Path:
        return self.folder / f"{self.name}-{batch:06d}.pt"


class Stored(Sequence):
    """The stored tensors of some batches as a sequence, each on `device` when it is asked for."""

    def __init__(self, store: ActivationStore, batches: Sequence[int], *, device: torch.device | str):
        self.store, self.batches, self.device = store, list(batches), device

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Stored(self.store, self.batches[at], device=self.device)
        return self.store.get(self.batches[at]).to(self.device)


class Surroundings:
    """What one block is called with in one batch beside the hidden states, on the host, and which positions count."""

    def __init__(self, args: tuple, kwargs: dict, valid_BT: Tensor | None):
        self.args, self.kwargs, self.valid_BT = args, kwargs, valid_BT


class StoredInputs(Sequence):
    """A block's inputs, batch by batch, each put together on `device` when it is asked for."""

    def __init__(self, hidden: Stored, surroundings: Sequence[Surroundings]):
        assert len(hidden) == len(surroundings)
        self.hidden, self.surroundings = hidden, surroundings

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return StoredInputs(self.hidden[at], self.surroundings[at])
        around, device = self.surroundings[at], self.hidden.device
        valid_BT = around.valid_BT
        return BlockInput(
            (self.hidden[at], *moved(around.args, device)),
            moved(around.kwargs, device),
            None if valid_BT is None else valid_BT.to(device),
        )

    @property
    def batches(self) -> list[int]:
        """The numbers of the batches among those of all ranks."""
        return self.hidden.batches


def moved(value: Any, device: torch.device | str, seen: dict[int, Tensor] | None = None) -> Any:
    """Return nested tuples, lists and dicts with every tensor on `device`.

    With `seen`, a tensor that is met twice becomes one: masks and rotary tables are the same objects for all blocks.
    """
    if isinstance(value, Tensor):
        if seen is None:
            return value.to(device)
        if id(value) not in seen:
            seen[id(value)] = value.detach().to(device)
        return seen[id(value)]
    if isinstance(value, dict):
        return {key: moved(one, device, seen) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(one, device, seen) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(one, device, seen) for one in value)
    return value


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of what a block returns: a tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's tensors lie."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
