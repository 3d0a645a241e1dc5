"""A run that makes no progress ends and says where it stood, so that a launcher can start it again.

A collective that one rank never joins, or a file system that does not answer, would hold the others for ever. Each rank
watches itself: as they wait for one another, they all end within seconds of one another.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

# sysexits.h: EX_SOFTWARE. Not 1: whoever reads exit codes can tell a hang from an error.
EXIT_HUNG = 70
# The file system may be what hangs: the stacks get so long to be written.
SECONDS_FOR_STACKS = 10.0


def stacks_file(logs: Path, rank: int) -> Path:
    """Return where a rank that hangs leaves its stacks; the first line says what it was doing."""
    return logs / f"hang_rank_{rank:04d}.txt"


class Watchdog:
    """While entered, ends the process when `timeout` seconds pass without a `beat`; 0 never does.

    RUN/logs/hang_rank_0003.txt then has the stacks of all threads. Time in which the whole process was suspended does
    not count.
    """

    def __init__(self, run_dir: Path, *, rank: int, timeout: float):
        self.file = stacks_file(run_dir / "logs", rank)
        self.rank, self.timeout = rank, timeout
        self.idle, self.doing = 0.0, "starting"
        self.left = threading.Event()

    def beat(self, doing: str) -> None:
        """Say that the run moves on, and what it does next, as `training step 7`."""
        self.idle, self.doing = 0.0, doing

    def __enter__(self) -> Watchdog:
        if self.timeout:
            self.beat(self.doing)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()

    def _watch(self) -> None:
        tick = min(5.0, self.timeout / 10)
        before = time.monotonic()
        while not self.left.wait(tick):
            now = time.monotonic()
            self.idle += min(now - before, 2 * tick)
            before = now
            if self.idle > self.timeout:
                self._end()

    def _end(self) -> None:
        in_any_case = threading.Timer(SECONDS_FOR_STACKS, os._exit, [EXIT_HUNG])
        in_any_case.daemon = True
        in_any_case.start()
        message = f"rank {self.rank}: no progress for {self.timeout:g} s (train.hang_timeout) while {self.doing}"
        print(f"{message}; stacks of all threads: {self.file}", file=sys.stderr, flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        os._exit(EXIT_HUNG)
