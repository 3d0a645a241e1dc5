"""Bytes of files on a server, http(s) or s3, through fsspec: by range, tried again where that can help, ended clearly.

A try has a deadline from the request to the last byte, so a server that trickles is as bad as a silent one. Overload,
timeouts, broken connections and short answers are tried again after a growing, jittered pause; what another try cannot
change is said at once. What is longer than PIECE, a range or a file, is read in pieces: a torn connection costs one
piece, not a shard. Every answer says how long the whole file is and which version of it this is: pieces are of one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
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


class OtherFile(ValueError):
    """A file that is not the one which was listed or indexed: no other try helps, and it costs only what is in it."""


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


class Answer(NamedTuple):
    """Bytes of a file, and what the server says of all of it."""

    content: bytes
    size: int  # of the file
    version: str  # changes when the file does; empty where the server says nothing of it


class Host:
    """Reads files of one protocol. Usable from several threads, and after a fork: each process opens its own."""

    def __init__(self, protocol: str, patience: Patience):
        self.protocol, self.patience = protocol, patience
        self._filesystem: Any = None
        self._process = 0

    def read(self, url: str, *, offset: int, size: int, file_size: int = 0) -> bytes:
        """Return exactly `size` bytes at `offset` of a file that has `file_size` bytes (if given).

        Raises HostError, FileNotFoundError, or OtherFile where it ends before or is not as long as it should be.
        """
        starts = range(offset, offset + size, PIECE)
        bounds = ((start, min(start + PIECE, offset + size)) for start in starts)
        return b"".join(self._piece(url, *each, file_size=file_size).content for each in bounds)

    def read_file(self, url: str, *, digest: bytes = b"") -> Answer:
        """Return all bytes of a file, those with the sha256 `digest` if given. Raises HostError, FileNotFoundError."""

        def attempt() -> Answer:
            first = self._piece(url, 0, PIECE, whole=True)
            pieces = [first.content]
            for start in range(len(first.content), first.size, PIECE):
                piece = self._piece(url, start, min(start + PIECE, first.size), whole=True)
                if not digest and piece[1:] != first[1:]:
                    raise BadAnswer(f"it changed while it was read (it had {first[1:]}, now {piece[1:]})")
                pieces.append(piece.content)
            content = b"".join(pieces)
            if digest and hashlib.sha256(content).digest() != digest:
                raise BadAnswer(
                    f"it sent {len(content)} bytes that are not the file which {SHARD_LIST} lists; `seedling index "
                    "FOLDER --list-only` writes the list anew, to be uploaded with the indexes"
                )
            return first._replace(content=content)

        return self._patiently(url, attempt)

    def version(self, url: str) -> str:
        """Return what tells a file from an earlier one in its place, as its server says; empty where it does not."""
        return self._piece(url, 0, 1).version

    def _piece(self, url: str, start: int, stop: int, *, file_size: int = 0, whole: bool = False) -> Answer:
        """Return the bytes from `start` to `stop`; with `whole` those that there are."""

        def attempt() -> Answer:
            answer = self._get(url, start, stop)
            if file_size and answer.size != file_size:
                raise OtherFile(
                    f"{url}: has {answer.size} bytes, {SHARD_LIST} lists it with {file_size}: it is of another version "
                    "or was cut short; upload the shard with its index and the list again"
                )
            if not whole and stop > answer.size:
                raise OtherFile(f"{url}: ends before a byte that its index names ({answer.size}); copy the file again")
            if len(answer.content) != (wanted := min(stop, answer.size) - start):
                raise BadAnswer(f"it sent {len(answer.content)} of {wanted} bytes at {start}")
            return answer

        return self._patiently(url, attempt)

    def _patiently(self, url: str, attempt: Callable[[], Answer]) -> Answer:
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

    def _get(self, url: str, start: int, stop: int) -> Answer:
        filesystem = self._open(url)
        from fsspec.asyn import sync

        get = _get_s3 if self.protocol == "s3" else _get_http

        async def within_time() -> Answer:
            return await asyncio.wait_for(get(filesystem, url, start, stop), self.patience.timeout_s)

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

    # Proxies and ~/.netrc as other programs use them; the deadline is ours, in `_get`.
    client = {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None)}
    return HTTPFileSystem(client_kwargs=client, skip_instance_cache=True)


async def _get_http(filesystem: Any, url: str, start: int, stop: int) -> Answer:
    session, options = await filesystem.set_session(), dict(filesystem.kwargs)
    # A compressed answer would be of other bytes than those that the range counts.
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(filesystem.encode_url(url), headers=headers, **options) as response:
        response.raise_for_status()
        said, length = response.headers, response.content_length
        if response.status == 206:
            size = _whole_size(said.get("Content-Range"), start=start)
        elif start == 0 and length is not None and length <= stop:  # all of a file that is within the range
            size = length
        else:
            raise RangeIgnored
        return Answer(await response.read(), size, said.get("ETag") or said.get("Last-Modified") or "")


def _s3() -> Any:
    from s3fs import S3FileSystem

    # One kind of retry, ours: three layers of them would multiply.
    config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 100}
    filesystem = S3FileSystem(config_kwargs=config, max_concurrency=1, skip_instance_cache=True)
    filesystem.retries = 1
    return filesystem


async def _get_s3(filesystem: Any, url: str, start: int, stop: int) -> Answer:
    bucket, key, _ = filesystem.split_path(url)
    said = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
    try:
        if said["ResponseMetadata"]["HTTPStatusCode"] == 200:
            raise RangeIgnored
        size = _whole_size(said.get("ContentRange"), start=start)
        return Answer(await said["Body"].read(), size, said.get("ETag") or str(said.get("LastModified") or ""))
    finally:
        said["Body"].close()


def _whole_size(content_range: str | None, *, start: int) -> int:
    """Return the bytes of the file that an answer is a range of."""
    said = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range or "")
    if said is None or int(said[1]) != start:
        raise BadAnswer(f"it was asked for bytes from {start} and sent what it calls {content_range or 'nothing'}")
    return int(said[2])


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
    if isinstance(error, (HostError, OtherFile)):
        raise error
    if status == 404:
        raise FileNotFoundError(f"{url}: the server has no such file (404)") from error
    if status in (401, 403):
        raise HostError(
            f"{url}: the server does not let this job read it ({status}: {_said(error)}); set its credentials "
            "(~/.netrc for http, AWS_* or ~/.aws for s3, FSSPEC_S3='{\"anon\": true}' for a public bucket)"
        ) from error
    if status == 416:
        raise OtherFile(f"{url}: ends before a byte that its index names (416); copy the file again") from error
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
