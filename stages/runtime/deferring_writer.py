"""Errors of writing a checkpoint, raised once DeepSpeed is through: inside it they would leave other ranks waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...data.whole_file import sync_to_disk


class DeferringWriter:
    """DeepSpeed's checkpoint writer, which notes what could not be written instead of raising it.

    A file is forced to disk where it was written: another node that does so sees to its own memory only.
    """

    def __init__(self, writer: Any):
        self.writer = writer
        self.failures: list[OSError] = []

    def save(self, state_dict: dict, path: str) -> None:
        try:
            self.writer.save(state_dict, path)
            sync_to_disk(Path(path))
        except OSError as error:
            self.failures.append(error)
        except RuntimeError as error:  # torch's writer does not say which error the system gave it
            self.failures.append(OSError(f"{path}: {error}"))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """DeepSpeed has rank 0 make the folder while the others wait for it."""
        try:
            self.writer.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failures.append(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)


@contextlib.contextmanager
def errors_deferred(ds: Any) -> Iterator[None]:
    """Let DeepSpeed's engine `ds` save to the end whatever cannot be written, then raise the first OSError."""
    writer = ds.checkpoint_engine
    ds.checkpoint_engine = deferring = DeferringWriter(writer)
    # Rank 0 would copy two scripts beside the shards, past its writer. `seedling export-checkpoint` does what they do.
    ds._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        ds.checkpoint_engine = writer
        del ds._copy_recovery_script
    if deferring.failures:
        raise deferring.failures[0]
