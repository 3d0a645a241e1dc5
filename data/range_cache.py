"""A bounded cache of byte ranges on a local disk, shared by all ranks and workers of a node, least recently used out.

A range is a file, named by a hash of its key and ended by a checksum; its time of change is that of its last use. What
all files take is a number in `total`, changed under a lock (flock: the kernel frees it when its holder is killed).
Room is taken before a byte is written, so the bound holds at every moment; who is killed leaves a `.part` that counts
until the next clean-up. Reading takes no lock: a file appears whole, and if it is gone it is fetched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .whole_file import PART

log = logging.getLogger(__name__)

CHECKSUM_BYTES = 4
KEEP = 0.9  # of the bound after making room: listing the files is paid once for a tenth of them


class _Entry(NamedTuple):
    used_ns: int
    size: int
    path: str


class RangeCache:
    """Payloads by key below `folder`, together at most `limit` bytes."""

    def __init__(self, folder: str | Path, *, limit: int):
        self.folder, self.limit = Path(folder), limit
        self._warned = False
        self._made: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.folder / "total", os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ValueError(
                f"data.remote.cache_dir: {self.folder} cannot be written ({error.strerror}); name a folder on a local "
                "disk"
            ) from error

    def get(self, key: str) -> bytes | None:
        """Return the payload of `key`, None where it is not here (any more) or its checksum is wrong."""
        path = self._path(key)
        try:
            with open(path, "rb") as handle:
                content = handle.read()
                os.utime(handle.fileno())
        except OSError:
            return None
        payload, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        if zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "little") == checksum:
            return payload
        with self._total() as total:  # half written to disk when the power went
            total.value -= _remove(_Entry(0, len(content), str(path)))
        return None

    def file(self, key: str) -> Path | None:
        """Return the file that begins with the payload of `key` (None as for `get`); mapping it keeps it readable."""
        return self._path(key) if self.get(key) is not None else None

    def put(self, key: str, payload: bytes) -> None:
        """Keep a payload, having made room. One that is larger than the cache, or finds the disk full, is not kept."""
        path, size = self._path(key), len(payload) + CHECKSUM_BYTES
        if size > self.limit or path.exists():
            return
        # The size is in the name, so that whoever counts while this is written counts all of it.
        part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.{size}{PART}")
        try:
            with self._total() as total:
                if total.value + size > self.limit:
                    total.value = self._make_room(size)
                if path.parent.name not in self._made:
                    path.parent.mkdir(exist_ok=True)
                    self._made.add(path.parent.name)
                part.touch(exist_ok=False)
                total.value += size
            with open(part, "wb") as handle:
                handle.write(payload)
                handle.write(zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "little"))
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            if not self._warned:
                self._warned = True
                log.warning(f"{self.folder}: cannot keep what was fetched ({error}); reading goes on without")

    def bytes_used(self) -> int:
        """Return what the files take, by looking at each."""
        return sum(entry.size for entry in self._entries())

    def _path(self, key: str) -> Path:
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    def _make_room(self, size: int) -> int:
        """Remove what was not used for longest until `size` bytes fit; return what is left. Called under the lock."""
        entries = sorted(self._entries())
        used, aim = sum(entry.size for entry in entries), max(0, min(int(KEEP * self.limit), self.limit - size))
        for entry in entries:
            if used <= aim:
                break
            if not entry.path.endswith(PART):
                used -= _remove(entry)
        return used

    def _entries(self) -> Iterator[_Entry]:
        for folder in os.scandir(self.folder):
            if folder.is_dir():
                for file in os.scandir(folder.path):
                    if entry := _entry(file):
                        yield entry

    @contextmanager
    def _total(self) -> Iterator[_Total]:
        # Opened anew each time: a lock belongs to an open file, and one opened before a fork would be shared.
        with open(self.folder / "total", "r+b", buffering=0) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            stored = handle.read(8)
            before = int.from_bytes(stored, "little") if len(stored) == 8 else self.bytes_used()
            total = _Total(before)
            try:
                yield total
            finally:
                os.pwrite(handle.fileno(), max(0, total.value).to_bytes(8, "little"), 0)


class _Total:
    def __init__(self, value: int):
        self.value = value


def _entry(file: os.DirEntry) -> _Entry | None:
    """Return what a file takes; the part of a process that is no more is removed."""
    try:
        stat = file.stat()
        if file.name.endswith(PART):
            process, size = file.name.removesuffix(PART).rsplit(".", 2)[1:]
            if not _alive(int(process.partition("-")[0])):
                os.unlink(file.path)
                return None
            return _Entry(stat.st_mtime_ns, int(size), file.path)
        return _Entry(stat.st_mtime_ns, stat.st_size, file.path)
    except FileNotFoundError:
        return None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(entry: _Entry) -> int:
    """Return the bytes that removing it freed."""
    try:
        os.unlink(entry.path)
    except FileNotFoundError:
        return 0
    return entry.size
