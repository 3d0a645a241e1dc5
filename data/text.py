"""Text for language model pretraining: one sentence a line, planned and read like audio.

A text file is a shard, a line an utterance that "lasts" one second per character; so the plan of plan.py packs lines
into micro-batches of at most `max_tokens` padded characters. One token per character is an upper bound for scripts with
spaces. The index is built in memory (52 bytes a line), the text itself stays on disk.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .batches import STAND_IN_KEY, BadUtterance, WithTexts
from .payload import PayloadReader
from .plan import MicroBatch, Plan, PlanConfig, PlanSummary

_ROW = np.dtype(
    [
        ("key", "S20"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("samples", "<i8"),  # characters, at one a second
        ("sample_rate", "<i4"),
        ("text_chars", "<i4"),
    ]
)


def index_lines(path: Path) -> np.ndarray:
    """Return a row per line of a UTF-8 file that is not blank; the key is "line N", counted from 1."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=_ROW)
    content = np.memmap(path, dtype=np.uint8, mode="r")
    stops = np.flatnonzero(content == ord("\n"))
    if content[-1] != ord("\n"):
        stops = np.append(stops, len(content))
    starts = np.append(0, stops[:-1] + 1)
    # Bytes 10xxxxxx go on with a character, all others begin one; what is not above the blank is white space.
    begun = np.add.reduceat((content & 0xC0) != 0x80, starts, dtype=np.int64) - (stops < len(content))  # less the \n
    kept = np.flatnonzero(np.logical_or.reduceat(content > ord(" "), starts))
    rows = np.zeros(len(kept), dtype=_ROW)
    rows["key"] = np.char.add(b"line ", (kept + 1).astype("S12"))
    rows["offset"], rows["size"] = starts[kept], (stops - starts)[kept]
    rows["samples"] = rows["text_chars"] = begun[kept]
    rows["sample_rate"] = 1
    return rows


@dataclass(frozen=True)
class TextCorpus:
    """Text files in a fixed order, with the index that a plan needs."""

    shards: list[Path]
    rows: list[np.ndarray] = field(repr=False)
    fingerprint: str

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path]) -> TextCorpus:
        """Open text files, folders (their *.txt) or glob patterns. Raises ValueError where there is nothing."""
        files = []
        for path in [paths] if isinstance(paths, str | Path) else paths:
            path = Path(path)
            found = [path] if path.is_file() else sorted(path.rglob("*.txt"))
            found = found or sorted(map(Path, glob.glob(str(path), recursive=True)))
            if not found:
                raise ValueError(
                    f"{path}: no text here; name a UTF-8 text file, one sentence a line, or a folder of .txt"
                )
            files += found
        digest = hashlib.sha256()
        for file in files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        corpus = cls(files, [index_lines(file) for file in files], digest.hexdigest())
        if not corpus.num_utterances:
            raise ValueError(f"{', '.join(map(str, files))}: no line with text in it")
        return corpus

    def index(self, shard: int) -> np.ndarray:
        return self.rows[shard]

    def expect(self, shards: Sequence[int]) -> None:
        """All of it is in memory."""

    @property
    def rows_S(self) -> np.ndarray:
        return np.array([len(rows) for rows in self.rows], dtype=np.int64)

    @property
    def num_utterances(self) -> int:
        return sum(map(len, self.rows))


class TextPlan(Plan):
    """A plan over the lines of a TextCorpus; its seconds are characters.

    A line of more than `max_tokens` characters fits into no micro-batch: it is refused by name in the summary.
    """

    size_setting = "max_tokens"

    def __init__(
        self,
        corpus: TextCorpus,
        *,
        max_tokens: int,
        seed: int,
        micro_batches_per_step: int,
        shuffle: bool = True,
        window_utterances: int = 100_000,
    ):
        limits = PlanConfig(
            max_seconds=max_tokens, min_seconds=0.0, shuffle=shuffle, window_utterances=window_utterances
        )
        super().__init__(corpus, limits, seed=seed, micro_batches_per_step=micro_batches_per_step)

    def amount(self, summary: PlanSummary) -> str:
        return (
            f"{summary.utterances:,} sentences, {summary.seconds:,.0f} characters, "
            f"padding {summary.padding_fraction:.1%}"
        )

    def _reason(self, seconds: float, tokens: int) -> str:
        return f"{tokens} characters are above max_tokens ({self.cfg.max_seconds})"


@dataclass
class TextBatch(WithTexts):
    """Sentences of a micro-batch. Its seconds are 0: there is no audio in it."""

    keys: list[str]
    texts: list[str]
    index: int
    epoch: int
    seconds: float = 0.0
    padded_seconds: float = 0.0
    bad: list[BadUtterance] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def amount(self) -> str:
        padding = 1 - self.characters / max(1, self.padded_characters)
        return f"{len(self)} sentences, {self.characters:,} characters, padding {padding:.1%}"

    def to(self, device: torch.device | str) -> TextBatch:
        """Return the batch itself: strings live on no device."""
        return self


class TextDataset(Dataset):
    """Reads the lines of a micro-batch, stripped. An unreadable line is bad; without any, "" stands in."""

    def __init__(self, corpus: TextCorpus):
        self.corpus, self.reader = corpus, PayloadReader()

    def __getitem__(self, micro_batch: MicroBatch) -> TextBatch:
        keys, texts, bad = [], [], []
        for shard, row in micro_batch.utterances:
            at, path = self.corpus.index(shard)[row], self.corpus.shards[shard]
            key = at["key"].decode()
            try:
                line = self.reader.read(path, offset=int(at["offset"]), size=int(at["size"])).decode("utf-8")
            except (ValueError, OSError) as error:
                bad.append(BadUtterance(str(path), key, str(error)))
                continue
            keys.append(key)
            texts.append(line.strip())
        if not texts:
            keys, texts = [STAND_IN_KEY], [""]
        return TextBatch(keys, texts, micro_batch.index, micro_batch.epoch, bad=bad)
