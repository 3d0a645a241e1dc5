"""One run in a folder: who starts again waits for the one that it replaces, and a killed rank leaves no lock.

The ranks of a machine share its cores, whoever has started them.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from seedling.launch import job, process
from seedling.launch.cli import main
from seedling.launch.placement import Placement
from seedling.launch.stage_lookup import load_stage_config

NAME = "OMP_NUM_THREADS"

# Rank 0 with a data worker that outlives it; the worker says when it is there, which is after what a fork closes.
HOLDER = """
import os, time
from seedling.launch.job import owned_run_dir
from seedling.launch.stage_lookup import load_stage_config
loaded = load_stage_config("toy_stages:Count", None, overrides=["run_dir=r"])[1]
with owned_run_dir(loaded):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "r").mkdir()
    return tmp_path / "r"


@pytest.fixture
def loaded(run_dir):
    return load_stage_config("toy_stages:Count", None, overrides=["run_dir=r"])[1]


@pytest.fixture
def held(run_dir):
    """The lock of a run elsewhere."""
    with (run_dir / ".lock").open("w+") as lock:
        lock.write("41 on node7")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def test_a_killed_rank_leaves_no_lock_though_its_data_workers_live_on(loaded):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        with job.owned_run_dir(loaded):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_a_run_that_is_alive_is_waited_for_as_long_as_was_said_and_named_once(held, loaded, monkeypatch, capsys):
    with pytest.raises(ValueError, match="r: process 41 on node7 is running here; wait for its end"):
        with job.owned_run_dir(loaded):
            raise AssertionError("not ours")
    assert not capsys.readouterr().err

    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            fcntl.flock(held, fcntl.LOCK_UN)

    # Its own clock: whatever other thread sleeps in this process does not count.
    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with job.owned_run_dir(loaded, patience=60):
        assert Path("r/.lock").read_text().startswith(f"{os.getpid()} on ")
    assert len(pauses) == 3
    shown = capsys.readouterr().err
    assert shown.count("waiting up to 60 s") == shown.count("r: process 41 on node7 is running here") == 1


def test_a_rank_of_a_launcher_waits_and_goes_on_once_the_folder_is_free(held, run_dir):
    command = [sys.executable, "-m", "seedling.launch.job", "toy_stages:Count", "run_dir=r", "--logs", "r/logs"]
    rank = subprocess.Popen([*command, "sleep_seconds=3600"], stdout=subprocess.PIPE, text=True)
    try:
        assert "waiting up to 120 s" in rank.stdout.readline()
        assert not (run_dir / "config.yaml").exists()
        fcntl.flock(held, fcntl.LOCK_UN)
        deadline = time.monotonic() + 600
        while not (run_dir / "config.yaml").exists():
            assert time.monotonic() < deadline and rank.poll() is None
            time.sleep(0.1)
    finally:
        rank.kill()
        rank.communicate()


@pytest.mark.parametrize(
    "environment, threads",
    [({"LOCAL_SIZE": "8"}, "12"), ({"LOCAL_SIZE": "200"}, "1"), ({}, "96"), ({"LOCAL_SIZE": "8", NAME: "5"}, "5")],
)
def test_a_rank_takes_its_part_of_its_own_machines_cores(monkeypatch, environment, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    for name in (NAME, "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = os.environ.get(NAME)
    job.share_cores()
    assert os.environ[NAME] == threads
    if before is None:
        monkeypatch.setenv(NAME, threads)  # so that it is taken back


def test_the_launching_machine_decides_no_threads_of_others(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    monkeypatch.delenv(NAME, raising=False)
    given = []

    def run(command, *, environment, **_) -> process.Ended:
        given.append({**environment})
        return process.Ended(0, False)

    monkeypatch.setattr(process, "run_child", run)
    process.launch_ranks(["sft"], placement=Placement(hostfile=str(tmp_path / "hosts")), run_dir=tmp_path)
    assert NAME not in given[0] and NAME not in Path(given[0]["DS_ENV_FILE"]).read_text()


def test_cores_that_the_clusters_config_names_are_shared_by_the_slots_of_the_host_file(run_dir, capsys):
    Path("hosts").write_text("a slots=8\nb slots=4\n")
    Path("count.yaml").write_text("stage: toy_stages:Count\nrun_dir: r\n")
    arguments = ["launch", "count.yaml", "--on", "hostfile", "--hostfile", "hosts", "--dry-run", "cluster.cpus=16"]
    assert main(arguments) == 0
    assert f"export {NAME}=${{{NAME}:-2}}" in capsys.readouterr().out
