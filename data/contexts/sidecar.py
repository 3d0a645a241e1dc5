"""Context sidecar: the contexts of every utterance of a corpus, in files beside each other as the audio shards are.

    contexts/contexts.json        what made them (settings, counts) and the list of context shards
    contexts/NAME.contexts.jsonl  a line per utterance that has any: {"key", "contexts": [{"kind", "text", "phrases"}]}
    contexts/NAME.rows.npy        a row per utterance, in the order of the shard's index: key, where its line lies,
                                  bytes of its longest context in UTF-8 (0: none)

A context shard belongs to the audio shard with the same keys and lengths of text in the same order, wherever that lies
and whatever it is called; audio is never rewritten. Rows are mapped, a line is one read, and `contexts.json` is
written last: where it is, the sidecar is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..index import index_path, read_index
from ..payload import PayloadReader
from ..whole_file import whole_file, write_json

FORMAT = 2
READABLE = (1, FORMAT)  # 1 counted characters, which says little of tokens
INDEX = "contexts.json"
MAX_MAPPED = 64  # audio shards whose rows are mapped at once


class StaleContexts(ValueError):
    """Contexts that do not belong to the utterances they are asked for."""


class UtteranceContext(NamedTuple):
    """One context. `phrases` are the names and phrases in `text` that could be copied; an empty text is no context."""

    kind: str  # relevant, history, irrelevant, conflict or empty
    text: str
    phrases: tuple[str, ...] = ()


def context_shard_name(number: int, shard: Path) -> str:
    """Return the name of a context shard, another one where the audio shard's index is."""
    digest = hashlib.blake2b(index_path(shard).read_bytes(), digest_size=4).hexdigest()
    return f"{number:05d}-{shard.stem}-{digest}"


def utterances_digest(shard: Path) -> str:
    """Return a hash of the keys of a shard and of the lengths of their texts, in order."""
    rows = read_index(shard)
    digest = hashlib.blake2b(b"\n".join(rows["key"].tolist()), digest_size=16)
    digest.update(np.ascontiguousarray(rows["text_chars"]).tobytes())
    return digest.hexdigest()


def write_context_shard(
    folder: Path, name: str, *, shard: Path, contexts: Mapping[int, Sequence[UtteranceContext]]
) -> None:
    """Write the contexts of the rows of `shard` (those left out have none), whole or not at all."""
    keys = read_index(shard)["key"]
    rows = np.zeros(
        len(keys),
        dtype=[("key", keys.dtype), ("offset", "<i8"), ("size", "<i8"), ("bytes", "<i4")],
    )
    rows["key"] = keys
    offset = 0
    with whole_file(folder / f"{name}.contexts.jsonl") as handle:
        for row in sorted(row for row in contexts if contexts[row]):
            line = _line(bytes(keys[row]), contexts[row])
            handle.write(line)
            longest = max(len(context.text.encode()) for context in contexts[row])
            rows[row] = (keys[row], offset, len(line), longest)
            offset += len(line)
    with whole_file(folder / f"{name}.rows.npy") as handle:  # last: where it is, the context shard is whole
        np.save(handle, rows)


def _line(key: bytes, contexts: Iterable[UtteranceContext]) -> bytes:
    entry = {"key": _text(key), "contexts": [context._asdict() for context in contexts]}
    return json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n"


def is_written(folder: Path, name: str) -> bool:
    return (folder / f"{name}.rows.npy").is_file()


def write_context_index(
    folder: Path,
    names: Sequence[str],
    *,
    shards: Sequence[Path],
    settings: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    made_by: str = "",
) -> None:
    """Write contexts.json over finished context shards; names[i] holds the contexts of shards[i]."""
    listed = [
        {"name": name, "utterances": utterances_digest(shard), "content": _content_hash(folder, name)}
        for name, shard in zip(names, shards, strict=True)
    ]
    content = {"format": FORMAT, "made_by": made_by, "settings": dict(settings or {}), "counts": dict(counts or {})}
    write_json(folder / INDEX, {**content, "shards": listed})


def _content_hash(folder: Path, name: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in (f"{name}.rows.npy", f"{name}.contexts.jsonl"):
        with (folder / file).open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class Contexts:
    """Reads the contexts of one or several sidecars. Cheap to pickle: what is mapped or open is so again on use.

    Where several hold contexts of the same utterance it has all of them, in the order of the folders.
    `fingerprint` is equal exactly if every context of every utterance is.
    """

    def __init__(self, folder: str | Path | Sequence[str | Path]):
        self.folders = [Path(one) for one in ([folder] if isinstance(folder, str | Path) else folder)]
        if not self.folders:
            raise ValueError("contexts: no folder named; make one with `seedling contextualize SHARDS --out DIR`")
        digest = hashlib.blake2b(digest_size=16)
        self._names: dict[str, list[tuple[Path, str]]] = {}  # digest of the utterances -> (folder, name)
        for one in self.folders:
            for entry in _read_index_file(one)["shards"]:
                digest.update(f"{entry['utterances']} {entry['content']}\n".encode())
                self._names.setdefault(entry["utterances"], []).append((one, entry["name"]))
        self.fingerprint = digest.hexdigest()
        self._reader = PayloadReader()
        self._mapped: OrderedDict[Path, list[_ContextShard]] = OrderedDict()

    def of(self, shard: Path, row: int, *, key: str) -> tuple[UtteranceContext, ...]:
        """Return the contexts of the utterance `key` in row `row` of an audio shard's index; () where there are none.

        Raises StaleContexts where the sidecar holds the contexts of other utterances.
        """
        found: list[UtteranceContext] = []
        for at in self._context_shards(shard):
            stored = _text(bytes(at.rows["key"][row]))
            if stored != key:
                raise StaleContexts(f"{shard}: row {row} is {key}, but {stored} in {at.path}; run contextualize again")
            if size := int(at.rows["size"][row]):
                line = self._reader.read(at.path, offset=int(at.rows["offset"][row]), size=size)
                found += [
                    UtteranceContext(one["kind"], one["text"], tuple(one["phrases"]))
                    for one in json.loads(line)["contexts"]
                ]
        return tuple(found)

    def text_bytes(self, shard: Path) -> np.ndarray:
        """Return the bytes, or more, of the longest context of each row of an audio shard's index, int64 [rows]."""
        columns = [_text_bytes(at.rows) for at in self._context_shards(shard)]
        return np.max(columns, axis=0).astype(np.int64)

    def _context_shards(self, shard: Path) -> list[_ContextShard]:
        """The context shards of an audio shard, mapped; the least recently used are forgotten."""
        shard = Path(shard)
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
            return self._mapped[shard]
        names = self._names.get(utterances_digest(shard))
        if not names:
            folders = ", ".join(map(str, self.folders))
            raise StaleContexts(
                f"{shard}: {folders} has no contexts for the utterances in it; run `seedling contextualize` on its "
                "folder as it is now"
            )
        found = self._mapped[shard] = [
            _ContextShard(folder / f"{name}.contexts.jsonl", np.load(folder / f"{name}.rows.npy", mmap_mode="r"))
            for folder, name in names
        ]
        if len(self._mapped) > MAX_MAPPED:
            self._mapped.popitem(last=False)
        return found

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": OrderedDict()}


class _ContextShard(NamedTuple):
    path: Path
    rows: np.ndarray


def _text_bytes(rows: np.ndarray) -> np.ndarray:
    if "bytes" in (rows.dtype.names or ()):
        return rows["bytes"]
    return np.minimum(4 * rows["chars"].astype(np.int64), rows["size"])  # its line has every byte of a text


def _read_index_file(folder: Path) -> dict:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no finished contexts here; run `seedling contextualize SHARDS --out {folder}`"
        ) from None
    if index.get("format") not in READABLE:
        raise ValueError(
            f"{folder}: contexts of format {index.get('format')}, this version reads {FORMAT}; run contextualize again"
        )
    return index


def _text(key: bytes) -> str:
    return key.decode("utf-8", errors="replace")
