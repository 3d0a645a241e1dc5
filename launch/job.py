"""One rank of one stage: what `seedling run` calls and launchers start (`torchrun -m seedling.launch.job STAGE ...`).

Rank 0 writes the resolved config to RUN/config.yaml and holds a lock on the run's folder, since two runs that write the
same checkpoints would destroy both.
"""

import argparse
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from ..stages.runtime.config import Loaded
from ..stages.runtime.signals import Interrupted
from .errors import report_errors
from .lifetime import end_with_parent
from .ranks import end_recorded, keep_output
from .stage_lookup import load_stage_config
from .variables import threads_of

# A job that is started again may find its own lock: NFS keeps that of a lost machine for its lease (90 s on Linux).
LOCK_PATIENCE_SECONDS = 120.0


def run_job(
    name: str,
    config: str | None,
    *,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    patience: float = 0.0,
) -> None:
    """Run one stage on this rank to its artifact; its config as in `load_stage_config`, `patience` as of its lock."""
    from ..stages.runtime.trainer import run_computation, run_training

    stage, loaded = load_stage_config(name, config, overrides=overrides, given=given)
    run = run_computation if hasattr(stage, "run") else run_training
    with owned_run_dir(loaded, patience=patience):
        run(stage(), loaded.config, run_dir=loaded.config.run_dir)


@contextmanager
def owned_run_dir(loaded: Loaded, *, patience: float = 0.0) -> Iterator[None]:
    """On rank 0: make the run's folder, refuse to share it with a run that is alive, and write config.yaml into it.

    The other run has `patience` seconds to end.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    run_dir = Path(loaded.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as lock:
        # The lock is the open file's: data workers, which are forked, would keep it when this process is killed.
        os.register_at_fork(after_in_child=lock.close)
        _take(lock, run_dir, patience=patience)
        (run_dir / "config.yaml").write_text(loaded.to_yaml(), encoding="utf-8")
        yield


def _take(lock: IO[str], run_dir: Path, *, patience: float) -> None:
    """Lock the run's folder and note whose it is now; ValueError if another run still has it after `patience` s."""
    deadline, waits = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.seek(0)
            other = f"{run_dir}: process {lock.read().strip() or 'unknown'} is running here"
        if time.monotonic() >= deadline:
            raise ValueError(f"{other}; wait for its end, or choose another run_dir")
        if not waits:
            print(f"seedling: {other}, or has just died; waiting up to {patience:g} s for its end", file=sys.stderr)
            waits = True
        time.sleep(1)
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `STAGE [--config F] [--logs DIR] [key=value ...]` and run this rank; return the exit code.

    With --logs, which launchers give, what the rank writes and how it ends is kept there (ranks.py), the rank ends
    with its launcher, and it waits for the end of a rank 0 that it replaces.
    """
    parser = argparse.ArgumentParser(prog="seedling.launch.job", description="Run one rank of one stage.")
    parser.add_argument("stage")
    parser.add_argument("--config")
    parser.add_argument("--logs", type=Path)
    arguments, overrides = parser.parse_known_args(argv)
    patience = 0.0 if arguments.logs is None else LOCK_PATIENCE_SECONDS
    rank = int(os.environ.get("RANK", "0"))
    if arguments.logs is not None:
        share_cores()
        end_with_parent()
        keep_output(arguments.logs, rank)

    def run() -> None:
        with end_recorded(arguments.logs, rank) if arguments.logs is not None else nullcontext():
            run_job(arguments.stage, arguments.config, overrides=overrides, patience=patience)

    try:
        code = report_errors(run)
    except Interrupted:
        _leave_world()
        raise
    if code == 0:  # after an error other ranks may never come to leave
        _leave_world()
    return code


def share_cores() -> None:
    """Take this rank's part of its machine's cores, which only the machine knows, unless OMP_NUM_THREADS is set."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))  # DeepSpeed's launcher sets it
    variable = threads_of(max(1, cores))
    os.environ.setdefault(variable.name, variable.value)


def _leave_world() -> None:
    from ..stages.runtime.world import leave_world  # imports torch

    leave_world()


if __name__ == "__main__":
    sys.exit(main())
