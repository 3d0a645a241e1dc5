"""One hash for what a step reads: an artifact, a prepared corpus, a file or a folder.

An artifact is its manifest and a context sidecar its contexts.json (which hold the hashes of their files), a corpus is
its indexes, so all of them cost milliseconds; a corpus on a server is the list of its shards. A plain folder, such as a
downloaded LLM, is its file names, sizes and times. The audio that a manifest names may lie anywhere: it is its sizes
and times too, 16 s for a million files.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HASHED_WHOLE_BYTES = 64 * 2**20
CACHES = ("cache", "cache_dir")
ON_SERVER = re.compile(r"(https?|s3)://\S+$")


def fingerprint(path: str | Path) -> str:
    """Return a hash that changes when what lies at `path` does; "absent" where there is nothing."""
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


def corpora_on_servers(reads: dict[str, Any]) -> dict[str, str]:
    """Return a hash by address of each corpus on a server among what a step reads; "absent" where there is none.

    Corpora are what a stage's config names below `data`, and the arguments of contextualize; another address, such as
    that of an endpoint, is only a word. Raises HostError where a server does not say whether it has them: nothing is
    known then, and least of all that they have changed.
    """
    config = reads.get("config") or {}
    named = reads.get("arguments") if reads.get("command") == "contextualize" else config.get("data")
    addresses = sorted({value for value in paths_in(named) if ON_SERVER.match(value)})
    if not addresses:
        return {}
    from ..data.remote import RemoteConfig, located  # here: `seedling --help` need not wait for numpy
    from ..data.shard_list import SHARD_LIST

    settings = named.get("remote") if isinstance(named, dict) else config.get("remote")
    found = {}
    for address in addresses:
        place = located(address, RemoteConfig(**(settings or {})))
        listing = place.with_suffix(".index.npy") if place.name.endswith(".tar") else place / SHARD_LIST
        try:
            found[address] = hashlib.sha256(listing.read_bytes()).hexdigest()
        except FileNotFoundError:
            found[address] = "absent"
    return found


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

    Only texts with a slash or a dot count: a value such as `model` is a word, even where a folder has that name. What a
    step keeps for itself (CACHES) changes whenever it runs, and is nothing that it reads.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            if str(key).rpartition(".")[2] not in CACHES:
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
