"""A checkpoint's weights in fp32, as safetensors, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from .checkpoint import SHARDS, checkpoint_name, damage, find_checkpoint, list_checkpoints, load_state
from .shards import Shards
from .world import World


class Written(NamedTuple):
    tensors: int
    parameters: int


def choose_checkpoint(run_dir: Path, *, step: int | None = None) -> Path:
    """Return the newest whole checkpoint of a run, or the whole one after `step`; ValueError where there is none."""
    folder = run_dir / "checkpoints"
    there = ", ".join(str(int(path.name[5:])) for path in reversed(list_checkpoints(folder))) or "none"
    if step is None:
        found = find_checkpoint(folder, world=World(0, 1, torch.device("cpu")))
        if found is None:
            raise ValueError(f"{folder}: no whole checkpoint to export (steps there: {there}); is this a run's folder?")
        return found
    found = folder / checkpoint_name(step)
    if not found.is_dir():
        raise ValueError(f"{folder}: no checkpoint of step {step}; --step can be one of: {there}")
    if problem := damage(found):
        raise ValueError(f"{found}: torn checkpoint ({problem}); choose another --step of: {there}")
    return found


def write_weights(checkpoint: Path, out: Path) -> Written:
    """Write what a checkpoint holds of the model into the file `out`, or into a folder in files of 5 GB at most."""
    weights = Shards(checkpoint / SHARDS).weights()
    state = load_state(checkpoint)
    metadata = {"format": "pt", "step": str(state.step), "stage": str(state.config.get("stage", ""))}
    if out.suffix == ".safetensors":
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}, out, metadata
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(weights, out, metadata=metadata)
    return Written(len(weights), sum(value.numel() for value in weights.values()))
