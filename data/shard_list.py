"""`shards.npy` in a folder of shards: what is in each of them, in one file, so that nobody has to open them all.

A structured array with a row per shard: its name in the folder, the bytes of the tar and of its index, utterances,
seconds, and the sha256 of the index. It is how shards on a server are found (http knows no folders), and how a corpus
of a million shards is opened at once: the plan needs counts, its fingerprint hashes, and an index is read (and held
against its hash) when its shard's turn comes. Where files were added or changed after it, a folder's own truth holds.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .host import SHARD_LIST, HostError
from .remote import RemotePath
from .whole_file import whole_file

log = logging.getLogger(__name__)

WRITE_IT = "run `seedling index {} --list-only`"


class ShardEntry(NamedTuple):
    """A row of the list."""

    name: str
    tar_bytes: int
    index_bytes: int
    utterances: int
    seconds: float
    digest: bytes  # sha256 of the index file


def entries_dtype(name_bytes: int) -> np.dtype:
    """The row of a list; little-endian everywhere."""
    return np.dtype(
        [
            ("name", f"S{max(name_bytes, 1)}"),
            ("tar_bytes", "<i8"),
            ("index_bytes", "<i8"),
            ("utterances", "<i8"),
            ("seconds", "<f8"),
            ("digest", "V32"),
        ]
    )


def as_array(entries: list[ShardEntry]) -> np.ndarray:
    rows = np.zeros(
        len(entries), dtype=entries_dtype(max((len(os.fsencode(entry.name)) for entry in entries), default=1))
    )
    for row, entry in zip(rows, entries):
        row["name"] = os.fsencode(entry.name)
        for field in entry._fields[1:-1]:
            row[field] = getattr(entry, field)
        row["digest"] = np.void(entry.digest)
    return rows


def write_shard_list(folder: Path, rows: np.ndarray) -> Path:
    """Write the list of a folder, whole or not at all."""
    path = folder / SHARD_LIST
    with whole_file(path) as handle:
        np.save(handle, rows)
    os.utime(path)  # later than the folder's own time, which the renaming set: `_unchanged` goes by it
    return path


def read_shard_list(folder: Path | RemotePath) -> np.ndarray | None:
    """Return the rows of a folder's list; None for a local folder that has none, or one that no longer fits.

    Raises ValueError where a server has none, or where it is not such a list.
    """
    path = folder / SHARD_LIST
    try:
        if isinstance(path, RemotePath):
            rows = path.store.map_array(path)
        else:
            rows = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        if isinstance(path, RemotePath):
            raise ValueError(
                f"{folder}: its server has no {SHARD_LIST} there, which names the shards; `seedling prepare` and "
                "`seedling index FOLDER` write it: upload it with them"
            ) from None
        return None
    except HostError:
        raise
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a list of shards ({error}); {WRITE_IT.format(folder)}") from None
    if rows.dtype.names != entries_dtype(1).names:
        raise ValueError(f"{path}: a list of another version; {WRITE_IT.format(folder)}")
    if isinstance(folder, RemotePath) or _unchanged(folder, rows):
        return rows
    return None


def entry_name(row: np.void) -> str:
    return os.fsdecode(bytes(row["name"]))


def _unchanged(folder: Path, rows: np.ndarray) -> bool:
    """Whether a list still says what is in its local folder. A user is told to renew one that does not."""
    written = (folder / SHARD_LIST).stat().st_mtime_ns
    try:
        if all(below.stat().st_mtime_ns <= written for below in _folders(folder, rows)):
            return True  # no file was added, removed or renamed since
    except FileNotFoundError:
        pass
    listed = {entry_name(row): (int(row["tar_bytes"]), int(row["index_bytes"])) for row in rows}
    if listed == _found(folder):  # a copy of the folder, or one in which other files have changed
        return True
    log.warning(f"{folder / SHARD_LIST} does not fit the shards there and is not used; {WRITE_IT.format(folder)}")
    return False


def _folders(folder: Path, rows: np.ndarray) -> set[Path]:
    below = {os.fsdecode(name.rpartition(b"/")[0]) for name in rows["name"].tolist()}
    return {folder / each for parent in below for each in (parent, *Path(parent).parents)} | {folder}


def _found(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the bytes of each tar below a folder, and of its index (0 without)."""
    sizes = {}
    for place, _, names in os.walk(folder):
        tars = [name for name in names if name.endswith(".tar")]
        below = os.path.relpath(place, folder)
        there = set(names)
        for name in tars:
            index = f"{name[: -len('.tar')]}.index.npy"
            tar_bytes = os.path.getsize(os.path.join(place, name))
            index_bytes = os.path.getsize(os.path.join(place, index)) if index in there else 0
            sizes[os.path.normpath(os.path.join(below, name))] = (tar_bytes, index_bytes)
    return sizes
