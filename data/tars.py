"""What lies where in an uncompressed tar, torn or whole, and which of its files make up an utterance."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

AUDIO_EXTENSIONS = ("flac", "wav", "mp3", "ogg", "opus")
BLOCK = 512  # bytes of a tar block


class TarError(ValueError):
    """A tar that is torn or not a tar."""


class Member(NamedTuple):
    """A file in a tar: where its payload lies."""

    name: str
    offset: int
    size: int


class UtteranceMembers(NamedTuple):
    """The members of a tar that share a key, by extension (the part after the last dot, lower case)."""

    key: str
    members: dict[str, Member]

    @property
    def audio(self) -> Member | None:
        return next((self.members[extension] for extension in self.members if extension in AUDIO_EXTENSIONS), None)


class TarScan(NamedTuple):
    """All that could be read of a tar, and in `error` why that is not all (None if it is whole)."""

    members: list[Member]
    error: str | None


def scan_tar(path: Path) -> TarScan:
    """List the files of an uncompressed tar. Never raises on a torn one: what is whole is returned with the reason."""
    members: list[Member] = []
    size = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for info in tar:
                stop = info.offset_data + (info.size if info.isfile() else 0)
                if stop > size:
                    return TarScan(members, f"cut short inside {info.name}")
                end = -(-stop // BLOCK) * BLOCK
                if info.isfile():
                    members.append(Member(info.name, info.offset_data, info.size))
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else it keeps every header
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return TarScan(members, f"not a readable tar after {len(members)} files ({error})")
    with open(path, "rb") as handle:
        handle.seek(end)
        if handle.read(BLOCK) != bytes(BLOCK):
            return TarScan(members, f"torn after {len(members)} files: no end-of-archive mark where it should be")
    return TarScan(members, None)


def split_name(name: str) -> tuple[str, str]:
    """Return (key, extension) as webdataset does: the key ends at the first dot of the file name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def group_members(members: list[Member]) -> list[UtteranceMembers]:
    """Put neighbouring members with the same key together, as webdataset does on reading."""
    groups: list[UtteranceMembers] = []
    for member in members:
        key, extension = split_name(member.name)
        extension = extension.rpartition(".")[2]
        if not groups or groups[-1].key != key or extension in groups[-1].members:
            groups.append(UtteranceMembers(key, {}))
        groups[-1].members[extension] = member
    return groups
