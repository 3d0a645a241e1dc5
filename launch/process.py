"""Starting other processes: several ranks through DeepSpeed's launcher, and a child whose end is waited for.

A SIGTERM must reach the ranks, which checkpoint and exit cleanly. DeepSpeed's launcher would pass it to one rank at a
time and kill that rank after 30 s, and its outer process (`deepspeed`) does not pass it on at all; so the ranks are
signalled directly and the launchers are left to notice that all of them have ended.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ..stages.runtime.rendezvous import RANK_VARIABLES, free_port

JOB_MODULE = "seedling.launch.job"


class Ended(NamedTuple):
    """How a child ended: its exit code (128 + n if signal n ended it), and whether it had been asked to stop."""

    code: int
    asked: bool


def child_environment() -> dict[str, str]:
    """Return the environment for a child that is a job of its own.

    The current folder is kept off its import path (a checkout has a top-level `kernels` and `data`), output comes line
    by line, and the job that this process may be a rank of is not handed on: the child would listen on the same port.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**inherited, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def launch_ranks(job_arguments: Sequence[str], *, nproc: int) -> int:
    """Run JOB_MODULE on `nproc` ranks of this machine through DeepSpeed's launcher; return the exit code."""
    cores = len(os.sched_getaffinity(0))
    environment = child_environment()
    # Without it every rank would start a thread per core, and R ranks on a CPU would wait for one another.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    # On a CPU the launcher counts one slot per NUMA node; --num_accelerators replaces that count. The host file of a
    # cluster (/job/hostfile) must not turn a local run into a remote one.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "", "--num_accelerators", str(nproc)]
    command += ["--master_port", str(free_port()), "--log_level", "warning", "--no_local_rank"]
    command += ["--module", JOB_MODULE, *job_arguments]
    return run_child(command, environment=environment, signal_ranks=True).code


def run_child(command: Sequence[str], *, environment: dict[str, str], signal_ranks: bool = False) -> Ended:
    """Run a command to its end.

    SIGTERM is passed on: to the child, or with `signal_ranks` to the ranks below it. SIGINT from a terminal reaches the
    whole process group by itself; here it only must not end the wait, so that the child can end in its own way.
    """
    child = subprocess.Popen(command, env=environment)
    asked = []

    def pass_on(signum, frame):
        asked.append(signum)
        for pid in rank_pids(child.pid) if signal_ranks else [child.pid]:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                pass

    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, lambda signum, frame: asked.append(signum))
    try:
        code = child.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    return Ended(code if code >= 0 else 128 - code, bool(asked))


def rank_pids(launcher: int) -> list[int]:
    """Return the processes below a launcher that run JOB_MODULE directly: the ranks, not their data workers."""
    import psutil

    def runs_job(process: psutil.Process) -> bool:
        try:
            command = process.cmdline()
        except psutil.Error:
            return False
        return "-m" in command and command[command.index("-m") + 1 : command.index("-m") + 2] == [JOB_MODULE]

    try:
        below = psutil.Process(launcher).children(recursive=True)
    except psutil.Error:
        return []
    jobs = {process.pid for process in below if runs_job(process)}
    # A forked data worker has its rank's command line, and its rank as parent.
    return [process.pid for process in below if process.pid in jobs and process.ppid() not in jobs]
