"""What lies in DeepSpeed's shards, by parameter: the same whatever ZeRO stage and number of ranks wrote them.

Under ZeRO a rank keeps fp32 weights and the optimizer's moments as flat vectors. Stages 1 and 2 lay the parameters of
a group end to end and cut the whole into one piece a rank, so a parameter may begin on one rank and end on the next.
Stage 3 cuts every parameter into one piece a rank, and a rank lays its pieces end to end. Files are mapped into memory:
what is not asked for is not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTS = "fp32"
STEP = "step"
# Where each kind of optimizer state of DeepSpeed keeps its flat weights, and torch's optimizer state.
BY_GROUP = ("single_partition_of_fp32_groups", "base_optimizer_state")
BY_PARAMETER = ("fp32_flat_groups", "optimizer_state_dict")


class Piece(NamedTuple):
    """`numel` elements of a parameter, from `offset` on, which `rank` keeps in its vector `flat`, from `start` on."""

    rank: int
    flat: int
    start: int
    offset: int
    numel: int


Layout = dict[str, list[Piece]]


def layout_by_group(slices: list[list[dict[str, tuple[int, int]]]]) -> Layout:
    """Stages 1 and 2, from slices[rank][flat] = {parameter: (start, numel)}; pieces follow one another by rank."""
    layout: Layout = {}
    for rank, flats in enumerate(slices):
        for flat, addresses in enumerate(flats):
            for name, (start, numel) in addresses.items():
                pieces = layout.setdefault(name, [])
                pieces.append(Piece(rank, flat, start, sum(piece.numel for piece in pieces), numel))
    return layout


def layout_by_parameter(shapes: list[dict[str, torch.Size]], *, ranks: int) -> Layout:
    """Stage 3, from shapes[flat] = {parameter: shape}. Pieces take equal room; the last may be short or empty."""
    layout: Layout = {}
    for flat, parameters in enumerate(shapes):
        start = 0
        for name, shape in parameters.items():
            numel = shape.numel()
            room = -(-numel // ranks)
            for rank in range(ranks):
                layout.setdefault(name, []).append(
                    Piece(rank, flat, start, rank * room, max(0, min(room, numel - rank * room)))
                )
            start += room
    return layout


def plain_slices(optimizer_state: dict[str, Any]) -> list[dict[str, tuple[int, int]]]:
    """Return where a rank keeps its slices under stages 1 and 2, without DeepSpeed's classes."""
    return [
        {name: (address.start, address.numel) for name, address in flat.items()}
        for flat in optimizer_state["param_slice_mappings"]
    ]


class Shards:
    """The shards of one checkpoint. `model` is what DeepSpeed saved of the module and its counters, of rank 0."""

    def __init__(self, folder: Path):
        models, optimizers = _by_rank(folder, "model_states"), _by_rank(folder, "optim_states")
        self.model: dict[str, Any] = _load(models[0])
        self.ranks = [_load(file)["optimizer_state_dict"] for file in optimizers]
        groups = self.model["param_shapes"] or []
        self.shapes: dict[str, torch.Size] = {name: shape for group in groups for name, shape in group.items()}
        # Of stage 0 there are no optimizer shards: its state is the model file's, by the parameters' order.
        by_parameter = bool(self.ranks) and "fp32_flat_groups" in self.ranks[0]
        self.flats, self.state = BY_PARAMETER if by_parameter else BY_GROUP
        if by_parameter:
            self.layout = layout_by_parameter(groups, ranks=len(self.ranks))
        else:
            self.layout = layout_by_group([plain_slices(rank) for rank in self.ranks])

    def read(self, name: str, what: str = WEIGHTS, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements `start` to `stop` of a parameter's weights or of a moment of it, flat."""
        stop = self.shapes[name].numel() if stop is None else stop
        parts = []
        for piece in self.layout[name]:
            first, last = max(start, piece.offset), min(stop, piece.offset + piece.numel)
            if first < last:
                begin = piece.start + first - piece.offset
                parts.append(self._flat(piece, what)[begin : begin + last - first])
        read = torch.cat(parts) if parts else torch.empty(0)
        assert read.numel() == stop - start, f"{name}: {read.numel()} of {stop - start} elements are in the shards"
        return read

    def moments(self, name: str) -> list[str]:
        """Return the names of what the optimizer keeps for each element of a parameter; none before its first step."""
        return [
            key for key, value in self._state(self.layout[name][0]).items() if torch.is_tensor(value) and value.ndim
        ]

    def step(self, name: str) -> Tensor | None:
        """Return the number of steps that the optimizer has taken with a parameter."""
        return self._state(self.layout[name][0]).get(STEP)

    def weights(self) -> dict[str, Tensor]:
        """Return all that the checkpoint holds of the model, parameters in fp32, under the names of the model."""
        found = {name: self.read(name).reshape(shape) for name, shape in self.shapes.items()}
        aliases = {name: found[owner] for name, owner in (self.model["shared_params"] or {}).items()}
        saved = {name: value for name, value in self.model["module"].items() if name not in self.shapes}
        if not self.ranks:
            saved = {name: value.float() if value.is_floating_point() else value for name, value in saved.items()}
        return {name.removeprefix("model."): value for name, value in {**saved, **aliases, **found}.items()}

    def _flat(self, piece: Piece, what: str) -> Tensor:
        rank = self.ranks[piece.rank]
        return (rank[self.flats][piece.flat] if what == WEIGHTS else self._state(piece)[what]).detach()

    def _state(self, piece: Piece) -> dict[str, Any]:
        return self.ranks[piece.rank][self.state]["state"].get(piece.flat, {})


def _by_rank(folder: Path, kind: str) -> list[Path]:
    """Return the files of a kind in the order of ranks: `zero_pp_rank_10_...` comes after `zero_pp_rank_9_...`."""
    return sorted(folder.glob(f"*_{kind}.pt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])


def _load(file: Path) -> dict[str, Any]:
    # A pickle with classes of DeepSpeed in it, hence not weights_only: it is this run's own file, checked by its hash.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
