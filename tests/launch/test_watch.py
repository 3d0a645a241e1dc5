"""The ranks of one machine: each hears of a request to stop once, and one that a signal ends is known everywhere."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seedling.launch.placement import JOB_MODULE, Placement
from seedling.launch.ranks import end_recorded, ends, explain, failures
from seedling.launch.watch import Watch, rank_pids

# DeepSpeed's launcher is slow to start its ranks: these, numbers 2 and 3, come when there is a file `go`.
LAUNCHER = f"""
import pathlib, subprocess, sys, time
while not pathlib.Path("go").exists(): time.sleep(0.05)
ranks = [subprocess.Popen([sys.executable, "-c", sys.argv[1], str(rank), "-m", "{JOB_MODULE}"]) for rank in (2, 3)]
for rank in ranks: rank.wait()
time.sleep(3600)
"""
RANK = """
import pathlib, signal, sys, time
from seedling.launch.lifetime import end_with_parent
from seedling.launch.ranks import end_recorded
end_with_parent()
def stop(*_):
    with open(f"stops{sys.argv[1]}", "a") as file: file.write("x")
signal.signal(signal.SIGTERM, stop)
with end_recorded(pathlib.Path("logs"), int(sys.argv[1])):
    pathlib.Path(f"ready{sys.argv[1]}").touch()
    time.sleep(3600)
"""
SECOND_OF_TWO = Placement(nproc=2, nnodes=2, node_rank=1, master_addr="10.0.0.1", master_port=29500)


def wait_until(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK])
    yield process
    process.kill()
    process.wait()


def begin() -> None:
    """Let the ranks begin."""
    Path("go").touch()
    wait_until(lambda: Path("ready2").exists() and Path("ready3").exists())


def stops() -> list[str]:
    return [file.read_text() if (file := Path(f"stops{rank}")).exists() else "" for rank in (2, 3)]


def test_a_request_to_stop_that_comes_before_the_ranks_reaches_each_of_them_once(launcher):
    watch = Watch(SECOND_OF_TWO, Path("logs"))
    watch.stop(launcher.pid, signal.SIGTERM)
    watch.look(launcher.pid, True)
    assert launcher.poll() is None  # killed now it could leave ranks behind
    begin()
    for _ in range(3):
        watch.look(launcher.pid, True)
    wait_until(lambda: stops() == ["x", "x"])
    watch.look(launcher.pid, True)
    watch.stop(launcher.pid, signal.SIGTERM)  # another request
    wait_until(lambda: stops() == ["xx", "xx"])
    assert not failures(Path("logs"), before=watch.before)


def test_over_ssh_too_a_request_that_comes_before_the_ranks_reaches_each_of_them_once(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def asked() -> list[str]:
        calls = tmp_path / "calls"
        return sorted(line.split()[2] for line in calls.read_text().splitlines()) if calls.exists() else []

    watch = Watch(Placement(hostfile=str(tmp_path / "hosts")), tmp_path)
    watch.stop(0, signal.SIGTERM)
    watch.look(0, True)
    assert asked() == []
    with end_recorded(tmp_path, 1):
        watch.look(0, True)
        assert asked() == ["b"]
        with end_recorded(tmp_path, 0):
            for _ in range(2):
                watch.look(0, True)
            assert asked() == ["a", "b"]
            watch.stop(0, signal.SIGTERM)
            assert asked() == ["a", "a", "b", "b"]


def test_over_ssh_a_rank_that_a_signal_ends_is_noted_and_the_others_are_ended(tmp_path, monkeypatch):
    """Machines are this one. What is left of a lost rank, its number, may be another's process: it is not signalled."""
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=1\nb slots=1\n")
    Path("ssh").write_text('#!/bin/sh\nfor command; do :; done\necho "$command" >>calls\nexec sh -c "$command"\n')
    Path("ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("seedling.launch.watch.ROLL_CALL_SECONDS", 0.5)
    monkeypatch.setattr("seedling.launch.watch.GRACE_SECONDS", 0.5)
    watch, logs = Watch(Placement(hostfile="hosts"), Path("logs")), Path("logs")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank)]) for rank in (0, 1)]
    try:
        wait_until(lambda: Path("ready0").exists() and Path("ready1").exists())
        ranks[1].kill()
        ranks[1].wait()

        def ended() -> bool:
            watch.look(0, False)
            return ranks[0].poll() is not None

        wait_until(ended)
        assert ranks[0].returncode == -signal.SIGKILL
        (lost,) = failures(logs, before=watch.before)
        assert lost.rank == 1 and lost.code is None and "ended without a word" in lost.error
        assert f"kill -KILL {ranks[1].pid}" not in Path("calls").read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("launcher_ends_first", [False, True])
def test_a_rank_that_a_signal_ends_is_known_to_the_other_machine(launcher, launcher_ends_first):
    logs = Path("logs")
    watch, other = Watch(SECOND_OF_TWO, logs), Watch(SECOND_OF_TWO, logs)
    with end_recorded(logs, 0):  # a rank of the other machine has no process below this launcher
        begin()
        watch.look(launcher.pid, False)
        assert not failures(logs, before=other.before) and watch.failed_at is None
        if launcher_ends_first:
            launcher.kill()
            launcher.wait()
            wait_until(lambda: not rank_pids(launcher.pid))
            watch.end(False)
            assert [each.rank for each in failures(logs, before=other.before)] == [2, 3]
        else:
            (pid,) = [each.pid for each in ends(logs, before=other.before) if each.rank == 3]
            os.kill(pid, signal.SIGKILL)

            def seen() -> bool:  # the process has no command line before it has ended: a look may come between
                watch.look(launcher.pid, False)
                return watch.failed_at is not None

            wait_until(seen)
            assert [each.rank for each in failures(logs, before=other.before)] == [3]


@pytest.mark.parametrize("asked", [True, False])
def test_ranks_that_a_stop_has_ended_are_no_loss_but_siblings_that_deepspeed_stops_hide_none(tmp_path, asked):
    program = (
        "import os, pathlib; from seedling.launch.ranks import end_recorded\n"
        f"with end_recorded(pathlib.Path({str(tmp_path)!r}), 3): os.kill(os.getpid(), 9)\n"
    )
    watch = Watch(SECOND_OF_TWO, tmp_path)
    subprocess.run([sys.executable, "-c", program])
    with pytest.raises(SystemExit), end_recorded(tmp_path, 2):
        sys.exit(75)
    watch.end(asked)
    assert [each.rank for each in failures(tmp_path, before=watch.before)] == ([] if asked else [3])
    code = explain(tmp_path, before=watch.before, code=75 if asked else 247, rank_0_shown=False)
    assert code == (75 if asked else 247)
