"""A bounded cache of byte ranges on a local disk, shared by all ranks and workers of a node, least recently used out.

A range is a file, named by a hash of its key and ended by a checksum; its time of change is that of its last use. What
all files take is a number in `total`, changed under a lock (flock: the kernel frees it when its holder is killed).
Room is taken before a byte is written, so the bound holds at every moment. Who writes a `.part` holds a lock on it, so
others know it from that of a process which was killed, wherever that ran: it counts until the next clean-up. Reading
takes no lock: a file appears whole, and if it is gone it is fetched again; so may be all of the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .private_folder import make_private, require_private
from .whole_file import PART

log = logging.getLogger(__name__)

CHECKSUM_BYTES = 4
KEEP = 0.9  # of the bound after making room: listing the files is paid once for a tenth of them


class _Entry(NamedTuple):
    used_ns: int
    size: int
    path: str


class RangeCache:
    """Payloads by key below `folder`, together at most `limit` bytes.

    `private` is where it lies, or a folder above, that must be this user's alone: in a place where anybody may make
    one. It is looked at each time, as what cleans temporary folders may have made room for somebody else's.
    """

    def __init__(self, folder: str | Path, *, limit: int, private: Path | None = None):
        self.folder, self.limit, self.private = Path(folder), limit, private
        self._warned = False
        try:
            for name in ("total", "alone"):
                os.close(self._open(name))
        except OSError as error:
            raise ValueError(
                f"remote.cache_dir: {self.folder} cannot be written ({error.strerror}); name a folder on a local disk"
            ) from error

    def get(self, key: str) -> bytes | None:
        """Return the payload of `key`, None where it is not here (any more) or its checksum is wrong."""
        path = self._path(key)
        try:
            with open(path, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                payload, checksum = handle.read(max(0, size - CHECKSUM_BYTES)), handle.read()
                os.utime(handle.fileno())
        except OSError:
            return None
        if zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "little") == checksum:
            return payload
        self.drop(key)  # half written to disk when the power went
        return None

    def file(self, key: str) -> Path | None:
        """Return the file that begins with the payload of `key` (None as for `get`); mapping it keeps it readable."""
        path = self._path(key)
        try:
            with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as content:
                with memoryview(content) as view, view[:-CHECKSUM_BYTES] as payload:
                    checksum = zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "little")
                whole = content[-CHECKSUM_BYTES:] == checksum
                os.utime(handle.fileno())
        except OSError:
            return None
        except ValueError:  # an empty file cannot be mapped
            whole = False
        if not whole:
            self.drop(key)
        return path if whole else None

    def drop(self, key: str) -> None:
        """Forget the payload of `key`, if there is one."""
        path = self._path(key)
        try:
            with self._total() as total:
                total.value -= _remove(_Entry(0, path.stat().st_size, str(path)))
        except OSError as error:
            log.debug(f"{path}: not there to be dropped ({error})")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process or thread is in here: what all would fetch at once is fetched by one."""
        with open(self._open("alone"), "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def put(self, key: str, payload: bytes) -> None:
        """Keep a payload, having made room. One that is larger than the cache, or finds the disk full, is not kept."""
        path, size = self._path(key), len(payload) + CHECKSUM_BYTES
        if size > self.limit or path.exists():
            return
        # The size is in the name, so that whoever counts while this is written counts all of it.
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.{size}{PART}")
        try:
            with self._total() as total:
                if total.value + size > self.limit:
                    total.value = self._make_room(size)
                if total.value + size > self.limit:
                    return  # others are writing as much as there may be
                path.parent.mkdir(exist_ok=True)  # each time: what cleans temporary folders may have removed it
                descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                total.value += size
            with open(descriptor, "wb") as handle:
                handle.write(payload)
                handle.write(zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "little"))
                handle.flush()
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
        if self.private is not None:
            require_private(self.private)
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    def _open(self, name: str) -> int:
        """Open a file of the folder itself, made where it is not there (any more)."""
        if self.private is not None:
            make_private(self.private)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o600)

    def _make_room(self, size: int) -> int:
        """Remove what was not used for longest until `size` bytes fit; return what is left. Called under the lock."""
        entries = sorted(entry for entry in self._entries() if not _is_left(entry))
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
        with open(self._open("total"), "r+b", buffering=0) as handle:
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
    """Return what a file takes, or will take."""
    if file.name.endswith(PART):
        return _Entry(0, int(file.name.removesuffix(PART).rpartition(".")[2]), file.path)
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return _Entry(stat.st_mtime_ns, stat.st_size, file.path)


def _is_left(entry: _Entry) -> bool:
    """Whether it is the part of a process that is no more; it is then removed. Called under the lock."""
    if not entry.path.endswith(PART):
        return False
    try:
        with open(entry.path, "r+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(entry.path)
    except OSError:  # it is being written, or has just got its name
        return False
    return True


def _remove(entry: _Entry) -> int:
    """Return the bytes that removing it freed."""
    try:
        os.unlink(entry.path)
    except FileNotFoundError:
        return 0
    return entry.size
