"""Checkpoints for resuming this run: RUN/checkpoints/step_000500/, whole or absent.

    shards/         DeepSpeed's weights and optimizer state, one file or more per rank
    state.json      step, cursor of the data plan, samples seen, fingerprints: all that is needed to go on
    manifest.json   every file with size and hash; written last, before the folder gets its name

All ranks need to see the same folder (a shared file system on several nodes).
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from .files import describe_files, find_damage, list_files, publish, sync_tree, write_synced
from .world import World

SHARDS = "shards"
# torch's writer fails without saying why; with less than this left, why is clear.
NO_ROOM_BYTES = 50_000_000
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps. `cursor` is the plan's, as JSON; None is the beginning."""

    step: int = 0
    cursor: dict | None = None
    epoch: int = 0
    samples_seen: int = 0
    bad_utterances: int = 0
    nonfinite_steps: int = 0
    owes_evaluation: bool = False  # asked to stop before the evaluation that was due
    best: dict = field(default_factory=dict)  # the best evaluation so far: its step, its metrics, which of them judges
    data_fingerprint: str = ""
    frozen_digests: list[str] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)  # of what was trained, and of buffers
    config: dict = field(default_factory=dict)
    world_size: int = 1
    zero_stage: int = 0


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first; staging folders are not among them."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name)]
    return sorted(found, key=step_of, reverse=True)


def save_checkpoint(
    folder: Path, state: TrainState, *, save_shards: Callable[[str, str], None], world: World, keep_last: int
) -> Path:
    """Write a checkpoint on all ranks together, then delete all but the newest `keep_last` and that of `state.best`."""
    target = folder / checkpoint_name(state.step)
    staging = folder / f".{target.name}.partial"
    on_main = world.is_main
    try:
        _together(world, lambda: _begin(staging) if on_main else None)
        _together(world, lambda: save_shards(str(staging), SHARDS))
        _together(world, lambda: write_synced(staging / "state.json", _as_json(asdict(state))) if on_main else None)
        # A node may not yet list what was written on another one, but its own files it does: all lists are one whole.
        names = sorted(set().union(*_together(world, lambda: list_files(staging))))
        # Each rank hashes its share: one process would need a minute for the shards of a large model.
        shares = _together(world, lambda: describe_files(staging, names[world.rank :: world.size]))
        files = {name: facts for share in shares for name, facts in sorted(share.items())}
        manifest = _as_json({"step": state.step, "files": files})
        _together(world, lambda: _finish(staging, target, manifest) if on_main else None)
    except OSError as error:
        raise _not_written(target, staging, error, world=world) from error
    if on_main:
        _prune(folder, state, keep_last=keep_last)
    world.barrier()
    return target


def _prune(folder: Path, state: TrainState, *, keep_last: int) -> None:
    """Delete what the checkpoint just written makes useless; what cannot be deleted is named and stays.

    Those of later steps are torn: a run goes on from the newest whole one. Left there, they would take the places of
    whole ones, and one that can be read again would have steps that the logs have no more.
    """
    found = list_checkpoints(folder)
    torn = [path for path in found if step_of(path) > state.step]
    best = checkpoint_name(state.best["step"]) if state.best else ""
    old = [path for path in found[len(torn) :][keep_last:] if path.name != best]
    for path in torn:
        log.warning(f"{path}: torn checkpoint of a later step than {state.step}, written now: deleting it")
    for path in torn + old:
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning(f"{path}: an old checkpoint, could not be deleted ({error})")


def _as_json(values: dict) -> str:
    return json.dumps(values, indent=1)


def _begin(staging: Path) -> None:
    """Make room: what a killed run has left unfinished, of this step or another, is of no use to anybody."""
    for left in staging.parent.glob(".step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    staging.mkdir(parents=True)


def _finish(staging: Path, target: Path, manifest: str) -> None:
    write_synced(staging / "manifest.json", manifest)
    sync_tree(staging)
    publish(staging, target)


def _together(world: World, action: Callable[[], T]) -> list[T]:
    """Return what `action` returns on every rank. Where it raises OSError on one, all raise it, none waits for ever."""
    try:
        outcome = action(), None
    except OSError as error:
        outcome = None, (error.errno, f"rank {world.rank}: {error}")
    outcomes = world.gather(outcome)
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise OSError(*failures[0])
    return [result for result, _ in outcomes]


def _not_written(target: Path, staging: Path, error: OSError, *, world: World) -> Exception:
    """Remove what was written and return what to raise: ValueError for a full disk, which a user has to mend."""
    if world.is_main:
        shutil.rmtree(staging, ignore_errors=True)
    world.barrier()
    free = shutil.disk_usage(target.parent.parent).free
    whole = ", ".join(path.name for path in list_checkpoints(target.parent)) or "none"
    message = (
        f"{target}: could not be written ({error.strerror}); {free / 1e9:.2f} GB are free. What was written of it is "
        f"removed, other checkpoints there: {whole}; make room and start again to go on from the newest"
    )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or free < NO_ROOM_BYTES
    return ValueError(message) if full else OSError(error.errno, message)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json cannot be read ({error})"
    return find_damage(checkpoint, files)


def find_checkpoint(folder: Path, *, world: World) -> Path | None:
    """Return the newest whole checkpoint, the same on all ranks; torn ones are named in the log and passed over."""
    chosen = None
    if world.is_main:
        for candidate in list_checkpoints(folder):
            problem = damage(candidate)
            if problem is None:
                chosen = candidate.name
                break
            log.warning(f"{candidate}: torn checkpoint ({problem}); using the one before it")
    chosen = world.gather(chosen)[0]
    return folder / chosen if chosen else None


def damage_seen(checkpoint: Path, *, world: World) -> str | None:
    """Return what rank 0 finds wrong with a checkpoint, or None, on all ranks."""
    return world.gather(damage(checkpoint) if world.is_main else None)[0]


def delete_checkpoints(folder: Path, *, world: World) -> None:
    """Delete all of a run's checkpoints; OSError on all ranks where one cannot be deleted."""

    def delete() -> None:
        for old in list_checkpoints(folder) if world.is_main else []:
            log.warning(f"train.resume=never: deleting {old}")
            shutil.rmtree(old)

    _together(world, delete)


def load_state(checkpoint: Path) -> TrainState:
    return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def check_resumable(state: TrainState, now: TrainState, *, checkpoint: Path) -> list[str]:
    """Raise ValueError where going on would not be the same run; return the settings that changed, which is allowed.

    `now` describes this run: data fingerprint, frozen digests, shapes, world size, ZeRO stage and config.
    """
    changes = changed_keys(state.config, now.config)
    # What is under `train` shapes no model.
    why = "; ".join(change for change in changes if not change.startswith("train.")) or "an input or the build changed"
    away = "start it in another run_dir, or with train.resume=never (which deletes the old checkpoints)"
    if state.data_fingerprint != now.data_fingerprint:
        raise ValueError(
            f"{checkpoint}: written while training on data {state.data_fingerprint[:16]}, this run's data is "
            f"{now.data_fingerprint[:16]} (corpus, labels, plan limits, seed or batch size changed); "
            f"to train on the new data, {away}"
        )
    precisions = [config.get("train", {}).get("precision", "fp32") for config in (state.config, now.config)]
    if (precisions[0] == "bf16") != (precisions[1] == "bf16"):
        raise ValueError(
            f"{checkpoint}: written with train.precision={precisions[0]}, this run uses {precisions[1]}; set "
            f"train.precision={precisions[0]}, or {away}. Only fp32 and autocast go on from one another"
        )
    if bool(state.zero_stage) != bool(now.zero_stage):
        raise ValueError(
            f"{checkpoint}: written with ZeRO stage {state.zero_stage}, this run uses {now.zero_stage}; set "
            f"train.zero_stage={state.zero_stage}, or {away}. Stages 1, 2 and 3 go on from one another"
        )
    optimizers = [config.get("train", {}).get("optimizer", "adamw") for config in (state.config, now.config)]
    if optimizers[0] != optimizers[1]:
        raise ValueError(
            f"{checkpoint}: holds the state of {optimizers[0]}, this run's train.optimizer is {optimizers[1]}; set "
            f"train.optimizer={optimizers[0]}, or {away}"
        )
    if problem := misfit(state.shapes, now.shapes):
        raise ValueError(f"{checkpoint}: {problem} ({why}); set that back, or {away}")
    if _frozen_differ(state, now):
        raise ValueError(
            f"{checkpoint}: the frozen weights are not those that the run started with ({why}); "
            f"set that back, or {away}"
        )
    return changes


def _frozen_differ(state: TrainState, now: TrainState) -> bool:
    """Whether frozen weights are known to differ. Under stage 3 ranks hash their shards, which other ranks cut anew."""
    if 3 not in (state.zero_stage, now.zero_stage):
        return state.frozen_digests[:1] != now.frozen_digests[:1]
    same_cut = (state.world_size, state.zero_stage) == (now.world_size, now.zero_stage)
    return same_cut and state.frozen_digests != now.frozen_digests


def misfit(saved: dict[str, list[int]], now: dict[str, list[int]]) -> str | None:
    """Return the first parameter or buffer that a checkpoint has otherwise than this run; None where all fit."""
    if not saved:
        return None  # written before checkpoints said
    for name in [*now, *saved]:
        if name not in saved:
            return f"it has no {name}, which this run trains"
        if name not in now:
            return f"it holds {name}, which this run does not train"
        if saved[name] != now[name]:
            return f"{name} has shape {saved[name]} in it and {now[name]} in this run"
    return None


def changed_keys(old: dict, new: dict, *, path: str = "") -> list[str]:
    """Return `key: old -> new` for every config value that differs."""
    changes = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_keys(before, after, path=f"{path}{key}.")
        elif before != after:
            changes.append(f"{path}{key}: {before} -> {after}")
    return changes
