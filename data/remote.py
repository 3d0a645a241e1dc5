"""Shards on a server: paths that know how they are read, through a cache on a local disk, ahead of need.

A `RemotePath` is to http(s):// and s3:// what a Path is to a folder. What is asked for is looked up in the node's cache
(range_cache.py) and else fetched (host.py). `start` begins to fetch ranges that will be read soon, neighbours of one
shard in one request, and `read` then waits for what is under way; so a loader that knows its plan waits for nothing.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from .host import PIECE, Host, HostError, Patience
from .range_cache import RangeCache

REMOTE = re.compile(r"(https?|s3)://[^/]+/?")
NEIGHBOURS = 64 << 10  # bytes between two ranges that are cheaper to fetch than a second request


@dataclass
class RemoteConfig:
    """How shards on http(s):// and s3:// are read; folders need none of it."""

    # Of all processes of a node. Empty: a folder of yours in the system's temporary one; best on a fast local disk.
    cache_dir: str = ""
    cache_gigabytes: float = 20.0
    read_ahead: int = 32  # micro-batches of a rank whose audio is fetched before they are loaded
    connections: int = 16  # requests under way in each loading process
    tries: int = 8  # with pauses of 0.5 s to 30 s in between: a server may be away for a minute
    timeout_seconds: float = 60.0  # of one try, from the request to its last byte (of 8 MiB at most)

    def __post_init__(self):
        for name, low in (("read_ahead", 0), ("connections", 1), ("tries", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"remote.{name} is {getattr(self, name)}; it must be at least {low}")
        for name in ("cache_gigabytes", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"remote.{name} is {getattr(self, name)}; it must be above 0")


class Range(NamedTuple):
    """Bytes of a file."""

    path: RemotePath
    offset: int
    size: int

    @property
    def stop(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class RemotePath:
    """A file or a folder on a server, with the names that pathlib gives to the parts of a path.

    `version` tells its content from that of an earlier file in its place, as far as is known: the cache keeps both.
    `size` is what the file must have in bytes, 0 where nothing says so.
    """

    url: str
    settings: tuple = field(default=(), compare=False, repr=False)
    version: str = field(default="", compare=False, repr=False)
    size: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        """The file that a folder calls `name`; in a URL some of its characters are spelled otherwise."""
        return replace(self, url=f"{self.url.rstrip('/')}/{name if self.is_s3 else quote(name)}")

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    @property
    def name(self) -> str:
        last = self.url.rsplit("/", 1)[1]
        return last if self.is_s3 else unquote(last)

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    @property
    def parent(self) -> RemotePath:
        return replace(self, url=self.url.rsplit("/", 1)[0], size=0)

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.parent / f"{self.stem}{suffix}"

    @property
    def is_s3(self) -> bool:
        return self.url.startswith("s3:")

    @property
    def config(self) -> RemoteConfig:
        return RemoteConfig(*self.settings)

    @property
    def store(self) -> RemoteStore:
        return _store(self.settings, os.getpid())

    def read_bytes(self) -> bytes:
        return self.store.read_file(self)


def located(path: str | Path | RemotePath, remote: RemoteConfig | None = None) -> Path | RemotePath:
    """Return the path that a config's text means."""
    if isinstance(path, RemotePath):
        return path
    if REMOTE.match(text := str(path)):
        if text.startswith("http") and (more := re.search(r"[?#].*", text)):
            raise ValueError(f"{text}: names of shards would come behind {more[0]}; serve the folder at a plain URL")
        return RemotePath(text.rstrip("/"), astuple(remote or RemoteConfig()))
    if "://" in text:
        raise ValueError(f"{text}: shards are read from folders, http://, https:// and s3://, not from this")
    return Path(path)


def start(ranges: Sequence[Range]) -> None:
    """Begin to fetch ranges that this thread will read; they are kept in memory until `drop`."""
    for store, own in _by_store(ranges):
        store.start(own)


def drop(ranges: Sequence[Range]) -> None:
    """Forget ranges that were started: they have been read, or will not be."""
    for store, own in _by_store(ranges):
        store.drop(own)


def forget(ranges: Sequence[Range]) -> None:
    """Take ranges out of the cache: what was read is not what should be there, and may be when it is fetched again."""
    for store, own in _by_store(ranges):
        for each in own:
            store.cache.drop(_key(each))


def _by_store(ranges: Sequence[Range]) -> Iterable[tuple[RemoteStore, list[Range]]]:
    for settings in {each.path.settings for each in ranges}:
        yield _store(settings, os.getpid()), [each for each in ranges if each.path.settings == settings]


@lru_cache(maxsize=8)
def _store(settings: tuple, process: int) -> RemoteStore:
    # One per process: threads and connections do not survive a fork.
    return RemoteStore(RemoteConfig(*settings))


class _Kept(NamedTuple):
    """A whole file, and the key under which the cache has it where it could be kept."""

    key: str
    content: bytes


class RemoteStore:
    """Reads ranges of remote files for one process. `start` and `read` belong to one thread, its own fetch."""

    def __init__(self, cfg: RemoteConfig):
        patience = Patience(cfg.tries, cfg.timeout_seconds)
        self._hosts = {"http": Host("http", patience), "s3": Host("s3", patience)}
        limit, own = int(cfg.cache_gigabytes * 1e9), Path(tempfile.gettempdir(), f"seedling-{os.getuid()}")
        if cfg.cache_dir:
            self.cache = RangeCache(cfg.cache_dir, limit=limit)
        else:
            self.cache = RangeCache(own / "shards", limit=limit, private=own)
        self._threads = ThreadPoolExecutor(cfg.connections, thread_name_prefix="fetch")
        self._started: dict[RemotePath, dict[Range, Future]] = defaultdict(dict)
        self._files: dict[RemotePath, Future] = {}

    def read(self, path: RemotePath, *, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes. Raises HostError, FileNotFoundError, or OtherFile where they cannot be right.

        What lies within a range that was started is taken from there.
        """
        wanted = Range(path, offset, size)
        for whole, fetch in self._started.get(path, {}).items():
            if whole.offset <= offset and wanted.stop <= whole.stop:
                try:
                    return fetch.result()[whole][offset - whole.offset : wanted.stop - whole.offset]
                except HostError:
                    raise
                except ValueError:  # the shard ends within the request, perhaps not within this range of it
                    break
        return self._fetch([wanted])[wanted]

    def start(self, ranges: Iterable[Range]) -> None:
        fresh = {each for each in ranges if each not in self._started[each.path]}
        for near in together(sorted(fresh)):
            fetch = self._threads.submit(self._fetch, near)
            for each in near:
                self._started[each.path][each] = fetch

    def drop(self, ranges: Iterable[Range]) -> None:
        for each in ranges:
            self._started[each.path].pop(each, None)
            if not self._started[each.path]:
                del self._started[each.path]

    def start_files(self, digests: dict[RemotePath, bytes]) -> None:
        """Begin to fetch whole files, by path the sha256 that each must have; those of the call before are let go."""
        self._files = {path: self._threads.submit(self._file, path, digest) for path, digest in digests.items()}

    def read_file(self, path: RemotePath, *, digest: bytes = b"") -> bytes:
        """Return all bytes of a file with the sha256 `digest` (if given); from the cache where it has this version."""
        return self._started_file(path, digest).content

    def map_array(self, path: RemotePath, *, digest: bytes = b"") -> np.ndarray:
        """Return the array of a .npy file, mapped from the cache. Raises as np.load where it is none."""
        key, content = self._started_file(path, digest)
        kept = self.cache.file(key)
        try:
            return np.load(kept, mmap_mode="r") if kept else _array(content)
        except FileNotFoundError:  # others made room just now
            return _array(content)

    def _started_file(self, path: RemotePath, digest: bytes) -> _Kept:
        started = self._files.pop(path, None)
        return started.result() if started else self._file(path, digest)

    def _file(self, path: RemotePath, digest: bytes) -> _Kept:
        host = self._host(path)
        if path.version:
            key = _file_key(path)
            if (content := self.cache.get(key)) is None:
                content = host.read_file(path.url, digest=digest).content
                self.cache.put(key, content)
            return _Kept(key, content)
        with self.cache.alone():  # all ranks begin with the same list of shards: one of a node fetches it
            path = replace(path, version=host.version(path.url))
            content = self.cache.get(_file_key(path)) if path.version else None
            if content is None:
                content, _, version = host.read_file(path.url, digest=digest)
                path = replace(path, version=version)
                if version:
                    self.cache.put(_file_key(path), content)
            return _Kept(_file_key(path), content)

    def _fetch(self, near: Sequence[Range]) -> dict[Range, bytes]:
        """Return neighbouring ranges of one file: those that the cache lacks by one request."""
        found = {each: self.cache.get(_key(each)) for each in near}
        if missing := [each for each in near if found[each] is None]:
            start, stop = missing[0].offset, max(each.stop for each in missing)
            path = near[0].path
            content = self._host(path).read(path.url, offset=start, size=stop - start, file_size=path.size)
            for each in missing:
                found[each] = content[each.offset - start : each.stop - start]
                self.cache.put(_key(each), found[each])
        return found

    def _host(self, path: RemotePath) -> Host:
        return self._hosts["s3" if path.is_s3 else "http"]


def together(ranges: Sequence[Range]) -> Iterable[list[Range]]:
    """Yield sorted ranges in groups of one file that are fetched at once: near each other and not too long."""
    near: list[Range] = []
    for each in ranges:
        if near and (
            each.path != near[0].path
            or each.offset > max(other.stop for other in near) + NEIGHBOURS
            or each.stop > near[0].offset + PIECE
        ):
            yield near
            near = []
        near.append(each)
    if near:
        yield near


def _array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content))


def _key(wanted: Range) -> str:
    return f"{wanted.path.url}\n{wanted.path.version}\n{wanted.offset}+{wanted.size}"


def _file_key(path: RemotePath) -> str:
    return f"{path.url}\n{path.version}"
