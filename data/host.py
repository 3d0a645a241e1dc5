"""Bytes of files on a server, http(s) or s3, through fsspec: by range, tried again where that can help, ended clearly.

A try has a deadline from the request to the last byte, so a server that trickles is as bad as a silent one. Overload,
timeouts, broken connections and short answers are tried again after a growing, jittered pause; what another try cannot
change is said at once. Ranges above PIECE are read in pieces: a torn connection costs one piece, not a shard.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

SHARD_LIST = "shards.npy"  # in a folder of shards: what is in it (shard_list.py)
PIECE = 8 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
TRANSIENT_STATUS = (408, 425, 429)  # and all from 500


class HostError(ValueError):
    """A server that cannot be read from: whatever else is asked of it will fail too, so it ends the run."""


class HostDown(HostError):
    """A server that has not answered, however often it was asked; some time later it may."""


class BadAnswer(Exception):
    """An answer that is not what was asked for; the next one may be."""


class RangeIgnored(Exception):
    """A server that answers a request for a range with the whole file."""


class Patience(NamedTuple):
    """How often a range is asked for, and how long one answer may take."""

    tries: int = 8
    timeout_s: float = 60.0


def pause_before(attempt: int) -> float:
    """Seconds to wait before try number `attempt` (2, 3, ...): doubled each time, and jittered by half."""
    # Without jitter all ranks of a job would come back at the same moment to a server that was overloaded.
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 2)) * random.uniform(0.5, 1.5)


class Host:
    """Reads files of one protocol. Usable from several threads, and after a fork: each process opens its own."""

    def __init__(self, protocol: str, patience: Patience):
        self.protocol, self.patience = protocol, patience
        self._filesystem: Any = None
        self._process = 0

    def read(self, url: str, *, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes at `offset`. Raises HostError, FileNotFoundError, or ValueError where it ends."""
        pieces = []
        for start in range(offset, offset + size, PIECE):
            length = min(PIECE, offset + size - start)

            def attempt(start: int = start, length: int = length) -> bytes:
                found = self._cat(url, start=start, end=start + length)
                if len(found) != length:
                    self._cat(url, start=start + length - 1, end=start + length)  # 416: the file has no such byte
                    raise BadAnswer(f"it sent {len(found)} of {length} bytes at {start}")
                return found

            pieces.append(self._patiently(url, attempt))
        return b"".join(pieces)

    def read_file(self, url: str, *, digest: bytes = b"") -> bytes:
        """Return all bytes of a file, those with the sha256 `digest` if given. Raises HostError, FileNotFoundError."""

        def attempt() -> bytes:
            content = self._cat(url)
            if digest and hashlib.sha256(content).digest() != digest:
                raise BadAnswer(
                    f"it sent {len(content)} bytes that are not the file which {SHARD_LIST} lists; `seedling index "
                    "FOLDER --list-only` writes the list anew, to be uploaded with the indexes"
                )
            return content

        return self._patiently(url, attempt)

    def _patiently(self, url: str, attempt: Callable[[], bytes]) -> bytes:
        started, tries = time.monotonic(), self.patience.tries
        for number in range(1, tries + 1):
            try:
                return attempt()
            except Exception as error:
                _raise_if_final(url, error)
                last = error
            if number < tries:
                time.sleep(pause_before(number + 1))
        took = time.monotonic() - started
        raise HostDown(
            f"{url}: no good answer in {tries} tries over {took:.0f} s, the last one: {_said(last)}; see whether its "
            "server is up and reachable from this node, then start again: the run goes on from its last checkpoint"
        ) from last

    def _cat(self, url: str, **bounds: int) -> bytes:
        from fsspec.asyn import sync

        filesystem = self._open(url)

        async def within_time() -> bytes:
            return await asyncio.wait_for(filesystem._cat_file(url, **bounds), self.patience.timeout_s)

        return sync(filesystem.loop, within_time)

    def _open(self, url: str) -> Any:
        if self._process != os.getpid():
            try:
                self._filesystem = _s3() if self.protocol == "s3" else _http()
            except ImportError as error:
                raise HostError(
                    f"{url}: reading from a server needs packages that are not installed ({error.name}); run "
                    "`pip install 'seedling[remote]'`"
                ) from error
            self._process = os.getpid()
        return self._filesystem


def _http() -> Any:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    async def require_range(response: aiohttp.ClientResponse) -> None:
        if "Range" in response.request_info.headers and response.status == 200:
            raise RangeIgnored

    # Proxies and ~/.netrc as other programs use them; the deadline is ours, in `_cat`.
    client = {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None), "raise_for_status": require_range}
    return HTTPFileSystem(client_kwargs=client, skip_instance_cache=True)


def _s3() -> Any:
    from s3fs import S3FileSystem

    # One kind of retry, ours: three layers of them would multiply.
    config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 100}
    filesystem = S3FileSystem(config_kwargs=config, max_concurrency=1, skip_instance_cache=True)
    filesystem.retries = 1
    return filesystem


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, of aiohttp or of botocore."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError):
        return 403
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None)


def _raise_if_final(url: str, error: Exception) -> None:
    """Raise what the reader shall see, unless another try may go better."""
    status = _status(error)
    if isinstance(error, HostError):
        raise error
    if status == 404:
        raise FileNotFoundError(f"{url}: the server has no such file (404)") from error
    if status in (401, 403):
        raise HostError(
            f"{url}: the server does not let this job read it ({status}: {_said(error)}); set its credentials "
            "(~/.netrc for http, AWS_* or ~/.aws for s3, FSSPEC_S3='{\"anon\": true}' for a public bucket)"
        ) from error
    if status == 416:
        raise ValueError(f"{url}: ends before a byte that its index names (416); copy the file again") from error
    if isinstance(error, RangeIgnored):
        raise HostError(
            f"{url}: its server ignores ranges and would send the whole shard for each utterance; serve it with one "
            "that knows them (nginx, caddy, an object store)"
        ) from error
    if status is not None and status < 500 and status not in TRANSIENT_STATUS:
        raise HostError(f"{url}: the server refuses the request ({status}: {_said(error)})") from error
    if status is None and not _may_pass(error):
        raise HostError(f"{url}: {type(error).__name__}: {_said(error)}") from error


def _may_pass(error: Exception) -> bool:
    """Whether an error without a status is of the network and not of the request, its certificates or credentials."""
    # By name: neither library need be installed to read from the other's servers.
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if names & {"aiohttp.ClientConnectorCertificateError", "aiohttp.InvalidURL"}:
        return False
    network = {"aiohttp.ClientError", "botocore.HTTPClientError", "botocore.ConnectionError"}
    return bool(names & network) or isinstance(error, (BadAnswer, OSError, asyncio.TimeoutError))


def _said(error: BaseException) -> str:
    status, said = _status(error), " ".join(str(error).split())
    if not said:
        return "it took too long" if isinstance(error, (TimeoutError, asyncio.TimeoutError)) else type(error).__name__
    return f"status {status}, {said}" if status and str(status) not in said else said
