"""One rank of one stage: what `seedling run` calls and launchers start (`torchrun -m seedling.launch.job STAGE ...`).

Rank 0 writes the resolved config to RUN/config.yaml and holds a lock on the run's folder, since two runs that write the
same checkpoints would destroy both.
"""

import argparse
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..stages.runtime.config import Loaded
from ..stages.runtime.signals import Interrupted
from .errors import report_errors
from .lifetime import end_with_parent
from .ranks import end_recorded, keep_output
from .stage_lookup import load_stage_config


def run_job(
    name: str, config: str | None, *, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> None:
    """Run one stage on this rank to its artifact; its config as in `load_stage_config`."""
    from ..stages.runtime.trainer import run_computation, run_training

    stage, loaded = load_stage_config(name, config, overrides=overrides, given=given)
    run = run_computation if hasattr(stage, "run") else run_training
    with owned_run_dir(loaded):
        run(stage(), loaded.config, run_dir=loaded.config.run_dir)


@contextmanager
def owned_run_dir(loaded: Loaded) -> Iterator[None]:
    """On rank 0: make the run's folder, refuse to share it with a run that is alive, and write config.yaml into it."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    run_dir = Path(loaded.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise ValueError(
                f"{run_dir}: process {owner} is running here; wait for its end, or choose another run_dir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        (run_dir / "config.yaml").write_text(loaded.to_yaml(), encoding="utf-8")
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `STAGE [--config F] [--logs DIR] [key=value ...]` and run this rank; return the exit code.

    With --logs, which launchers give, what the rank writes and how it ends is kept there (ranks.py), and the
    rank ends with its launcher.
    """
    parser = argparse.ArgumentParser(prog="seedling.launch.job", description="Run one rank of one stage.")
    parser.add_argument("stage")
    parser.add_argument("--config")
    parser.add_argument("--logs", type=Path)
    arguments, overrides = parser.parse_known_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    if arguments.logs is not None:
        end_with_parent()
        keep_output(arguments.logs, rank)

    def run() -> None:
        with end_recorded(arguments.logs, rank) if arguments.logs is not None else nullcontext():
            run_job(arguments.stage, arguments.config, overrides=overrides)

    try:
        code = report_errors(run)
    except Interrupted:
        _leave_world()
        raise
    if code == 0:  # after an error other ranks may never come to leave
        _leave_world()
    return code


def _leave_world() -> None:
    from ..stages.runtime.world import leave_world  # imports torch

    leave_world()


if __name__ == "__main__":
    sys.exit(main())
