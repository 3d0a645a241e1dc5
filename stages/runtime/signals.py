"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask a run to stop; a second one, some seconds later, means it."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

# sysexits.h: "temporary failure, try again". Not 0: a pipeline must not take an interrupted stage for a finished one.
EXIT_INTERRUPTED = 75
# One request can come twice: from who started us and from Slurm, which signals every process of a job; from the shell
# of a terminal that closes, and from the kernel.
SAME_REQUEST_SECONDS = 3.0


class Interrupted(SystemExit):
    """A run stopped on request, its checkpoint written. Uncaught, the process ends with EXIT_INTERRUPTED."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


class StopAgreed(Exception):
    """All ranks know that the run is to stop where it stands; who leads the run writes a checkpoint and leaves."""


class StopRequest:
    """While entered, the first of SIGNALS sets `requested`; one that comes later takes its usual course.

    SIGHUP comes when the terminal closes, SIGUSR1 from Slurm before a job's time is up. These two stay ignored where
    they are: under nohup, and in ranks, which their launcher asks by SIGTERM.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked_at = math.inf
        self.before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.asked_at < math.inf

    def __enter__(self) -> StopRequest:
        ignored = [number for number in self.MAY_BE_IGNORED if signal.getsignal(number) == signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._ask) for number in self.SIGNALS if number not in ignored}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _ask(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self.requested:
            self.asked_at = now
        elif now - self.asked_at > SAME_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
