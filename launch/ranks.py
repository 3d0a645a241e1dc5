"""What the ranks of a job leave in RUN/logs, so that the first error of all ranks is the one that a user sees.

    rank_0003.log           what rank 3 wrote to stdout and stderr, over all starts of the run
    rank_0003.json          where it runs and how it ended: a RankEnd, code null until it ends
    failed/rank_0003.json   the same again if it failed; a folder of its own, so that looking for failures costs nothing

Ranks that fail after the first one mostly fail because of it: their peer has gone. A rank that a signal ends (out of
memory) can leave no word: its machine's launcher notes it, with a code that stays null. What is of this start of a job
is told from what is of an earlier one by the ranks' starts that were noted before it, not by the time: the clocks of
machines may differ.
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
from ..stages.runtime.watchdog import EXIT_HUNG, stacks_file
from .errors import USER_MISTAKES, exit_code_of, one_line, say

TAIL_LINES = 15
SHOWN = 3  # silent ranks that are shown: when a machine is lost there may be hundreds
SILENT = (
    "ended without a word: a signal did it, from the kernel where memory ran out, or from the launcher once another "
    "rank had failed; or its disk is full"
)


class Start(NamedTuple):
    """One start of one rank; process numbers alone come again, in a pod after each restart."""

    rank: int
    host: str
    pid: int
    started: float


class RankEnd(NamedTuple):
    """How a rank ended: its exit code (None while it runs, or where a signal ended it), when, and what it said.

    Times are seconds since the epoch by its machine's clock.
    """

    rank: int
    host: str
    pid: int
    started: float
    time: float
    code: int | None
    error: str

    @property
    def start(self) -> Start:
        return Start(self.rank, self.host, self.pid, self.started)


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
    now = time.time()
    here = RankEnd(rank, socket.gethostname(), os.getpid(), now, now, None, "")
    _write(_file(logs, rank), here)
    try:
        yield
    except BaseException as error:
        code = exit_code_of(error)
        said = one_line(error) if isinstance(error, USER_MISTAKES) else traceback.format_exc()
        _note(logs, here._replace(code=code, error=said), failed=code not in (0, EXIT_INTERRUPTED))
        raise
    _note(logs, here._replace(code=0), failed=False)


def note_lost(logs: Path, end: RankEnd, *, asked: bool) -> None:
    """Note for all machines that a rank of this one has gone and could not say so itself.

    It hung (its watchdog ends it at once), or a signal ended it: where it had been `asked` to stop, that one.
    """
    if said := _hung(logs, end):
        end = end._replace(code=EXIT_HUNG, error=said)
    elif asked:
        end = end._replace(code=EXIT_INTERRUPTED, error="it was asked to stop, and did not come to a checkpoint")
    else:
        end = end._replace(error=SILENT)
    _note(logs, end, failed=True)


def starts(logs: Path) -> frozenset[Start]:
    """Return all starts of ranks that are noted: before a job begins, those that are not of it."""
    files = [*logs.glob("rank_*.json"), *(logs / "failed").glob("rank_*.json")]
    return frozenset(end.start for file in files if (end := _read(file)))


def failures(logs: Path, *, before: frozenset[Start]) -> list[RankEnd]:
    """Return the ranks that have failed since, the first one first."""
    found = [(file, end) for file in (logs / "failed").glob("rank_*.json") if (end := _read(file))]
    # In the order in which the file system, whose clock is one, got to know of them.
    failed = [(_written(file), end.time, end) for file, end in found if end.start not in before]
    return [end for _, _, end in sorted(failed)]


def ends(logs: Path, *, before: frozenset[Start]) -> list[RankEnd]:
    """Return all ranks started since, in rank order."""
    found = [end for file in sorted(logs.glob("rank_*.json")) if (end := _read(file))]
    return [end for end in found if end.start not in before]


def ends_of(logs: Path, ranks: range, *, before: frozenset[Start]) -> list[RankEnd]:
    """Return those of some ranks that were started since."""
    found = [end for rank in ranks if (end := _read(_file(logs, rank)))]
    return [end for end in found if end.start not in before]


def explain(logs: Path, *, before: frozenset[Start], code: int, rank_0_shown: bool) -> int:
    """Print what ended a job that ended with `code`: the first failing rank's error. Return the exit code it had.

    `rank_0_shown`: what rank 0 said has been shown here; on other machines its error must be too.
    """
    all_ends, failed = ends(logs, before=before), failures(logs, before=before)
    if not failed and any(end.code == EXIT_INTERRUPTED for end in all_ends):
        return EXIT_INTERRUPTED
    silent = [end for end in all_ends if end.code is None]
    if not failed:  # over ssh nobody has looked whether they hung
        failed = [end._replace(code=EXIT_HUNG, error=said) for end in silent if (said := _hung(logs, end))]
    first = failed[0] if failed else None
    if first is not None and first.code is not None:
        code = first.code
        if first.rank or not rank_0_shown:
            say(first.error.rstrip())
        ended = "ended" if code == EXIT_INTERRUPTED else "failed"
        say(f"seedling: {_named(logs, first)} {ended} first, with exit code {code}")
    if first is None or "onnection" in first.error:  # that one may only have lost its peer
        _show_silent(logs, silent, rank_0_shown=rank_0_shown)
    elif first.code is None:
        _show_silent(logs, [end for end in failed if end.code is None], rank_0_shown=rank_0_shown)
    return code


def _show_silent(logs: Path, silent: list[RankEnd], *, rank_0_shown: bool) -> None:
    for end in silent[:SHOWN]:
        log = log_of(logs, end.rank)
        if (end.rank or not rank_0_shown) and log.is_file():
            say("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
        say(f"seedling: {_named(logs, end)} {SILENT}")
    if len(silent) > SHOWN:
        say(f"seedling: and {len(silent) - SHOWN} more ranks, see {logs}")


def _hung(logs: Path, end: RankEnd) -> str:
    """Return what the watchdog of a rank said when it ended it, or ""."""
    stacks = stacks_file(logs, end.rank)
    if not _written(stacks) >= _written(_file(logs, end.rank)) > 0:  # of an earlier start, or none
        return ""
    return next(iter(stacks.read_text(errors="replace").splitlines()), "")


def _named(logs: Path, end: RankEnd) -> str:
    return f"rank {end.rank} (process {end.pid} on {end.host}, {log_of(logs, end.rank)})"


def _file(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank:04d}.json"


def _failed(logs: Path, rank: int) -> Path:
    return logs / "failed" / f"rank_{rank:04d}.json"


def _written(file: Path) -> int:
    """Return when a file was written last, in ns by the file system's clock; 0 if there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _note(logs: Path, end: RankEnd, *, failed: bool) -> None:
    """Write down an end. Where that fails (a full disk), it is said: what ended the rank matters more."""
    end = end._replace(time=time.time())
    try:
        if failed:  # first: it is what all machines look for
            _write(_failed(logs, end.rank), end)
        _write(_file(logs, end.rank), end)
    except OSError as error:
        say(f"seedling: how rank {end.rank} ended could not be written: {one_line(error)}")


def _write(file: Path, end: RankEnd) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")  # another node may be reading
    beside.write_text(json.dumps(end._asdict()), encoding="utf-8")
    os.replace(beside, file)


def _read(file: Path) -> RankEnd | None:
    try:
        return RankEnd(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # TypeError: written by another version
        return None
