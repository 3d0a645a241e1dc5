"""Starting a command again after a crash: it goes on from its last whole checkpoint.

Not after its end (0), its user's mistake (2), which it would only make again, or a stop on request (75). Each pause is
twice the one before: what brought it down, a lost machine or a data host that does not answer, often needs a while.
Crashes count in a row. A checkpoint of a later step than all before it ends the row: a job of weeks that loses a
machine every other day gets on, and is neither given up nor kept waiting for it.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...stages.runtime.signals import EXIT_INTERRUPTED
from ..errors import USER_ERROR
from ..process import Ended, run_child

FIRST_PAUSE_SECONDS = 15  # longer than ranks on another machine take to notice (watch.GRACE_SECONDS)
LONGEST_PAUSE_SECONDS = 300


def pause_before(restart: int) -> int:
    """Return the seconds to wait before restart 1, 2, ..."""
    return min(FIRST_PAUSE_SECONDS * 2 ** (restart - 1), LONGEST_PAUSE_SECONDS)


def run_restarting(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    max_restarts: int,
    checkpoints: Sequence[Path] = (),
    run: Callable[..., Ended] = run_child,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run a command, again after each crash; return its last exit code.

    It is given up after `max_restarts` restarts without a new checkpoint in the folders `checkpoints`.
    """
    restart, reached = 0, newest_steps(checkpoints)
    while True:
        ended = run(command, environment=dict(environment))
        if ended.code in (0, USER_ERROR, EXIT_INTERRUPTED) or ended.asked:
            return ended.code
        before, reached = reached, [*map(max, reached, newest_steps(checkpoints))]
        restart = restart + 1 if reached == before else 1
        if restart > max_restarts:
            print(
                f"seedling: crashed with exit code {ended.code}; no restart is left of {max_restarts}", file=sys.stderr
            )
            return ended.code
        pause = pause_before(restart)
        print(
            f"seedling: crashed with exit code {ended.code}; restart {restart} of {max_restarts} in {pause} s",
            file=sys.stderr,
        )
        sleep(pause)


def newest_steps(checkpoints: Sequence[Path]) -> list[int]:
    """Return the step of the newest checkpoint in each folder, 0 where there is none."""
    from ...stages.runtime.checkpoint import list_checkpoints, step_of

    return [max(map(step_of, list_checkpoints(folder)), default=0) for folder in checkpoints]
