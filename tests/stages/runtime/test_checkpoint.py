"""Checkpoints are whole or passed over; a run that was killed ends exactly like one that was not."""

import errno
import json
import os
import random
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked_jobs import ForkedJob
from toy_jobs import load_weights, read_lines
from toy_stage import ToyStage, toy_config

from seedling.stages.runtime import checkpoint
from seedling.stages.runtime.checkpoint import (
    TrainState,
    check_resumable,
    damage,
    find_checkpoint,
    list_checkpoints,
    load_state,
    save_checkpoint,
)
from seedling.stages.runtime.deferring_writer import errors_deferred
from seedling.stages.runtime.signals import EXIT_INTERRUPTED
from seedling.stages.runtime.trainer import run_training
from seedling.stages.runtime.watchdog import EXIT_HUNG
from seedling.stages.runtime.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def write_checkpoint(folder, step, *, keep_last=5):
    def save_shards(staging, tag):
        torch.save({"step": step}, f"{staging}/{tag}.pt")

    return save_checkpoint(folder, TrainState(step=step), save_shards=save_shards, world=ALONE, keep_last=keep_last)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 15, 1_000_000):
        write_checkpoint(tmp_path, step, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_1000000", "step_000015"]
    assert load_state(find_checkpoint(tmp_path, world=ALONE)).step == 1_000_000


@pytest.mark.parametrize("tear", ["truncated", "flipped", "missing", "no manifest", "half a manifest"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path, tear, caplog):
    write_checkpoint(tmp_path, 5)
    torn = write_checkpoint(tmp_path, 10)
    shard, manifest = torn / "shards.pt", torn / "manifest.json"
    content = shard.read_bytes()
    if tear == "truncated":
        shard.write_bytes(content[:-1])
    elif tear == "flipped":
        shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif tear == "missing":
        shard.unlink()
    elif tear == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:40])
    assert find_checkpoint(tmp_path, world=ALONE).name == "step_000005"
    assert "step_000010: torn checkpoint" in caplog.text


def test_a_whole_checkpoint_outlives_torn_ones_of_later_steps(tmp_path, caplog):
    """The run has gone back behind them, so they go, and say so."""
    torn = [write_checkpoint(tmp_path, step, keep_last=3) for step in (150, 200)]
    for path in torn:
        (path / "shards.pt").write_bytes(b"x")
    assert find_checkpoint(tmp_path, world=ALONE) is None
    written = write_checkpoint(tmp_path, 100, keep_last=1)
    assert list_checkpoints(tmp_path) == [written] and find_checkpoint(tmp_path, world=ALONE) == written
    assert "step_000200: torn checkpoint of a later step than 100" in caplog.text


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, caplog):
    """As on NFS, where a file that somebody has open leaves another one in its place."""
    write_checkpoint(tmp_path, 5)

    def refuse(path, *args, **kwargs):
        if Path(path).name == "step_000005":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path, *args, **kwargs)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert write_checkpoint(tmp_path, 10, keep_last=1).is_dir()
    assert "step_000005: an old checkpoint, could not be deleted" in caplog.text


def test_a_checkpoint_that_the_disk_does_not_give_back_is_passed_over_too(tmp_path, monkeypatch, caplog):
    write_checkpoint(tmp_path, 5)
    write_checkpoint(tmp_path, 10)
    plain_open = Path.open

    def refuse(path, *args, **kwargs):
        if path.match("step_000010/shards.pt"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return plain_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert find_checkpoint(tmp_path, world=ALONE).name == "step_000005"
    assert "step_000010: torn checkpoint (shards.pt cannot be read (Input/output error))" in caplog.text


def test_what_killed_runs_left_unfinished_of_any_step_goes_before_more_is_written(tmp_path):
    left = tmp_path / ".step_000034.partial" / "shards"
    left.mkdir(parents=True)
    write_checkpoint(tmp_path, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000030"]


def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path):
    write_checkpoint(tmp_path, 5).rename(tmp_path / ".step_000005.partial")
    assert find_checkpoint(tmp_path, world=ALONE) is None


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, ValueError, r"could not be written \(rank 0: .*No space left.* there: step_000005; make room"),
        (errno.EIO, OSError, "could not be written .*Input/output error"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_nothing_of_itself(tmp_path, number, kind, message):
    write_checkpoint(tmp_path / "checkpoints", 5)

    def fail(staging, tag):
        Path(staging, "half").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match=message):
        save_checkpoint(tmp_path / "checkpoints", TrainState(step=10), save_shards=fail, world=ALONE, keep_last=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000005"]


def test_where_no_file_can_grow_all_ranks_say_so_and_nothing_is_left(tmp_path):
    """The system refuses, on both ranks: torch's writer says that it failed, not why, and nobody may wait for ever."""
    settings = {"width": 128, "train": {"max_steps": 4, "save_every": 2, "zero_stage": 1}}
    job = ForkedJob(tmp_path, {"run": settings}, ranks=2, run="faulty_stage:with_small_files")
    assert job.wait() == [1, 1]
    for rank in (0, 1):
        assert "step_000002: could not be written (rank 0:" in job.output(rank)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_rank_0_does_nothing_of_its_own_while_the_others_wait_for_it(tmp_path):
    """DeepSpeed has it copy two scripts beside the shards: on a full disk that failed there, outside of all that the
    ranks tell one another, and the others waited for ever."""
    settings = {"train": {"max_steps": 4, "save_every": 2, "zero_stage": 1, "hang_timeout": 200}}
    ForkedJob(tmp_path, {"run": settings}, ranks=2, run="faulty_stage:with_no_room_for_copies").finish()
    assert find_checkpoint(tmp_path / "run" / "checkpoints", world=ALONE).name == "step_000004"


class Rank:
    """One of two ranks that are threads."""

    meeting, board = threading.Barrier(2, timeout=600), [None, None]

    def __init__(self, rank: int):
        self.rank, self.size, self.is_main = rank, 2, rank == 0

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier()
        values = list(self.board)
        self.barrier()
        return values

    def barrier(self):
        self.meeting.wait()


def test_a_file_that_one_rank_alone_sees_yet_is_in_the_manifest(tmp_path, monkeypatch):
    """A file system of several nodes may be late to list on one what was written on another."""
    at_once = threading.local()

    def save_shards(staging, tag):
        at_once.name = f"shard{at_once.rank}.pt"
        Path(staging, at_once.name).write_bytes(b"shard")

    def list_own(folder):
        return ["state.json", at_once.name] if at_once.rank == 0 else [at_once.name]

    def run(rank):
        at_once.rank = rank
        return save_checkpoint(tmp_path, TrainState(step=5), save_shards=save_shards, world=Rank(rank), keep_last=1)

    monkeypatch.setattr(checkpoint, "list_files", list_own)
    with ThreadPoolExecutor(2) as ranks:
        written, _ = ranks.map(run, (0, 1))
    files = json.loads((written / "manifest.json").read_text())["files"]
    assert sorted(files) == ["shard0.pt", "shard1.pt", "state.json"] and damage(written) is None


def test_a_file_is_forced_to_disk_by_the_rank_that_wrote_it(tmp_path, monkeypatch):
    """And where the disk refuses only then, that is one of the errors that all ranks hear of."""
    forced = []

    def fsync(descriptor):
        forced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    writer = SimpleNamespace(save=lambda state, path: Path(path).write_bytes(b"shard"))
    engine = SimpleNamespace(checkpoint_engine=writer)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="quota exceeded"), errors_deferred(engine):
        engine.checkpoint_engine.save({}, str(tmp_path / "shard.pt"))
    assert forced == [str(tmp_path / "shard.pt")]


def test_a_folder_that_cannot_be_made_is_said_once_all_ranks_are_through():
    def refuse(path, exist_ok):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    reached = []
    engine = SimpleNamespace(checkpoint_engine=SimpleNamespace(makedirs=refuse))
    with pytest.raises(OSError, match="No space left"), errors_deferred(engine):
        engine.checkpoint_engine.makedirs("folder", exist_ok=True)
        reached.append("the closing barrier")
    assert reached


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_fingerprint": "other"}, "training on data .*start it in another run_dir, or with train.resume=never"),
        (
            {"config": {"train": {"precision": "bf16"}}, "frozen_digests": ["x", "y"]},
            "written with train.precision=autocast, this run uses bf16; set train.precision=autocast, or start it in",
        ),
        ({"zero_stage": 0}, "written with ZeRO stage 2, this run uses 0; set train.zero_stage=2"),
        ({"zero_stage": 1, "frozen_digests": ["x"]}, "frozen weights are not those"),
        ({"world_size": 4, "frozen_digests": ["x"] * 4}, "frozen weights are not those"),
        ({"frozen_digests": ["x", "y"]}, r"frozen weights are not those .*\(an input or the build changed\)"),
        ({"shapes": {"a": [3, 2]}}, r"a has shape \[2, 2\] in it and \[3, 2\] in this run"),
        ({"shapes": {"a": [2, 2], "b": [1]}}, "it has no b, which this run trains"),
        ({"shapes": {"b": [1]}}, "it has no b"),
        ({"shapes": {}}, "it holds a, which this run does not train"),
    ],
)
def test_what_would_not_be_the_same_run_is_refused_with_the_way_out(tmp_path, change, message):
    saved = {"data_fingerprint": "d", "zero_stage": 2, "world_size": 2, "frozen_digests": ["a", "b"]}
    saved |= {"shapes": {"a": [2, 2]}, "config": {"train": {"precision": "autocast"}}}
    with pytest.raises(ValueError, match=message):
        check_resumable(TrainState(**saved), TrainState(**{**saved, **change}), checkpoint=tmp_path)


def test_changed_settings_are_named_and_allowed(tmp_path):
    old = TrainState(config={"train": {"max_steps": 10, "lr": {"a": 1}}})
    new = TrainState(config={"train": {"max_steps": 20, "lr": {"a": 1}}})
    assert check_resumable(old, new, checkpoint=tmp_path) == ["train.max_steps: 10 -> 20"]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_another_model_is_refused_before_anything_is_loaded_naming_the_setting(tmp_path, zero_stage):
    """The first parameter that does not fit, both shapes, and what was changed since."""
    train = {"max_steps": 4, "zero_stage": zero_stage}
    run_training(ToyStage(), toy_config(tmp_path, train=train), run_dir=tmp_path)
    said = r"body\.0\.weight has shape \[16, 16\] in it and \[8, 8\] in this run \(width: 16 -> 8\); set that back, or"
    with pytest.raises(ValueError, match=said):
        run_training(ToyStage(), toy_config(tmp_path, width=8, train=train), run_dir=tmp_path)


def assert_same_run(killed, straight):
    """Bit-identical weights, the same utterances at every step, the same losses in the log."""
    a, b = load_weights(killed), load_weights(straight)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert read_lines(killed / "ledger.jsonl") == read_lines(straight / "ledger.jsonl")
    losses = [
        [(m["step"], m["train/loss"]) for m in read_lines(d / "metrics.jsonl") if "train/loss" in m]
        for d in (killed, straight)
    ]
    # The line after a resume averages over fewer steps; the others must agree.
    assert [x for x in losses[0] if x in losses[1]] and len(losses[0]) == len(losses[1])


def test_a_run_killed_at_a_random_step_ends_bit_identical(tmp_path, job):
    settings = {"sleep_seconds": 0.005, "train": {"max_steps": 24, "save_every": 3, "num_workers": 1}}
    step = random.SystemRandom().randint(4, 16)  # of 24: on a busy machine the kill may come late
    first = job(tmp_path, {"killed": settings})
    first.wait_for_step("killed", step)
    first.kill()
    assert not (tmp_path / "killed" / "artifact").exists()
    second = job(tmp_path, {"killed": settings, "straight": settings}).finish()
    assert "resuming from" in second.output() and "checkpoints/step_0000" in second.output()
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


def test_two_ranks_stopped_by_a_signal_and_then_killed_end_bit_identical(tmp_path, job):
    settings = {"sleep_seconds": 0.005, "train": {"max_steps": 24, "save_every": 3, "zero_stage": 2}}
    first = job(tmp_path, {"killed": settings}, ranks=2)
    first.wait_for_step("killed", 2)
    first.ranks[1].send_signal(signal.SIGTERM)  # one rank only: the other must agree
    assert first.wait() == [EXIT_INTERRUPTED, EXIT_INTERRUPTED], first.output()[-2000:]
    stopped = list_checkpoints(tmp_path / "killed" / "checkpoints")[0]
    stopped_at = load_state(stopped).step
    assert read_lines(tmp_path / "killed" / "ledger.jsonl")[-1]["step"] == stopped_at

    second = job(tmp_path, {"killed": settings}, ranks=2)
    second.wait_for_step("killed", min(18, stopped_at + 5))
    second.kill()
    last = job(tmp_path, {"killed": settings, "straight": settings}, ranks=2).finish()
    assert "resuming from" in last.output()
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_one_rank_that_is_asked_during_an_evaluation_stops_all_in_it(tmp_path, zero_stage):
    settings = {"train": {"max_steps": 4, "eval_every": 2, "save_every": 0, "zero_stage": zero_stage}}
    job = ForkedJob(tmp_path, {"run": settings}, ranks=2, run="faulty_stage:asked_in_evaluation")
    assert job.wait() == [EXIT_INTERRUPTED, EXIT_INTERRUPTED], job.output()[-2000:]
    (stopped,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert load_state(stopped).step == 2 and load_state(stopped).owes_evaluation
    ForkedJob(tmp_path, {"run": settings}, ranks=2).finish()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "valid/dev/loss" in line] == [2, 4]


def test_a_rank_that_does_not_get_as_far_as_training_ends_with_the_others(tmp_path):
    settings = {"train": {"max_steps": 4, "hang_timeout": 5}}
    job = ForkedJob(tmp_path, {"run": settings}, ranks=2, run="faulty_stage:with_a_stuck_build")
    waiting, stuck = job.wait()
    # Whose watchdog looks first is open, and who waits for a peer that has gone ends in an error of its own.
    assert stuck == EXIT_HUNG and waiting in (EXIT_HUNG, 1), job.output()[-2000:]
    assert "no progress for 5 s (train.hang_timeout) while building the model" in job.output(rank=1)


def test_other_data_are_refused_when_resuming(tmp_path):
    run_training(ToyStage(), toy_config(tmp_path, train={"max_steps": 4}), run_dir=tmp_path)
    state = load_state(list_checkpoints(tmp_path / "checkpoints")[0])
    assert state.step == 4
    assert state.samples_seen == sum(len(line["utterances"]) for line in read_lines(tmp_path / "ledger.jsonl"))
    with pytest.raises(ValueError, match=r"written while training on data .* train\.resume=never"):
        run_training(ToyStage(), toy_config(tmp_path, utterances=119, train={"max_steps": 8}), run_dir=tmp_path)
    assert json.loads((tmp_path / "artifact" / "manifest.json").read_text())["facts"]["steps"] == 4
