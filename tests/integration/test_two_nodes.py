"""One job on two machines (namespaces with their own addresses), each started by itself, as without ssh.

They meet over the network that the cluster's config names; a request to stop one of them stops both, with a checkpoint
from which they go on; an error on one is what the other one shows as well.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import two_nodes
import yaml

from seedling.stages.runtime.rendezvous import RANK_VARIABLES

TESTS = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.cluster]
PATIENCE = 900  # seconds for what takes twenty on a machine that has nothing else to do
CONFIG = """
stage: toy_stage:ToyStage
run_dir: runs/toy
sleep_seconds: 0.2
train:
  {micro_batch_seconds: 8, global_batch_seconds: 32, max_steps: 60, save_every: 1000, log_every: 1,
   lr: {body: 0.001, head: 0.001}, wandb: {mode: disabled}}
"""


@pytest.fixture(scope="module")
def nodes():
    reason = two_nodes.missing()
    if reason:
        pytest.skip(reason)
    with two_nodes.two_nodes() as nodes:
        yield nodes


@pytest.fixture
def job(nodes, tmp_path):
    """A function that runs `launch` of a config on a machine; what still runs at the end is killed."""
    (tmp_path / "hosts").write_text("".join(f"{node.address} slots=2\n" for node in nodes))
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    toys = [str(TESTS / "launch"), str(TESTS / "stages/runtime")]
    path = os.pathsep.join([*toys, inherited.get("PYTHONPATH", "")])
    environment = {**inherited, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen] = []

    def start(on: int, config: str, *words: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "seedling.launch.cli", "launch", config, "--on", "hostfile"]
        command += ["--hostfile", "hosts", "--max-restarts", "0", *words]
        command += ["cluster.gpus=false", f"cluster.interface={two_nodes.INTERFACE}"]
        with (tmp_path / f"node{on}.log").open("ab") as out:
            process = subprocess.Popen(
                nodes[on].command(*command), cwd=tmp_path, env={**environment, **variables}, stdout=out, stderr=out
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def launch(job):
    """A function that starts a config on both machines, as without ssh."""
    return lambda config: [job(rank, config, "--no_ssh", "--node_rank", str(rank)) for rank in (0, 1)]


def said(folder: Path) -> str:
    return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in sorted(folder.rglob("*.log")))


def ends(processes: list[subprocess.Popen], folder: Path) -> list[int]:
    try:
        return [process.wait(timeout=PATIENCE) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(said(folder)) from None


def steps(folder: Path) -> list[int]:
    """Return the steps in the ledger; a line that is being written is not one yet."""
    file = folder / "runs/toy/ledger.jsonl"
    whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in whole]


def test_a_job_on_two_machines_is_stopped_on_one_of_them_and_goes_on_to_its_end(launch, tmp_path):
    (tmp_path / "toy.yaml").write_text(CONFIG)
    both = launch("toy.yaml")
    deadline = time.monotonic() + PATIENCE
    while len(steps(tmp_path)) < 3:
        assert time.monotonic() < deadline and not any(process.poll() for process in both), said(tmp_path)
        time.sleep(0.2)
    both[1].send_signal(signal.SIGTERM)
    assert ends(both, tmp_path) == [75, 75], said(tmp_path)
    stopped_at = len(steps(tmp_path))
    assert [each.name for each in (tmp_path / "runs/toy/checkpoints").iterdir()] == [f"step_{stopped_at:06d}"]

    assert ends(launch("toy.yaml"), tmp_path) == [0, 0], said(tmp_path)
    assert f"step {stopped_at + 1} of 60" in (tmp_path / "node0.log").read_text()
    assert steps(tmp_path) == list(range(1, 61))
    manifest = json.loads((tmp_path / "runs/toy/artifact/manifest.json").read_text())
    assert manifest["kind"] == "toy_model"
    assert len(list((tmp_path / "runs/toy/logs").glob("rank_*.log"))) == 4


def test_an_error_on_one_machine_ends_both_with_its_traceback_and_its_code(launch, tmp_path):
    (tmp_path / "count.yaml").write_text("stage: toy_stages:Count\nrun_dir: runs/count\nfail: last_rank\n")
    began = time.monotonic()
    both = launch("count.yaml")
    assert ends(both, tmp_path) == [1, 1], said(tmp_path)
    for rank in (0, 1):
        shown = (tmp_path / f"node{rank}.log").read_text()
        assert "RuntimeError: the last rank cannot go on" in shown and "rank 3" in shown, said(tmp_path)
    assert time.monotonic() - began < PATIENCE  # the other ranks would sleep for an hour


def test_a_rank_that_is_killed_on_one_machine_is_a_crash_on_both(launch, tmp_path):
    (tmp_path / "count.yaml").write_text(
        "stage: toy_stages:Count\nrun_dir: runs/count\nfail: stop\nsleep_seconds: 3600\n"
    )
    both = launch("count.yaml")
    deadline = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("runs/count/ready*"))) < 4:
        assert time.monotonic() < deadline and not any(process.poll() for process in both), said(tmp_path)
        time.sleep(0.2)
    os.kill(json.loads((tmp_path / "runs/count/logs/rank_0003.json").read_text())["pid"], signal.SIGKILL)
    assert not {0, 2, 75} & {*ends(both, tmp_path)}, said(tmp_path)
    for rank in (0, 1):
        last = (tmp_path / f"node{rank}.log").read_text()
        assert "rank 3" in last and "ended without a word" in last, said(tmp_path)


@pytest.fixture
def by_ssh(job, nodes, tmp_path):
    """A function that starts a config on both machines by one command, and waits until their ranks sleep."""
    reason = two_nodes.ssh_missing()
    if reason:
        pytest.skip(reason)
    (tmp_path / "ssh").mkdir()
    with two_nodes.reachable_by_ssh(nodes, tmp_path / "ssh") as variables:

        def start(**settings) -> subprocess.Popen:
            config = {"stage": "toy_stages:Count", "run_dir": "runs/count", "fail": "stop", **settings}
            (tmp_path / "count.yaml").write_text(json.dumps(config))
            launcher = job(0, "count.yaml", **variables)
            deadline = time.monotonic() + PATIENCE
            while len(list(tmp_path.glob("runs/count/ready*"))) < 4:
                assert time.monotonic() < deadline and launcher.poll() is None, said(tmp_path)
                time.sleep(0.2)
            return launcher

        yield start


def test_over_ssh_a_rank_that_is_killed_ends_the_job(by_ssh, tmp_path):
    launcher = by_ssh(sleep_seconds=3600)
    os.kill(json.loads((tmp_path / "runs/count/logs/rank_0003.json").read_text())["pid"], signal.SIGKILL)
    assert not {0, 2, 75} & {*ends([launcher], tmp_path)}, said(tmp_path)
    assert "ended without a word" in (tmp_path / "node0.log").read_text(), said(tmp_path)


def test_over_ssh_one_command_starts_and_stops_both_machines(by_ssh, tmp_path):
    text = 'it\'s $(a) "b" [c]'
    launcher = by_ssh(sleep_seconds=600, text=text)
    launcher.send_signal(signal.SIGTERM)
    assert ends([launcher], tmp_path) == [75], said(tmp_path)
    assert len(list(tmp_path.glob("runs/count/stopped*"))) == 4
    assert yaml.safe_load((tmp_path / "runs/count/config.yaml").read_text())["text"] == text
