"""mwer in real processes: killed, with a worker killed, or shared by two ranks, it ends as the run that nothing
happened to."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny_runs
import torch

STEPS = 10
VALUES = {"ctc_weight": 0.5, "nbest": {"size": 3}, "train": tiny_runs.SFT["train"]}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """10 steps of two micro-batches on 32 utterances: more than an epoch; checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("toy")
    shards = tiny_runs.make_shards(folder / "corpus", tiny_runs.sentences(32, seed=1))
    data = [f"data.train=[{shards}]", "data.augment.speed_probability=0.5"]
    llm = f"inputs.llm={tiny_runs.make_llm(folder / 'llm')}"
    start = tiny_runs.train("sft", folder / "sft", tiny_runs.SFT, *data, llm, "train.max_steps=2")
    return [*data, f"inputs.acllm={start}/artifact", "train.dry_run=false", f"train.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, overrides):
    """The run that nothing happened to."""
    return tiny_runs.train("mwer", tmp_path_factory.mktemp("untouched") / "run", VALUES, *overrides)


def arguments(run_dir, overrides) -> list[str]:
    return tiny_runs.stage_arguments("mwer", run_dir, VALUES, *overrides)


def test_a_run_killed_at_a_random_step_and_started_again_ends_bit_identical(tmp_path, overrides, untouched):
    step, run_dir = random.SystemRandom().randint(5, STEPS - 2), tmp_path / "run"
    tiny_runs.kill_and_go_on(run_dir, arguments(run_dir, overrides), step=step)
    tiny_runs.assert_same_run(run_dir, untouched, steps=STEPS, message=f"killed at step {step}")


def test_a_killed_worker_is_replaced_and_changes_nothing(tmp_path, overrides, untouched):
    run_dir = tmp_path / "run"
    run = tiny_runs.Process(tmp_path / "log", "run", *arguments(run_dir, [*overrides, "generation.workers=1"]))
    run.wait_for_step(run_dir, 3)
    os.kill(worker_of(run.process.pid), signal.SIGKILL)
    assert run.wait() == 0, run.log.read_text()[-3000:]
    assert "generation worker 0" in run.log.read_text()
    tiny_runs.assert_same_run(run_dir, untouched, steps=STEPS, message="a worker was killed")


def worker_of(trainer: int) -> int:
    """Return the process that multiprocessing has spawned below a trainer; the other one only watches semaphores."""
    deadline = time.time() + 600
    while time.time() < deadline:
        children = Path(f"/proc/{trainer}/task/{trainer}/children").read_text().split()
        found = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("there is no worker")


def test_two_processes_equal_one(tmp_path, overrides, untouched):
    run_dir = tmp_path / "run"
    tiny_runs.run_ranks(tmp_path, 2, *arguments(run_dir, overrides))
    two, one = tiny_runs.weights(run_dir), tiny_runs.weights(untouched)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
    for name in ("rl/risk_mean", "rl/wer_expected", "rl/wer_oracle", "rl/zero_spread_frac"):
        one, two = (tiny_runs.curve(folder, name) for folder in (untouched, run_dir))
        assert len(one) == STEPS and two == pytest.approx(one, rel=1e-3), name
