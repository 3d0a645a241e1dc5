"""Starting other processes: the ranks of a job through DeepSpeed's launcher, and a child whose end is waited for.

A request to stop must reach the ranks, which checkpoint and exit cleanly. DeepSpeed's launcher would pass it to one
rank at a time and kill that rank after 30 s; so the ranks are signalled directly and the launcher is left to notice
that all of them have ended. Children are in a session of their own, since a signal to a whole process group (Slurm's, a
terminal's) would end launchers and data workers too; what they would miss is a SIGKILL to the group, so they end when
their parent does.
"""

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..stages.runtime.rendezvous import RANK_VARIABLES
from ..stages.runtime.signals import EXIT_INTERRUPTED, SAME_REQUEST_SECONDS
from . import remote
from .lifetime import end_with_parent
from .placement import Placement, deepspeed_command
from .ranks import explain
from .variables import FOR_CHILDREN, FOR_RANKS, environment_with
from .watch import Watch, signal_processes

# SIGUSR1 is what Slurm sends before a job's time is up; SIGHUP comes when the terminal closes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 2.0


class Ended(NamedTuple):
    """How a child ended: its exit code (128 + n if signal n ended it), and whether it had been asked to stop."""

    code: int
    asked: bool


def child_environment() -> dict[str, str]:
    """Return the environment for a child that is a job of its own.

    The job that this process may be a rank of is not handed on: the child would listen on the same port.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return environment_with(FOR_CHILDREN, inherited)


def launch_ranks(job_arguments: Sequence[str], *, placement: Placement, run_dir: Path) -> int:
    """Run JOB_MODULE where `placement` says, through DeepSpeed's launcher; return the exit code.

    If a rank fails, on any machine that shares RUN, its error is shown, its exit code returned, and the others ended.
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    watch = Watch(placement, logs)
    command = deepspeed_command(placement, [*job_arguments, "--logs", str(logs)])
    environment = environment_with(FOR_RANKS, child_environment())
    if placement.hostfile:
        environment = remote.environment_for(logs, environment)
    ended = run_child(command, environment=environment, stop=watch.stop, meanwhile=watch.look)
    if not ended.code:
        return 0
    watch.end(ended.asked)
    code = EXIT_INTERRUPTED if ended.asked else ended.code
    return explain(logs, before=watch.before, code=code, rank_0_shown=placement.is_first)


def pass_on(child: int, signum: int) -> None:
    """Hand a request to stop to a child: SIGINT as it is, all others as SIGTERM."""
    signal_processes([child], signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)


def run_child(
    command: Sequence[str],
    *,
    environment: dict[str, str],
    stop: Callable[[int, int], None] = pass_on,
    meanwhile: Callable[[int, bool], None] | None = None,
) -> Ended:
    """Run a command to its end. A request to stop calls `stop(pid, signal)`.

    `meanwhile(pid, asked)` is called every POLL_SECONDS.
    """
    asked: list[int] = []
    # What our parent has us ignore stays so (`nohup`), but for SIGUSR1, which our own children ignore at first.
    heard = [n for n in STOP_SIGNALS if n == signal.SIGUSR1 or signal.getsignal(n) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, lambda signum, _: asked.append(signum)) for signum in heard}
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_begin_child)
        handled, handled_at, called_at = 0, -math.inf, time.monotonic()
        while (code := _end_of(child)) is None:
            now = time.monotonic()
            if len(asked) > handled:
                if now - handled_at > SAME_REQUEST_SECONDS:  # a rank that sees two does not wait for its checkpoint
                    stop(child.pid, asked[-1])
                    handled_at = now
                handled = len(asked)
            if meanwhile is not None and now - called_at > POLL_SECONDS:
                meanwhile(child.pid, bool(asked))
                called_at = now
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    return Ended(code if code >= 0 else 128 - code, bool(asked))


def _begin_child() -> None:
    end_with_parent()
    # Slurm sends it to every process of a job; launchers and data workers, which have no handler, would end.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _end_of(child: subprocess.Popen) -> int | None:
    try:
        return child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None
