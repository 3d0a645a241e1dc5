"""A checkpoint of any number of ranks and ZeRO stage, loaded into an engine of another one.

Each rank reads its own pieces out of the old shards: no conversion on disk, nobody to wait for. DeepSpeed's own way,
its universal checkpoint, has one rank write every tensor into a file of its own; its loader leaves buffers out, gives
all parameter groups the settings of the first under stage 3, and fails under stages 1 and 2 where a rank holds nothing
of a small group (docs/log.md). Its converter is the reference in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shards import BY_GROUP, BY_PARAMETER, STEP, Layout, Shards, layout_by_group, layout_by_parameter, plain_slices
from .world import World


def load_recut(ds: Any, shards: Shards, *, world: World) -> None:
    """Load weights, optimizer state, buffers and counters into DeepSpeed's engine `ds`, on all ranks together."""
    optimizer = ds.optimizer
    by_parameter = ds.zero_optimization_stage() == 3
    if by_parameter:
        optimizer.checkpoint_event_prologue()
    state = optimizer.state_dict()  # of the right form: what it holds is replaced
    layout = current_layout(ds, state, world=world)
    flats_key, state_key = BY_PARAMETER if by_parameter else BY_GROUP
    vectors = state[flats_key] if by_parameter else [group["params"][0] for group in optimizer.optimizer.param_groups]
    flats, states = cut(shards, layout, rank=world.rank, like=vectors)
    state[flats_key] = flats
    state[state_key] = {**state[state_key], "state": states}
    others: list[Any] = [None] * world.size
    others[world.rank] = state
    optimizer.load_state_dict(others, load_from_fp32_weights=True)
    load_buffers(ds.module, shards.model["module"])
    if by_parameter:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    ds.global_steps, ds.skipped_steps = shards.model["global_steps"], shards.model["skipped_steps"]
    ds.global_samples = shards.model["global_samples"]


def current_layout(ds: Any, state: dict[str, Any], *, world: World) -> Layout:
    """Return where this run's ranks keep each parameter."""
    if ds.zero_optimization_stage() < 3:
        return layout_by_group(world.gather(plain_slices(state)))
    groups = ds.optimizer.fp16_groups
    shapes = [{ds.param_names[parameter]: parameter.ds_shape for parameter in group} for group in groups]
    return layout_by_parameter(shapes, ranks=world.size)


def cut(
    shards: Shards, layout: Layout, *, rank: int, like: list[Tensor]
) -> tuple[list[Tensor], dict[int, dict[str, Tensor]]]:
    """Return this rank's flat weights, each as long as the vector of `like`, and the optimizer's state of each."""
    flats = [torch.zeros(vector.numel()) for vector in like]
    states: dict[int, dict[str, Tensor]] = {}
    for name, pieces in layout.items():
        # A rank that holds nothing of a group steps its padding all the same, so it needs the state as well.
        for flat in {piece.flat for piece in pieces}:
            if (step := shards.step(name)) is not None and flat not in states:
                moments = {key: torch.zeros_like(flats[flat]) for key in shards.moments(name)}
                states[flat] = {STEP: step.clone(), **moments}
        for piece in pieces:
            if piece.rank != rank or not piece.numel:
                continue
            here, there = slice(piece.start, piece.start + piece.numel), (piece.offset, piece.offset + piece.numel)
            flats[piece.flat][here] = shards.read(name, start=there[0], stop=there[1])
            for key in states.get(piece.flat, {}).keys() - {STEP}:
                states[piece.flat][key][here] = shards.read(name, key, start=there[0], stop=there[1])
    return flats, states


@torch.no_grad()
def load_buffers(module: torch.nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy what is no parameter; parameters come from the fp32 weights."""
    for name, buffer in module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])
