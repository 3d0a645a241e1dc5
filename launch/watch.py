"""A job's ranks as the launcher of one machine sees them: one that fails ends the others, and all hear of a stop.

What fails on another machine is seen in RUN/logs (ranks.py). What a signal ends on this one, which can say nothing, is
noted there for the other machines. Over ssh the ranks are below launchers of their own: they can only be signalled,
and asked for now and then.
"""

import os
import signal
import time
from collections.abc import Container, Sequence
from pathlib import Path

from ..stages.runtime.signals import EXIT_INTERRUPTED
from . import remote
from .placement import JOB_MODULE, Placement
from .ranks import Start, ends, ends_of, failures, note_lost, starts

# Ranks that wait for a failed one are ended after this; by themselves they would find out after NCCL's ten minutes.
GRACE_SECONDS = 10.0
# Over ssh it is asked this often whether ranks are there. It costs an ssh for each machine; two answers make a loss.
ROLL_CALL_SECONDS = 30.0


class Watch:
    """Sees to it that a job of which a rank has failed, or which was asked to stop, ends."""

    def __init__(self, placement: Placement, logs: Path):
        self.hostfile, self.here, self.logs = placement.hostfile, placement.here, logs
        self.before = starts(logs)
        self.failed_at: float | None = None
        self.seen: set[int] = set()  # processes of this machine's ranks
        self.told: set[int | Start] = set()  # ranks that know of the last request to stop
        self.roll_call = remote.RollCall(self.hostfile) if self.hostfile else None
        self.called_at = time.monotonic()

    def stop(self, launcher: int, _: int) -> None:
        """Ask all ranks to stop."""
        self.told.clear()
        self._signal_ranks(launcher, signal.SIGTERM, but=self.told)

    def look(self, launcher: int, asked: bool) -> None:
        """End what waits for a failed rank, and a launcher that has no ranks any more."""
        now = time.monotonic()
        running = [] if self.hostfile else rank_pids(launcher)
        self.seen.update(running)
        if asked:  # ranks may have appeared since
            self._signal_ranks(launcher, signal.SIGTERM, but=self.told)
        if self.failed_at is None:
            gone = {pid for pid in self.seen if _is_gone(pid)}
            lost = gone and self._note_lost(asked, pids=gone)
            if failures(self.logs, before=self.before) or lost or (not asked and self._note_absent(now)):
                self.failed_at = now
        if (self.failed_at is not None or asked) and self.seen and not running:
            # All that is left of DeepSpeed's launcher is its own end, which can take long on a busy machine.
            signal_processes([launcher], signal.SIGKILL)
        elif self.failed_at is not None and now - self.failed_at > GRACE_SECONDS:
            self._signal_ranks(launcher, signal.SIGKILL)

    def end(self, asked: bool) -> None:
        """Tell the other machines of ranks that were lost since the last look; the launcher has ended."""
        if not failures(self.logs, before=self.before):
            self._note_lost(asked)

    def _note_lost(self, asked: bool, *, pids: Container[int] | None = None) -> bool:
        """Note those of this machine's ranks (with `pids` if given) that have gone without a word, if there are any."""
        ranks = ends_of(self.logs, self.here, before=self.before)
        if asked and any(rank.code == EXIT_INTERRUPTED for rank in ranks):  # the others had no time to say the same
            return False
        lost = [rank for rank in ranks if rank.code is None and (pids is None or rank.pid in pids)]
        for rank in lost:
            note_lost(self.logs, rank, asked=asked)
        return bool(lost)

    def _note_absent(self, now: float) -> bool:
        """Note the ranks that other machines do not have any more and that have said nothing, if there are any."""
        if self.roll_call is None or now - self.called_at < ROLL_CALL_SECONDS:
            return False
        self.called_at = now
        running = [end for end in ends(self.logs, before=self.before) if end.code is None]
        absent = self.roll_call.call(running)
        for rank in absent:
            note_lost(self.logs, rank, asked=False)
        return bool(absent)

    def _signal_ranks(self, launcher: int, signum: int, *, but: set[int | Start] | None = None) -> None:
        """Signal the ranks, all or those not in `but`, and add these to it."""
        but = set() if but is None else but
        if self.hostfile:
            but |= {end.start for end in failures(self.logs, before=self.before)}  # no process, or another's by now
            running = [end for end in ends(self.logs, before=self.before) if end.code is None and end.start not in but]
            remote.signal_ranks(self.hostfile, running, signum=signum)
            but.update(end.start for end in running)
        else:
            pids = [pid for pid in rank_pids(launcher) if pid not in but]
            signal_processes(pids, signum)
            but.update(pids)


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


def _is_gone(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def signal_processes(pids: Sequence[int], signum: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass
