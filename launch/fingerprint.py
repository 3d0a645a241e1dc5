"""One hash for what a step reads: an artifact, a prepared corpus, a file or a folder.

An artifact is its manifest and a context sidecar its contexts.json (which hold the hashes of their files), a corpus is
its indexes, so all of them cost milliseconds; a plain folder, such as a downloaded LLM, is its file names, sizes and
times. The audio that a manifest names may lie anywhere: it is its sizes and times too, 16 s for a million files.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HASHED_WHOLE_BYTES = 64 * 2**20
ON_SERVER = re.compile(r"(https?|s3)://\S+$")


def fingerprint(path: str | Path) -> str:
    """Return a hash that changes when what lies at `path` does; "absent" where there is nothing."""
    if ON_SERVER.match(str(path)):
        return _of_corpus_on_server(str(path))
    path = Path(path)
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return "absent"
    for listing in ("manifest.json", "contexts.json"):  # of an artifact, of a context sidecar
        if (path / listing).is_file():
            return _of_file(path / listing)
    indexes = sorted(path.rglob("*.index.npy"))
    digest = hashlib.sha256()
    for file in indexes or sorted(path.rglob("*")):
        if file.is_file():
            content = _of_file(file) if indexes else _size_and_time(file)
            digest.update(f"{file.relative_to(path)} {content}\n".encode())
    return digest.hexdigest()


def audio_fingerprint(source: str | Path) -> str:
    """Return a hash of the audio that a manifest names, or the manifests in a folder; it changes when a file does."""
    from ..data.sources import read_manifest  # here: `seedling --help` need not wait for numpy

    source = Path(source)
    digest = hashlib.sha256()
    for manifest in sorted(source.glob("*.jsonl")) if source.is_dir() else [source]:
        files = dict.fromkeys(str(utterance.audio) for utterance in read_manifest(manifest) if utterance.audio)
        for file in files:  # once each, however many segments there are of it
            digest.update(f"{file} {_size_and_time(file)}\n".encode())
    return digest.hexdigest()


def _of_corpus_on_server(url: str) -> str:
    """Hash the list of its shards, which holds the hashes of their indexes; "absent" for whatever else is at a URL."""
    from ..data.host import HostError
    from ..data.remote import RemoteConfig, located
    from ..data.shard_list import SHARD_LIST

    try:
        content = (located(url, RemoteConfig(tries=1, timeout_seconds=10.0)) / SHARD_LIST).read_bytes()
    except (HostError, FileNotFoundError):
        return "absent"
    return hashlib.sha256(content).hexdigest()


def _of_file(path: Path) -> str:
    if path.stat().st_size > HASHED_WHOLE_BYTES:
        return hashlib.sha256(_size_and_time(path).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _size_and_time(path: str | Path) -> str:
    try:
        state = os.stat(path)
    except OSError:
        return "absent"
    return f"{state.st_size} {state.st_mtime_ns}"


def paths_in(values: Any) -> Iterator[str]:
    """Yield every text in nested values that names something on disk, glob patterns expanded, or on a server.

    Only texts with a slash or a dot count: a value such as `model` is a word, even where a folder has that name.
    """
    if isinstance(values, dict):
        for value in values.values():
            yield from paths_in(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from paths_in(value)
    elif isinstance(values, str) and ("/" in values or "." in values) and len(values) < 4096 and "\n" not in values:
        if ON_SERVER.match(values):
            yield values
        elif glob.has_magic(values):
            yield from sorted(glob.glob(values, recursive=True))
        elif Path(values).exists():
            yield values
