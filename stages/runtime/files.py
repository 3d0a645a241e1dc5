"""Folders that are whole or absent: written beside their place, listed with sizes and hashes, synced, then renamed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from ...data.whole_file import sync_to_disk

CHUNK_BYTES = 1 << 22


def file_hash(path: Path) -> str:
    """blake2b of a file's bytes."""
    state = hashlib.blake2b(digest_size=20)
    with path.open("rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def list_files(folder: Path, *, without: tuple[str, ...] = ()) -> list[str]:
    """Return the relative paths of all files below `folder`, sorted."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name not in without)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """Return {name: {"bytes", "blake2b"}}."""
    return {n: {"bytes": (folder / n).stat().st_size, "blake2b": file_hash(folder / n)} for n in names}


def find_damage(folder: Path, described: dict[str, dict]) -> str | None:
    """Return what is wrong with the first damaged file, or None when all are as described."""
    for name, facts in described.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {facts['bytes']}"
            if file_hash(path) != facts["blake2b"]:
                return f"{name} differs from the hash in its manifest"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def write_synced(path: Path, text: str) -> None:
    """Write a text file and force it to disk."""
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
    sync_to_disk(path)


def sync_tree(folder: Path) -> None:
    """Force all files below `folder`, and the folders themselves, to disk."""
    for path in [folder, *folder.rglob("*")]:
        sync_to_disk(path)


def publish(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; what was there before is deleted only after it has been moved out of the way."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    sync_to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)
