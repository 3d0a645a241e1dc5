"""The shards of a corpus: paths that are made on use, and what is known of each as arrays.

A million shards are 100 MB as a list on disk, mapped; as Path objects they would be half a gigabyte on every rank.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from .remote import RemotePath
from .shard_list import ShardEntry, as_array, entry_name, read_shard_list


class ShardRows(Protocol):
    """The shards of one path that a user named; `rows` as in shard_list.py."""

    @property
    def rows(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def path(self, number: int) -> Path | RemotePath: ...
    def digest(self, number: int) -> bytes: ...
    def identities(self) -> list[str]: ...


class ListedShards:
    """The shards of a folder with a list: known without opening any of them, checked when they are.

    A single tar on a server is a list of one.
    """

    def __init__(self, folder: Path | RemotePath, rows: np.ndarray):
        self.folder, self.rows = folder, rows

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, number: int) -> Path | RemotePath:
        path = self.folder / entry_name(self.rows[number])
        if isinstance(path, RemotePath):
            return replace(path, version=self.digest(number).hex(), size=int(self.rows["tar_bytes"][number]))
        return path

    def digest(self, number: int) -> bytes:
        return self.rows["digest"][number].tobytes()

    def identities(self) -> list[str]:
        folder = str(self.folder) if isinstance(self.folder, RemotePath) else os.path.realpath(self.folder)
        return [f"{folder}/{name}" for name in map(os.fsdecode, self.rows["name"].tolist())]

    def __getstate__(self) -> dict:
        # What is mapped from a file is mapped again; what came from a server travels along.
        return {"folder": self.folder, "rows": self.rows if isinstance(self.folder, RemotePath) else None}

    def __setstate__(self, state: dict) -> None:
        rows = state["rows"] if state["rows"] is not None else read_shard_list(state["folder"])
        if rows is None:
            raise ValueError(f"{state['folder']}: its list of shards went away while it was in use; start again")
        self.__init__(state["folder"], rows)


class FoundShards:
    """Shards on a disk without a list: `rows` is made of their indexes when it is asked for, and believes them."""

    def __init__(self, tars: Sequence[Path], entry_of: Callable[[Path], ShardEntry]):
        self.tars, self.entry_of = tars, entry_of

    @cached_property
    def rows(self) -> np.ndarray:
        return as_array([self.entry_of(tar) for tar in self.tars])

    def __len__(self) -> int:
        return len(self.tars)

    def path(self, number: int) -> Path:
        return self.tars[number]

    def digest(self, number: int) -> bytes:
        return b""

    def identities(self) -> list[str]:
        return [os.path.realpath(tar) for tar in self.tars]


class ShardPaths(Sequence):
    """The shards of several folders, one after the other."""

    def __init__(self, folders: Sequence[ShardRows]):
        self.folders = folders
        self._stops = list(accumulate(map(len, folders)))

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, number: int) -> Path | RemotePath:
        folder, at = self._place(number)
        return folder.path(at)

    def digest(self, number: int) -> bytes:
        """The sha256 that the index of a shard must have; empty where nothing says so."""
        folder, at = self._place(number)
        return folder.digest(at)

    def column(self, name: str) -> np.ndarray:
        """Return what the lists say of each shard."""
        return np.concatenate([folder.rows[name] for folder in self.folders])

    @property
    def places(self) -> list[Path | RemotePath]:
        """The first shard of each folder."""
        return [folder.path(0) for folder in self.folders if len(folder)]

    def some_twice(self) -> bool:
        """Whether a shard is in it more than once, links resolved."""
        if len(self.folders) == 1 and isinstance(self.folders[0], ListedShards):
            return False
        names = [each for folder in self.folders for each in folder.identities()]
        return len(set(names)) < len(names)

    def _place(self, number: int) -> tuple[ShardRows, int]:
        number = range(len(self))[number]
        folder = bisect_right(self._stops, number)
        return self.folders[folder], number - (self._stops[folder - 1] if folder else 0)
