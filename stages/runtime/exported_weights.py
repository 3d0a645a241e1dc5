"""A checkpoint's weights in fp32, as safetensors, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ...data.whole_file import sync_to_disk, written_beside
from .checkpoint import SHARDS, checkpoint_name, damage, find_checkpoint, list_checkpoints, load_state, step_of
from .files import sync_tree
from .shards import Shards
from .world import World

EXPORTED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class Written(NamedTuple):
    tensors: int
    parameters: int


def choose_checkpoint(run_dir: Path, *, step: int | None = None) -> Path:
    """Return the newest whole checkpoint of a run, or the whole one after `step`; ValueError where there is none."""
    folder = run_dir / "checkpoints"
    there = ", ".join(str(step_of(path)) for path in reversed(list_checkpoints(folder))) or "none"
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
    """Write what a checkpoint holds of the model into the file `out`, or into a folder in files of 5 GB at most.

    Nothing there changes before all is written: where the disk is full, what was there before stays.
    """
    weights = Shards(checkpoint / SHARDS).weights()
    state = load_state(checkpoint)
    metadata = {"format": "pt", "step": str(state.step), "stage": str(state.config.get("stage", ""))}
    if out.suffix == ".safetensors":
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
        with written_beside(out) as part:
            save_file(whole, part, metadata)
    else:
        _write_folder(weights, out, metadata)
    return Written(len(weights), sum(value.numel() for value in weights.values()))


def _write_folder(weights: dict[str, Tensor], out: Path, metadata: dict[str, str]) -> None:
    part = out / ".partial"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_torch_state_dict(weights, part, metadata=metadata)
        sync_tree(part)
        # Of an earlier export in more files or fewer: a reader would take its index, or its one file, first.
        before = {path.name for path in out.iterdir() if EXPORTED.fullmatch(path.name)}
        written = sorted(path.name for path in part.iterdir())  # the index last
        for name in written:
            (part / name).replace(out / name)
        for name in before.difference(written):
            (out / name).unlink()
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_to_disk(out)
