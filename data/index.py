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
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .audio import AudioError, audio_info
from .host import SHARD_LIST, HostError
from .parallel import advance, over_shards
from .remote import RemoteConfig, RemotePath, located
from .shard_list import WRITE_IT, ShardEntry, as_array, read_shard_list, write_shard_list
from .shard_paths import FoundShards, ListedShards, ShardPaths, ShardRows
from .tars import AUDIO_EXTENSIONS, Member, TarError, UtteranceMembers, group_members, scan_tar
from .whole_file import whole_file


class MissingIndex(ValueError):
    """A shard without an index; the message says which command writes it."""


def index_path(tar_path: str | Path | RemotePath) -> Path | RemotePath:
    return located(tar_path).with_suffix(".index.npy")


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


PathLike = str | Path | RemotePath
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
def _mapped(path: Path | RemotePath, mtime_ns: int, size: int, digest: bytes) -> np.ndarray:
    # mtime and size are part of the key: an index written anew must not be served from the cache.
    if isinstance(path, RemotePath):
        return path.store.map_array(path, digest=digest)
    if digest and hashlib.sha256(path.read_bytes()).digest() != digest:
        raise MissingIndex(
            f"{path}: has changed since {SHARD_LIST} was written; {WRITE_IT.format('FOLDER')} on its folder"
        )
    return np.load(path, mmap_mode="r")


def read_index(tar_path: str | Path | RemotePath, *, digest: bytes = b"") -> np.ndarray:
    """Return the index of a shard, mapped. Raises MissingIndex, which says what to run.

    `digest` is the sha256 that its file must have, where that is known.
    """
    tar_path = located(tar_path)
    path, way_out = index_path(tar_path), f"run `seedling index {tar_path.parent}`"
    if isinstance(tar_path, RemotePath):
        digest = bytes.fromhex(tar_path.version)
        way_out = "run `seedling index` on its folder and upload what it writes"
    try:
        if isinstance(path, RemotePath) and not path.version:
            rows = path.store.map_array(path)
        else:
            stat = path.stat() if isinstance(path, Path) else None
            rows = _mapped(path, stat.st_mtime_ns if stat else 0, stat.st_size if stat else 0, digest)
    except FileNotFoundError:
        raise MissingIndex(f"{tar_path}: no index beside it; {way_out}") from None
    except (HostError, MissingIndex):
        raise
    except (ValueError, EOFError) as error:
        raise MissingIndex(f"{path}: not an index; {way_out} ({error})") from None
    columns = index_dtype(1).names
    if rows.dtype.names not in (columns, columns[: -len(WHO)]):
        raise MissingIndex(f"{path}: an index of another version; {way_out}")
    return rows


class IndexSummary(NamedTuple):
    """What `index_folder` found; `unreadable` utterances have a row with 0 samples."""

    shards: int
    utterances: int
    seconds: float
    unreadable: int


def index_folder(folder: str | Path, *, jobs: int = 1, list_only: bool = False) -> IndexSummary:
    """Write an index beside every tar below `folder`, in parallel, and the list of them; return the totals.

    With `list_only` the indexes are taken as they are. Given a single tar there is no folder to list.
    """
    tars = local_tars(folder)
    work = _list_one if list_only else _index_one
    finished = dict(over_shards(work, tars, jobs=jobs, label="index", total=len(tars), unit="shards"))
    found = [finished[number] for number in range(len(tars))]
    if Path(folder).is_dir():
        list_shards(Path(folder), [entry for entry, _ in found])
    seconds = sum(entry.seconds for entry, _ in found)
    return IndexSummary(len(tars), sum(entry.utterances for entry, _ in found), seconds, sum(bad for _, bad in found))


def list_shards(folder: Path, entries: list[ShardEntry] | None = None) -> None:
    """Write the list of the shards below a folder, as their indexes are; `entries` are they, where they were read."""
    entries = entries or [_entry_of(tar) for tar in sorted(folder.rglob("*.tar"))]
    names = [Path(entry.name).relative_to(folder).as_posix() for entry in entries]
    write_shard_list(folder, as_array([entry._replace(name=name) for entry, name in zip(entries, names)]))


def _index_one(tar_path: Path) -> tuple[ShardEntry, int]:
    write_index(tar_path)
    return _list_one(tar_path)


def _list_one(tar_path: Path) -> tuple[ShardEntry, int]:
    advance()
    return _entry_of(tar_path), int((read_index(tar_path)["samples"] == 0).sum())


def _entry_of(tar_path: Path | RemotePath) -> ShardEntry:
    """Return what the list says of a shard, under its whole path."""
    rows, content = read_index(tar_path), index_path(tar_path).read_bytes()
    tar_bytes = tar_path.stat().st_size if isinstance(tar_path, Path) else tar_path.size
    digest = hashlib.sha256(content).digest()
    return ShardEntry(str(tar_path), tar_bytes, len(content), len(rows), index_seconds(rows), digest)


def index_seconds(rows: np.ndarray) -> float:
    return float((rows["samples"] / rows["sample_rate"]).sum())


def find_tars(path: PathLike, *, remote: RemoteConfig | None = None) -> list[Path | RemotePath]:
    """Return the tars of a folder (and its subfolders), here or on a server, a tar file or a glob pattern, sorted."""
    path = located(path, remote)
    return list(ShardPaths([_open(path)])) if isinstance(path, RemotePath) else _find_local(path)


def local_tars(path: str | Path) -> list[Path]:
    """Return the tars of a folder for work that reads all of them, or writes: ValueError for a place on a server."""
    place = located(path)
    if isinstance(place, RemotePath):
        raise ValueError(f"{place}: index and check-data read whole shards, in a folder; run them before the upload")
    return _find_local(place)


def _find_local(path: Path) -> list[Path]:
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
    _require_prepared(path)
    return tars


def _require_prepared(path: Path) -> None:
    if path.is_dir() and (path / "prepare.json").exists() and not (path / "corpus.json").exists():
        raise ValueError(f"{path}: `seedling prepare` has not finished here; run the same command again to go on")


def _open(path: Path | RemotePath) -> ShardRows:
    """Return the shards that a path names: by the list of its folder, where that has one that fits."""
    is_folder = not path.name.endswith(".tar") if isinstance(path, RemotePath) else path.is_dir()
    if is_folder and (rows := read_shard_list(path)) is not None:
        if isinstance(path, Path):
            _require_prepared(path)
        return ListedShards(path, rows)
    if isinstance(path, RemotePath):
        return ListedShards(path.parent, as_array([_entry_of(path)._replace(name=path.name)]))
    tars = _find_local(path)
    for tar in tars:
        if not index_path(tar).exists():
            raise MissingIndex(f"{tar}: no index beside it; run `seedling index {tar.parent}`")
    return FoundShards(tars, _entry_of)


class Corpus:
    """Shards in a fixed order. Indexes are mapped on use and never held, so it is cheap to pickle; and where folders
    have a list of their shards (shard_list.py) a million of them are opened at once."""

    def __init__(self, folders: Sequence[ShardRows]):
        self.shards = ShardPaths(folders)

    @classmethod
    def open(cls, paths: PathLike | Sequence[PathLike], *, remote: RemoteConfig | None = None) -> Corpus:
        """Open folders (here or on a server), tars or glob patterns; their order is kept, tars of one are sorted."""
        given = [located(path, remote) for path in ([paths] if isinstance(paths, PathLike) else paths)]
        if not given:
            raise ValueError("a corpus needs at least one folder with shards, and none was given")
        corpus = cls([_open(path) for path in given])
        if corpus.shards.some_twice():
            raise ValueError(
                f"the same shard is listed twice in {[str(path) for path in given]}; name each folder once"
            )
        return corpus

    def index(self, shard: int) -> np.ndarray:
        """The rows of one shard (mapped, read only)."""
        return read_index(self.shards[shard], digest=self.shards.digest(shard))

    def expect(self, shards: Sequence[int]) -> None:
        """Begin to fetch those indexes that lie on a server: they will be asked for next."""
        paths = {shard: path for shard in shards if isinstance(path := self.shards[shard], RemotePath)}
        for store in {path.store for path in paths.values()}:
            own = [shard for shard, path in paths.items() if path.store is store]
            store.start_files({index_path(paths[shard]): self.shards.digest(shard) for shard in own})

    def members(self, shard: int, row: int) -> np.ndarray:
        """The index rows that make up one row of the plan: here itself (concat.py joins several)."""
        return self.index(shard)[row : row + 1]

    @property
    def places(self) -> list[Path | RemotePath]:
        """Where its shards lie, a shard of each folder: enough to tell a server from a disk."""
        return self.shards.places

    @cached_property
    def rows_S(self) -> np.ndarray:
        """Utterances of each shard, int64 [S]."""
        return self.shards.column("utterances")

    @property
    def num_utterances(self) -> int:
        return int(self.rows_S.sum())

    @property
    def seconds(self) -> float:
        return float(self.shards.column("seconds").sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the hashes of the index files in order: equal for equal content, wherever the folder lies."""
        return hashlib.sha256(self.shards.column("digest").tobytes()).hexdigest()
