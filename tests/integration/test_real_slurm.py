"""A real Slurm on this machine (local_slurm.py): a pipeline is submitted, stopped by its time limit and by a signal,
put back into the queue, and finished, without a hand; a crash is tried again, a cancelled job is not.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import local_slurm
import pytest

from seedling.stages.runtime.rendezvous import RANK_VARIABLES

TESTS = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.cluster]
STEPS = 150
PATIENCE = 900  # seconds for what takes ten on a machine that has nothing else to do
PIPELINE = f"""
name: pipe
run_dir: runs/pipe
steps:
  - name: train
    stage: toy_stage:ToyStage
    set:
      sleep_seconds: 1.0
      train: {{micro_batch_seconds: 8, global_batch_seconds: 16, max_steps: {STEPS}, save_every: 100000,
               lr: {{body: 0.001, head: 0.001}}, wandb: {{mode: disabled}}}}
  - {{name: count, stage: "toy_stages:Count", nproc: 1, set: {{number: 3}}}}
"""


class Queue:
    """Slurm's commands, and what a job has written."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment

    def call(self, *command: str) -> str:
        ended = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def launch(self, config: str, *overrides: str) -> dict[str, str]:
        """Submit; return {name: number} of the jobs, as the command prints them."""
        cluster = ["--on", "slurm", "--cluster", "slurm_cpu", "cluster.slurm.stop_before_seconds=240"]
        printed = self.call(sys.executable, "-m", "seedling.launch.cli", "launch", config, *cluster, *overrides)
        lines = [line.split("\t") for line in printed.splitlines()]
        return {name: number.removeprefix("job ") for name, number, _ in lines}

    def facts(self, number: str) -> dict[str, str]:
        text = self.call("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {PATIENCE} s\n{self.said()}"
            time.sleep(1)

    def wait_for_state(self, number: str, state: str) -> None:
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")

        def reached() -> bool:
            now = self.facts(number)["JobState"]
            assert now == state or now not in ended, f"job {number} is {now}, not {state}\n{self.said()}"
            return now == state

        self.wait(reached, f"{state} of job {number}")

    def steps(self) -> list[int]:
        """Return the steps in the ledger; a line that is being written is not one yet."""
        file = self.folder / "runs/pipe/train/ledger.jsonl"
        whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
        return [json.loads(line)["step"] for line in whole]

    def said(self) -> str:
        files = sorted(self.folder.rglob("logs/*.log"))
        return self.call("squeue") + "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = local_slurm.missing()
    if reason:
        pytest.skip(reason)
    toys = [str(TESTS / "launch"), str(TESTS / "stages/runtime")]
    with local_slurm.running(tmp_path_factory.mktemp("slurm")) as environment:
        ours = {name: value for name, value in environment.items() if name not in RANK_VARIABLES}
        path = os.pathsep.join([*toys, ours.get("PYTHONPATH", "")])
        yield {**ours, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def queue(slurm, tmp_path):
    (tmp_path / "pipe.yaml").write_text(PIPELINE)
    (tmp_path / "count.yaml").write_text("stage: toy_stages:Count\nrun_dir: runs/count\n")
    yield Queue(tmp_path, slurm)
    subprocess.run(["scancel", "--user=root"], env=slurm)


def test_a_pipeline_goes_on_after_its_time_limit_and_a_request_and_ends(queue):
    jobs = queue.launch("pipe.yaml")
    train, count = jobs["train"], jobs["count"]
    queue.wait(lambda: len(queue.steps()) >= 3, "third step")
    # Slurm itself now finds that the time is nearly up: it signals 240 s before the end, which is in five minutes.
    elapsed = queue.facts(train)["RunTime"].split(":")
    queue.call("scontrol", "update", f"JobId={train}", f"TimeLimit={int(elapsed[0][-2:]) * 60 + int(elapsed[1]) + 5}")
    queue.wait(lambda: queue.facts(train)["Restarts"] == "1", "requeue at the time limit")
    queue.call("scontrol", "update", f"JobId={train}", "TimeLimit=60")
    assert queue.facts(count)["JobState"] == "PENDING"
    first = queue.steps()[-1]
    assert (queue.folder / f"runs/pipe/train/checkpoints/step_{first:06d}").is_dir()

    queue.wait(lambda: queue.steps()[-1] > first + 3, "step after the requeue")
    queue.call("scancel", "--batch", "--signal=USR1", train)
    queue.wait(lambda: queue.facts(train)["Restarts"] == "2", "requeue after a signal")
    second = queue.steps()[-1]
    queue.wait_for_state(train, "COMPLETED")
    queue.wait_for_state(count, "COMPLETED")

    assert queue.steps() == list(range(1, STEPS + 1))
    log = (queue.folder / f"runs/pipe/logs/slurm_train_{train}.log").read_text()
    assert log.count("the time is up (exit code 75)") == 2
    assert [f"step {step + 1} of {STEPS}" in log for step in (first, second)] == [True, True]
    summary = json.loads((queue.folder / "runs/pipe/summary.json").read_text())
    assert list(summary["stages"]) == ["train", "count"] and summary["stages"]["count"]["number"] == 3


def test_a_crash_is_tried_again_as_often_as_was_said_and_a_mistake_is_not(queue):
    number = queue.launch("count.yaml", "--max-restarts", "1", "fail=bug")["count"]
    queue.wait_for_state(number, "FAILED")
    facts = queue.facts(number)
    assert (facts["Restarts"], facts["ExitCode"]) == ("1", "1:0")
    log = (queue.folder / f"runs/count/logs/slurm_count_{number}.log").read_text()
    assert log.count("RuntimeError: a bug") >= 2 and "restart 1 of 1" in log and "no restart is left" in log

    number = queue.launch("count.yaml", "--max-restarts", "1", "fail=mistake")["count"]
    queue.wait_for_state(number, "FAILED")
    facts = queue.facts(number)
    assert (facts["Restarts"], facts["ExitCode"]) == ("0", "2:0")


def test_a_cancelled_job_stays_cancelled(queue):
    number = queue.launch("count.yaml", "fail=stop", "sleep_seconds=600")["count"]
    queue.wait(lambda: len(list(queue.folder.glob("runs/count/ready*"))) == 2, "both ranks")
    queue.call("scancel", number)
    queue.wait_for_state(number, "CANCELLED")
    assert queue.facts(number)["Restarts"] == "0"
