"""A process without progress ends and leaves its stacks; one that moves on, slowly or after a pause, does not."""

import os
import signal
import subprocess
import sys
import time

SCRIPT = """
import sys, time
from pathlib import Path
from seedling.stages.runtime.watchdog import Watchdog

def stuck():
    time.sleep(3600)

with Watchdog(Path(sys.argv[1]), rank=3, timeout=float(sys.argv[2])) as watchdog:
    print("begun", flush=True)
    for step in range(8):
        watchdog.beat(f"training step {step}")
        time.sleep(0.3)
    print("moved", flush=True)
    if sys.argv[3] == "hang":
        stuck()
print("done", flush=True)
"""


def start(tmp_path, timeout, what):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(timeout), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_hang_leaves_its_stacks_and_ends_with_its_own_code(tmp_path):
    process = start(tmp_path, 2, "hang")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 70 and "moved" in out
    assert "rank 3: no progress for 2 s (train.hang_timeout) while training step 7; stacks of all threads:" in err
    stacks = (tmp_path / "logs" / "hang_rank_0003.txt").read_text()
    assert "in stuck" in stacks and "while training step 7" in stacks.splitlines()[0]


def test_what_moves_on_or_was_suspended_is_left_alone(tmp_path):
    """Eight steps take longer than the timeout, and so does the suspension."""
    process = start(tmp_path, 2, "end")
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and out.split() == ["moved", "done"] and not err
    assert not (tmp_path / "logs").exists()


def test_a_timeout_of_zero_waits_for_ever(tmp_path):
    process = start(tmp_path, 0, "end")
    assert process.communicate(timeout=600)[0].split() == ["begun", "moved", "done"]
