"""Byte ranges of files, by position: how an utterance leaves its shard.

One open file per shard, the least recently used closed first. `os.pread` moves no shared file position, so files opened
before a fork may be read by parent and child at once; after pickling (spawned workers) the reader opens its own.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from os import PathLike

from .remote import RemotePath


class PayloadReader:
    """Reads `size` bytes at `offset` of a file. `max_open` bounds the file handles held."""

    def __init__(self, *, max_open: int = 64):
        self.max_open = max_open
        self._handles: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str | PathLike | RemotePath, *, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes. Raises ValueError if the file ends before, OSError if it cannot be opened.

        HostError, a ValueError too, is of a server, and no reading will help.
        """
        if isinstance(path, RemotePath):
            return path.store.read(path, offset=offset, size=size)
        parts, missing, handle = [], size, self._handle(os.fspath(path))
        while missing:
            part = os.pread(handle, missing, offset + size - missing)
            if not part:
                raise ValueError(
                    f"{path}: ends {missing} bytes before byte {offset + size} that its index names; "
                    "copy the file again or index it again"
                )
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _handle(self, path: str) -> int:
        if path in self._handles:
            self._handles.move_to_end(path)
            return self._handles[path]
        handle = self._handles[path] = os.open(path, os.O_RDONLY)
        if len(self._handles) > self.max_open:
            os.close(self._handles.popitem(last=False)[1])
        return handle

    def __getstate__(self) -> dict:
        return {"max_open": self.max_open}

    def __setstate__(self, state: dict) -> None:
        self.__init__(max_open=state["max_open"])

    def __del__(self):
        self.close()
