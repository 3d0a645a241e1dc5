"""Children of ours: asked to stop once, by one signal, and gone when their parent is."""

import os
import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import os, pathlib, signal, time
def note(signum, frame):
    with open("got", "a") as file: file.write(f"{signum}\\n")
    if signum == signal.SIGTERM: raise SystemExit(75)
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(signum, note)
pathlib.Path("pid.new").write_text(str(os.getpid())); os.rename("pid.new", "pid")
time.sleep(3600)
"""
PARENT = f"""
import os, sys
from seedling.launch.process import run_child
ended = run_child([sys.executable, "-c", {CHILD!r}], environment=dict(os.environ))
print(*ended)
"""


@pytest.fixture
def parent(tmp_path, request):
    """A process that waits for a child in run_child, both in a process group of their own."""
    command = [*getattr(request, "param", []), sys.executable, "-c", PARENT]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # pytest itself may run under nohup
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True, **heard
    )
    wait_until(lambda: (tmp_path / "pid").exists())
    yield process
    process.kill()
    process.communicate()


def wait_until(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_whole_group_reaches_the_child_once_as_a_request_to_stop(parent, tmp_path, signum):
    os.killpg(parent.pid, signum)
    assert parent.communicate(timeout=600)[0].split() == ["75", "True"]
    assert (tmp_path / "got").read_text().split() == [str(int(signal.SIGTERM))]


@pytest.mark.parametrize("parent", [["nohup"]], indirect=True)
def test_what_a_user_has_it_ignore_stays_ignored(parent, tmp_path):
    os.killpg(parent.pid, signal.SIGHUP)
    time.sleep(1)
    assert not (tmp_path / "got").exists()
    parent.terminate()
    assert parent.communicate(timeout=600)[0].split() == ["75", "True"]


def test_a_parent_that_is_killed_leaves_no_child(parent, tmp_path):
    pid = int((tmp_path / "pid").read_text())
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not running(pid))  # which would live for an hour


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
