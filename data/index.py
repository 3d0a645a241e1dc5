"""The index beside each shard, and a corpus: the shards of one or more folders seen as one.

`shard-000000.tar` has `shard-000000.index.npy`, a structured array with one row per utterance, mapped into memory on
reading. Byte offsets point at payloads inside the tar, so any utterance is one seek away and planning opens no audio.
An utterance whose audio header cannot be read keeps its row, with 0 samples: the plan refuses it by name, nothing is
lost.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .audio import AudioError, audio_info
from .parallel import advance, over_shards
from .whole_file import whole_file

AUDIO_EXTENSIONS = ("flac", "wav", "mp3", "ogg", "opus")
BLOCK = 512  # bytes of a tar block


class MissingIndex(ValueError):
    """A shard without an index; the message says which command writes it."""


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


def index_path(tar_path: str | Path) -> Path:
    return Path(tar_path).with_suffix(".index.npy")


def index_dtype(key_bytes: int) -> np.dtype:
    """The row of an index; little-endian everywhere, so that an index is the same file on every machine."""
    return np.dtype(
        [
            ("key", f"S{max(key_bytes, 1)}"),
            ("audio_offset", "<i8"),
            ("audio_size", "<i8"),
            ("meta_offset", "<i8"),
            ("meta_size", "<i8"),
            ("meta_json", "?"),  # whether the meta member is JSON or plain text
            ("samples", "<i8"),
            ("sample_rate", "<i4"),
            ("text_chars", "<i4"),
            ("lang", "S8"),
            ("speaker", "<i8"),  # hashes (`name_hash`): who speaks, and in which recording or conversation; 0: unknown
            ("session", "<i8"),
        ]
    )


WHO = ("speaker", "session")  # columns that an index may lack: it is from before there were any


def name_hash(name: object) -> int:
    """Return 64 bits for the name of a speaker or a session, 0 for none."""
    if not isinstance(name, str | int) or not (spelled := str(name).strip()):
        return 0
    return int.from_bytes(hashlib.blake2b(spelled.encode(), digest_size=8).digest(), "little", signed=True)


def parse_meta(payload: bytes, *, is_json: bool) -> dict:
    """Return the meta of an utterance; plain text becomes {"text": ...}. Raises ValueError on broken JSON or UTF-8."""
    if not is_json:
        return {"text": payload.decode("utf-8").strip()}
    meta = json.loads(payload.decode("utf-8"))
    if not isinstance(meta, dict):
        raise ValueError(f"the meta is a JSON {type(meta).__name__}, not an object")
    return meta


def meta_member(group: UtteranceMembers, read) -> tuple[Member | None, dict]:
    """Return the member that holds the text, and its content ({} if broken).

    That is a .json with "text", else the .txt, else a .json without.
    """
    metas = {}
    for extension in ("json", "txt"):
        if member := group.members.get(extension):
            try:
                metas[extension] = parse_meta(read(member), is_json=extension == "json")
            except ValueError:
                metas[extension] = {}
    chosen = "json" if "text" in metas.get("json", {}) or "txt" not in metas else "txt"
    return group.members.get(chosen), metas.get(chosen, {})


def index_rows(tar_path: Path, groups: list[UtteranceMembers]) -> np.ndarray:
    """Return the index of those groups that have audio, reading headers and texts from the tar."""
    heard = [(group, audio) for group in groups if (audio := group.audio)]
    keys = [group.key.encode("utf-8", "surrogateescape") for group, _ in heard]
    rows = np.zeros(len(heard), dtype=index_dtype(max(map(len, keys), default=1)))
    with open(tar_path, "rb") as handle:

        def read(member: Member) -> bytes:
            handle.seek(member.offset)
            return handle.read(member.size)

        for row, key, (group, audio) in zip(rows, keys, heard):
            meta_at, meta = meta_member(group, read)
            try:
                info = audio_info(read(audio), name=audio.name)
                row["samples"], row["sample_rate"] = info.samples, info.sample_rate
            except AudioError:
                row["samples"], row["sample_rate"] = 0, 1
            row["key"] = key
            row["audio_offset"], row["audio_size"] = audio.offset, audio.size
            if meta_at:
                row["meta_offset"], row["meta_size"] = meta_at.offset, meta_at.size
                row["meta_json"] = meta_at.name.lower().endswith("json")
            text, lang = meta.get("text"), meta.get("lang")
            row["text_chars"] = len(text) if isinstance(text, str) else 0
            row["lang"] = lang.encode("utf-8")[:8] if isinstance(lang, str) else b""
            row["speaker"], row["session"] = (name_hash(meta.get(name)) for name in WHO)
    return rows


def write_index(tar_path: str | Path) -> np.ndarray:
    """Scan a tar, write the index beside it (whole or not at all) and return it. Raises TarError on a torn tar."""
    tar_path = Path(tar_path)
    scan = scan_tar(tar_path)
    if scan.error:
        raise TarError(f"{tar_path}: {scan.error}; write or copy this shard again")
    rows = index_rows(tar_path, group_members(scan.members))
    if not len(rows):
        raise TarError(
            f"{tar_path}: no audio in {len(scan.members)} files; looked for KEY.{{{','.join(AUDIO_EXTENSIONS)}}}"
        )
    with whole_file(index_path(tar_path)) as handle:
        np.save(handle, rows)
    return rows


@lru_cache(maxsize=512)
def _mapped(path: str, mtime_ns: int, size: int) -> np.ndarray:
    # mtime and size are part of the key: an index written anew must not be served from the cache.
    return np.load(path, mmap_mode="r")


def read_index(tar_path: str | Path) -> np.ndarray:
    """Return the index of a shard, mapped. Raises MissingIndex, which says what to run."""
    path = index_path(tar_path)
    try:
        stat = path.stat()
        rows = _mapped(str(path), stat.st_mtime_ns, stat.st_size)
    except FileNotFoundError:
        raise MissingIndex(f"{tar_path}: no index beside it; run `seedling index {Path(tar_path).parent}`") from None
    except (ValueError, EOFError) as error:
        raise MissingIndex(f"{path}: not an index; run `seedling index {Path(tar_path).parent}` ({error})") from None
    columns = index_dtype(1).names
    if rows.dtype.names not in (columns, columns[: -len(WHO)]):
        raise MissingIndex(f"{path}: an index of another version; run `seedling index {Path(tar_path).parent}`")
    return rows


class IndexSummary(NamedTuple):
    """What `index_folder` found; `unreadable` utterances have a row with 0 samples."""

    shards: int
    utterances: int
    seconds: float
    unreadable: int


def index_folder(folder: str | Path, *, jobs: int = 1) -> IndexSummary:
    """Write an index beside every tar below `folder`, in parallel, and return the totals."""
    tars = find_tars(folder)
    finished = over_shards(_index_one, tars, jobs=jobs, label="index", total=len(tars), unit="shards")
    counts = [count for _, count in finished]
    utterances, seconds, unreadable = (sum(column) for column in zip(*counts))
    return IndexSummary(len(tars), utterances, seconds, unreadable)


def _index_one(tar_path: Path) -> tuple[int, float, int]:
    rows = write_index(tar_path)
    advance()
    return len(rows), index_seconds(rows), int((rows["samples"] == 0).sum())


def index_seconds(rows: np.ndarray) -> float:
    return float((rows["samples"] / rows["sample_rate"]).sum())


def find_tars(path: str | Path) -> list[Path]:
    """Return the tars of a folder (and its subfolders), a tar file or a glob pattern, sorted."""
    path = Path(path)
    if path.is_file():
        return [path]
    tars = sorted(path.rglob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not tars:
        compressed = sorted(path.rglob("*.tar.*")) if path.is_dir() else []
        if compressed:
            raise ValueError(
                f"{path}: {compressed[0].name} is compressed; an index needs plain tars: unpack with gunzip"
            )
        raise ValueError(f"{path}: no .tar shards here; make some with `seedling prepare SOURCE --out {path}`")
    if path.is_dir() and (path / "prepare.json").exists() and not (path / "corpus.json").exists():
        raise ValueError(f"{path}: `seedling prepare` has not finished here; run the same command again to go on")
    return tars


@dataclass(frozen=True)
class Corpus:
    """Shards in a fixed order. Cheap to pickle: indexes are mapped on use, never held."""

    shards: list[Path]

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path]) -> Corpus:
        """Open folders, tars or glob patterns; the order of `paths` is kept, tars of one path are sorted."""
        given = [paths] if isinstance(paths, str | Path) else list(paths)
        if not given:
            raise ValueError("a corpus needs at least one folder with shards, and none was given")
        shards = [tar for path in given for tar in find_tars(path)]
        if len(set(map(Path.resolve, shards))) < len(shards):
            raise ValueError(
                f"the same shard is listed twice in {[str(path) for path in given]}; name each folder once"
            )
        for shard in shards:
            if not index_path(shard).exists():
                raise MissingIndex(f"{shard}: no index beside it; run `seedling index {shard.parent}`")
        return cls(shards)

    def index(self, shard: int) -> np.ndarray:
        """The rows of one shard (mapped, read only)."""
        return read_index(self.shards[shard])

    def members(self, shard: int, row: int) -> np.ndarray:
        """The index rows that make up one row of the plan: here itself (concat.py joins several)."""
        return self.index(shard)[row : row + 1]

    @cached_property
    def num_utterances(self) -> int:
        return sum(len(self.index(i)) for i in range(len(self.shards)))

    @cached_property
    def seconds(self) -> float:
        return sum(index_seconds(self.index(i)) for i in range(len(self.shards)))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the index files in order: equal for equal content, wherever the folder lies."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(hashlib.sha256(index_path(shard).read_bytes()).digest())
        return digest.hexdigest()
