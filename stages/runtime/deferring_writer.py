"""Errors of writing a checkpoint, raised once DeepSpeed is through: inside it they would leave other ranks waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class DeferringWriter:
    """DeepSpeed's checkpoint writer, which notes what could not be written instead of raising it."""

    def __init__(self, writer: Any):
        self.writer = writer
        self.failures: list[OSError] = []

    def save(self, state_dict: dict, path: str) -> None:
        try:
            self.writer.save(state_dict, path)
        except OSError as error:
            self.failures.append(error)
        except RuntimeError as error:  # torch's writer does not say which error the system gave it
            self.failures.append(OSError(f"{path}: {error}"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)


@contextlib.contextmanager
def errors_deferred(ds: Any) -> Iterator[None]:
    """Let DeepSpeed's engine `ds` save to the end whatever cannot be written, then raise the first OSError."""
    writer = ds.checkpoint_engine
    ds.checkpoint_engine = deferring = DeferringWriter(writer)
    try:
        yield
    finally:
        ds.checkpoint_engine = writer
    if deferring.failures:
        raise deferring.failures[0]
