"""Frame labels: one code per 40 ms frame of every utterance, in files beside each other as the audio shards are.

    labels/index.json          codes, what made them, and the list of label shards
    labels/NAME.codes.npy      uint16, the codes of one audio shard's utterances one after the other
    labels/NAME.rows.npy       a row per utterance, in the order of the shard's index: key, hash of the encoded audio,
                               samples, offset into the codes, number of frames (0: was not labelled)

A label shard belongs to the audio shard with the same keys in the same order, wherever that lies and whatever it is
called; a corpus may move. Both files are mapped into memory, so an utterance's codes are one slice. Labels of other
audio would train without any sign of it, hence the hash; `StaleLabels` is fatal, not one more bad utterance.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .index import index_path, read_index
from .whole_file import whole_file, write_json

FORMAT = 1
MAX_CODES = 1 << 16
INDEX = "index.json"
NO_LABEL = -1  # where a batch has no code: padding
MAX_MAPPED = 64  # label shards mapped at once


class StaleLabels(ValueError):
    """Labels that do not belong to the audio they are asked for."""


class UtteranceLabels(NamedTuple):
    """What is stored for one utterance: the `audio_hash` of its encoded bytes, its decoded samples, its codes."""

    audio: bytes
    samples: int
    codes: np.ndarray


def audio_hash(audio: bytes) -> bytes:
    return hashlib.blake2b(audio, digest_size=16).digest()


def keys_digest(keys: Sequence[bytes]) -> str:
    """Return a hash of the utterances of a shard, in order."""
    return hashlib.blake2b(b"\n".join(keys), digest_size=16).hexdigest()


def rows_dtype(key_bytes: int) -> np.dtype:
    return np.dtype(
        [("key", f"S{key_bytes}"), ("audio", "V16"), ("samples", "<i8"), ("offset", "<i8"), ("frames", "<i4")]
    )


def label_shard_name(number: int, shard: Path) -> str:
    """Return the name of a label shard, another one where the shard's index is: it says if its labels are written."""
    digest = hashlib.blake2b(index_path(shard).read_bytes(), digest_size=4).hexdigest()
    return f"{number:05d}-{shard.stem}-{digest}"


def write_label_shard(folder: Path, name: str, *, shard: Path, labels: dict[int, UtteranceLabels]) -> None:
    """Write the labels of the rows of `shard` (those left out were not labelled), whole or not at all."""
    keys = read_index(shard)["key"]
    rows = np.zeros(len(keys), dtype=rows_dtype(keys.dtype.itemsize))
    rows["key"] = keys
    codes, offset = [], 0
    for row in sorted(labels):
        entry = labels[row]
        codes.append(np.asarray(entry.codes, dtype=np.uint16))
        rows[row] = (keys[row], entry.audio, entry.samples, offset, len(entry.codes))
        offset += len(entry.codes)
    with whole_file(folder / f"{name}.codes.npy") as handle:
        np.save(handle, np.concatenate(codes or [np.zeros(0, np.uint16)]))
    with whole_file(folder / f"{name}.rows.npy") as handle:  # last: where it is, the label shard is whole
        np.save(handle, rows)


def is_written(folder: Path, name: str) -> bool:
    return (folder / f"{name}.rows.npy").is_file()


def write_label_index(folder: Path, names: Sequence[str], *, codes: int, made_by: str) -> None:
    """Write index.json over finished label shards. `made_by` is the hash of what labelled them."""
    shards = []
    for name in names:
        rows = np.load(folder / f"{name}.rows.npy", mmap_mode="r")
        shards.append(
            {
                "name": name,
                "keys": keys_digest(rows["key"].tolist()),
                "utterances": int((rows["frames"] > 0).sum()),
                "frames": int(rows["frames"].sum()),
                "content": _content_hash(folder, name),
            }
        )
    write_json(folder / INDEX, {"format": FORMAT, "codes": codes, "made_by": made_by, "shards": shards})


def _content_hash(folder: Path, name: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in ("rows", "codes"):
        with (folder / f"{name}.{part}.npy").open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def count_codes(folder: Path, names: Sequence[str], *, codes: int) -> np.ndarray:
    """Return how often each code occurs, int64 [codes]."""
    counts = np.zeros(codes, dtype=np.int64)
    for name in names:
        counts += np.bincount(np.load(folder / f"{name}.codes.npy", mmap_mode="r"), minlength=codes)
    return counts


def count_unlabelled(folder: Path, name: str) -> int:
    """Return how many utterances of a label shard have no labels."""
    return int((np.load(folder / f"{name}.rows.npy", mmap_mode="r")["frames"] == 0).sum())


@dataclass
class FrameLabels:
    """Reads the frame labels of a folder. Cheap to pickle: what is mapped is mapped again."""

    folder: Path
    num_codes: int
    made_by: str
    fingerprint: str  # equal exactly if every label of every utterance is
    names: dict[str, list[str]]  # digest of the keys -> label shards; several where corpora share their keys
    _mapped: OrderedDict = field(default_factory=OrderedDict, repr=False)

    @classmethod
    def open(cls, folder: str | Path, *, made_by: str | None = None) -> FrameLabels:
        """Open a folder of labels; ValueError where there are none, or something else than `made_by` made them."""
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"{folder}: no frame labels here; run cluster_labels with write_labels=true, or label on the fly"
            ) from None
        if index["format"] != FORMAT:
            raise ValueError(
                f"{folder}: frame labels of format {index['format']}, this version reads {FORMAT}; run cluster_labels "
                "again"
            )
        if made_by is not None and index["made_by"] != made_by:
            raise StaleLabels(
                f"{folder}: these frame labels were made by the encoder {index['made_by']}, expected is {made_by}; run "
                "cluster_labels on that encoder"
            )
        names: dict[str, list[str]] = {}
        for shard in index["shards"]:
            names.setdefault(shard["keys"], []).append(shard["name"])
        fingerprint = hashlib.blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=16).hexdigest()
        return cls(folder, index["codes"], index["made_by"], fingerprint, names)

    def read(
        self, shard: Path, row: int, *, audio: bytes, samples: int | None = None, frames: int | None = None
    ) -> np.ndarray:
        """Return the codes (uint16 [frames]) of the utterance in row `row` of an audio shard's index.

        Raises StaleLabels where its audio, its length in samples or in frames (where given) is not what was labelled,
        and ValueError where it was not labelled at all.
        """
        label_shards = self._label_shards(shard)
        where = f"{shard}: {label_shards[0].key(row)}"
        if not any(at.rows["frames"][row] for at in label_shards):
            raise ValueError(
                f"{where}: has no frame labels in {self.folder}: its audio could not be read, or data.limits or "
                "batch_seconds refused it, when they were made; use the same limits, or run cluster_labels again"
            )
        digest = audio_hash(audio)
        at = next((at for at in label_shards if at.rows["audio"][row].tobytes() == digest), None)
        if at is None:
            raise StaleLabels(
                f"{where}: its audio has changed since its frame labels in {self.folder} were made; run cluster_labels "
                "again on this corpus with resume=never (in a pipeline: --from its step)"
            )
        for unit, wanted, found in (
            ("samples", samples, int(at.rows["samples"][row])),
            ("frames", frames, int(at.rows["frames"][row])),
        ):
            if wanted is not None and wanted != found:
                raise StaleLabels(
                    f"{where}: has {wanted} {unit} here, its frame labels in {self.folder} were made of {found}; use "
                    "the sample rate and the features of the encoder that labelled it"
                )
        return at.codes_of(row)

    def _label_shards(self, shard: Path) -> list[_LabelShard]:
        """The label shards with the keys of an audio shard, mapped; the least recently used are forgotten."""
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
            return self._mapped[shard]
        names = self.names.get(keys_digest(read_index(shard)["key"].tolist()))
        if not names:
            raise StaleLabels(
                f"{shard}: {self.folder} has no frame labels for the utterances in it; run cluster_labels with its "
                "folder in data.train or data.valid"
            )
        found = self._mapped[shard] = [_LabelShard.map(self.folder, name) for name in names]
        if len(self._mapped) > MAX_MAPPED:
            self._mapped.popitem(last=False)
        return found

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": OrderedDict()}


class _LabelShard(NamedTuple):
    rows: np.ndarray
    codes: np.ndarray

    @classmethod
    def map(cls, folder: Path, name: str) -> _LabelShard:
        return cls(*(np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("rows", "codes")))

    def key(self, row: int) -> str:
        return bytes(self.rows["key"][row]).decode("utf-8", errors="replace")

    def codes_of(self, row: int) -> np.ndarray:
        start = int(self.rows["offset"][row])
        return np.array(self.codes[start : start + int(self.rows["frames"][row])])
