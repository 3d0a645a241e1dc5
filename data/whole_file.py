"""Files that appear under their name only when all of their bytes are on disk, so that a kill leaves no torn ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # suffix of unfinished files; a later run may delete them


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing; it gets its name on leaving without an exception."""
    with written_beside(path) as part, open(part, "wb") as handle:
        yield handle


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield where to write a file instead; it gets its name on leaving without an exception."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        yield part
        sync_to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_to_disk(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write readable JSON."""
    with whole_file(path) as handle:
        handle.write(json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8") + b"\n")


def sync_to_disk(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk: without the latter a power cut may lose a new name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
