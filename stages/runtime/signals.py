"""SIGTERM and SIGINT ask the loop to stop after the step; a second one means it."""

from __future__ import annotations

import signal
from typing import Any

# sysexits.h: "temporary failure, try again". Not 0: a pipeline must not take an interrupted stage for a finished one.
EXIT_INTERRUPTED = 75


class Interrupted(SystemExit):
    """A run stopped on request, its checkpoint written. Uncaught, the process ends with EXIT_INTERRUPTED."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT sets `requested`; the second takes its usual course."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _ask(self, *_: Any) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
