"""What a user sees when something is wrong: one line and exit code 2 for the user's mistakes, a traceback for ours.

SEEDLING_DEBUG=1 shows the traceback of everything. A data host that is down is one line too, but nobody's mistake: it
counts as a crash (1), after which launchers start again.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ..data.host import HostDown

PACKAGE = Path(__file__).resolve().parent.parent
CRASH, USER_ERROR, KEYBOARD = 1, 2, 130
USER_MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def report_errors(action: Callable[[], int | None]) -> int:
    """Run `action` and return its exit code; a ValueError or a missing file becomes one line on stderr and 2."""
    try:
        return action() or 0
    except USER_MISTAKES as error:
        if os.environ.get("SEEDLING_DEBUG", "0") not in ("", "0"):
            say(traceback.format_exc().rstrip())
        else:
            say(f"seedling: error: {one_line(error)}{_elsewhere(error)}")
        return exit_code_of(error)
    except KeyboardInterrupt:
        say("seedling: interrupted")
        return KEYBOARD
    except BrokenPipeError:
        # The reader of our output has left (`seedling show ... | head`); Python would complain again while closing
        # stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that an error ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if isinstance(error, USER_MISTAKES) and not isinstance(error, HostDown):
        return USER_ERROR
    return KEYBOARD if isinstance(error, KeyboardInterrupt) else CRASH


def say(text: str) -> None:
    """Write a line to stderr, which may be a file on a full disk: the exit code must come out all the same."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def one_line(error: BaseException) -> str:
    """Return an error's text without line breaks, naming the file for errors of the operating system."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _elsewhere(error: BaseException) -> str:
    """Say how to see more, where the error was raised by a library: its text was not written for this user."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename) if frame is not None else PACKAGE
    below = PACKAGE in file.parents and ".venv" not in file.relative_to(PACKAGE).parts
    return "" if below or isinstance(error, OSError) else f" ({type(error).__name__}; SEEDLING_DEBUG=1 shows where)"
