"""One hash for what a step reads: an artifact, a prepared corpus, a file or a folder.

An artifact is its manifest (which holds the hashes of its files) and a corpus is its indexes, so both cost
milliseconds; a plain folder, such as a downloaded LLM, is its file names, sizes and times.
"""

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HASHED_WHOLE_BYTES = 64 * 2**20


def fingerprint(path: str | Path) -> str:
    """Return a hash that changes when what lies at `path` does; "absent" where there is nothing."""
    path = Path(path)
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return "absent"
    manifest = path / "manifest.json"
    if manifest.is_file():
        return _of_file(manifest)
    indexes = sorted(path.rglob("*.index.npy"))
    digest = hashlib.sha256()
    for file in indexes or sorted(path.rglob("*")):
        if file.is_file():
            state = file.stat()
            content = _of_file(file) if indexes else f"{state.st_size} {state.st_mtime_ns}"
            digest.update(f"{file.relative_to(path)} {content}\n".encode())
    return digest.hexdigest()


def _of_file(path: Path) -> str:
    state = path.stat()
    if state.st_size > HASHED_WHOLE_BYTES:
        return hashlib.sha256(f"{state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def paths_in(values: Any) -> Iterator[str]:
    """Yield every text in nested values that names something on disk, glob patterns expanded.

    Only texts with a slash or a dot count: a value such as `model` is a word, even where a folder has that name.
    """
    if isinstance(values, dict):
        for value in values.values():
            yield from paths_in(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from paths_in(value)
    elif isinstance(values, str) and ("/" in values or "." in values) and len(values) < 4096 and "\n" not in values:
        if glob.has_magic(values):
            yield from sorted(glob.glob(values, recursive=True))
        elif Path(values).exists():
            yield values
