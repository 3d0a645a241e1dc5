"""What the ranks of a job leave in RUN/logs, so that the first error of all ranks is the one that a user sees.

    rank_0003.log           what rank 3 wrote to stdout and stderr, over all starts of the run
    rank_0003.json          where it runs: {"rank", "host", "pid", "time", "code", "error"}, code null until it ends
    failed/rank_0003.json   the same again if it failed; a folder of its own, so that looking for failures costs nothing

Ranks that fail after the first one mostly fail because of it: their peer has gone. A rank that a signal ends (out of
memory, a lost machine) can leave no word; its code stays null.
"""

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..stages.runtime.signals import EXIT_INTERRUPTED
from .errors import USER_ERROR, USER_MISTAKES, one_line

TAIL_LINES = 15
SHOWN = 3  # silent ranks that are shown: when a machine is lost there may be hundreds


class RankEnd(NamedTuple):
    """How a rank ended: its exit code (None while it runs, or where a signal ended it), when, and what it said."""

    rank: int
    host: str
    pid: int
    time: float
    code: int | None
    error: str


def log_of(logs: Path, rank: int) -> Path:
    """Return the file that holds a rank's output."""
    return logs / f"rank_{rank:04d}.log"


def keep_output(logs: Path, rank: int) -> None:
    """From here on, put what this process and its children write into the rank's log; rank 0's is shown as well.

    On a terminal rank 0 is only shown: a progress bar redraws its line, which in a file is a line a second.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with log_of(logs, rank).open("ab", buffering=0) as log:
        log.write(f"== rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}, {socket.gethostname()}\n".encode())
        if rank:
            _write_to(log.fileno())
        elif not sys.stderr.isatty():
            read, write = os.pipe()
            # In a session of its own: a signal to the group must not end it before the rank has said its last words.
            subprocess.Popen(["tee", "-a", str(log_of(logs, rank))], stdin=read, start_new_session=True)
            os.close(read)
            _write_to(write)
            os.close(write)


def _write_to(target: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)


@contextmanager
def end_recorded(logs: Path, rank: int) -> Iterator[None]:
    """Note that this rank runs, and how it ends, whatever ends it, if Python is left the time."""
    (logs / "failed").mkdir(parents=True, exist_ok=True)
    _failed(logs, rank).unlink(missing_ok=True)
    here = RankEnd(rank, socket.gethostname(), os.getpid(), time.time(), None, "")
    _write(logs / f"rank_{rank:04d}.json", here)
    try:
        yield
    except BaseException as error:
        code = _code(error)
        said = one_line(error) if code == USER_ERROR else traceback.format_exc()
        end = here._replace(time=time.time(), code=code, error=said)
        _write(logs / f"rank_{rank:04d}.json", end)
        if code not in (0, EXIT_INTERRUPTED):
            _write(_failed(logs, rank), end)
        raise
    _write(logs / f"rank_{rank:04d}.json", here._replace(time=time.time(), code=0))


def first_failure(logs: Path, *, since: float) -> RankEnd | None:
    """Return the rank that failed first after `since` (seconds since the epoch), or None."""
    ends = [end for file in (logs / "failed").glob("rank_*.json") if (end := _read(file)) and end.time >= since]
    return min(ends, key=lambda end: end.time, default=None)


def ends(logs: Path, *, since: float) -> list[RankEnd]:
    """Return all ranks started after `since`, in rank order."""
    found = [end for file in sorted(logs.glob("rank_*.json")) if (end := _read(file))]
    return [end for end in found if end.time >= since]


def explain(logs: Path, *, since: float, code: int) -> int:
    """Print what ended a job that ended with `code`: the first failing rank's error. Return the exit code it had."""
    first = first_failure(logs, since=since)
    all_ends = ends(logs, since=since)
    if first is None and any(end.code == EXIT_INTERRUPTED for end in all_ends):
        return EXIT_INTERRUPTED
    if first is not None and first.code is not None:
        code = first.code
        if first.rank:  # what rank 0 said has been shown
            print(first.error.rstrip(), file=sys.stderr)
        print(f"seedling: {_named(logs, first)} failed first, with exit code {code}", file=sys.stderr)
    if first is None or "onnection" in first.error:  # that one may only have lost its peer
        _show_silent(logs, [end for end in all_ends if end.code is None])
    return code


def _show_silent(logs: Path, silent: list[RankEnd]) -> None:
    for end in silent[:SHOWN]:
        log = log_of(logs, end.rank)
        if end.rank and log.is_file():
            print(*log.read_text(errors="replace").splitlines()[-TAIL_LINES:], sep="\n", file=sys.stderr)
        print(
            f"seedling: {_named(logs, end)} ended without a word: a signal did it, from the kernel where memory ran "
            "out, or from the launcher once another rank had failed",
            file=sys.stderr,
        )
    if len(silent) > SHOWN:
        print(f"seedling: and {len(silent) - SHOWN} more ranks, see {logs}", file=sys.stderr)


def _named(logs: Path, end: RankEnd) -> str:
    return f"rank {end.rank} (process {end.pid} on {end.host}, {log_of(logs, end.rank)})"


def _failed(logs: Path, rank: int) -> Path:
    return logs / "failed" / f"rank_{rank:04d}.json"


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    return USER_ERROR if isinstance(error, USER_MISTAKES) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _write(file: Path, end: RankEnd) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")  # another node may be reading
    beside.write_text(json.dumps(end._asdict()), encoding="utf-8")
    os.replace(beside, file)


def _read(file: Path) -> RankEnd | None:
    try:
        return RankEnd(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return None
