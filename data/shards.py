"""Writing one shard: a WebDataset tar that is the same file every time, and that exists whole or not at all.

`KEY.flac` (16-bit mono) and `KEY.json` per utterance, written by the webdataset library with fixed times and owners
into a temporary file, which is forced to disk and then renamed; the index follows. Shape letters: N samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .audio import encode_flac
from .index import write_index
from .whole_file import whole_file


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


class ShardWriter:
    """Adds utterances to a tar that is being written to `handle`."""

    def __init__(self, handle: BinaryIO, *, sample_rate: int):
        from webdataset.writer import (
            TarWriter,  # here, because it imports torch: seconds that reading shards need not spend
        )

        self.sample_rate = sample_rate
        # Times and owners are fixed: the same utterances give the same bytes whoever writes them, and when.
        self._tar = TarWriter(handle, user="seedling", group="seedling", mtime=0, encoder=False)

    def add(self, key: str, waveform: np.ndarray, meta: dict) -> float:
        """Write float32 [N] in [-1, 1] and return its seconds, which `meta` gets together with the sample rate."""
        seconds = len(waveform) / self.sample_rate
        meta = {**meta, "seconds": round(seconds, 4), "sample_rate": self.sample_rate}
        self._tar.write(
            {
                "__key__": key,
                "flac": encode_flac(waveform, sample_rate=self.sample_rate),
                "json": json.dumps(meta, ensure_ascii=False).encode("utf-8"),
            }
        )
        return seconds

    def close(self) -> None:
        self._tar.close()


@contextmanager
def open_shard(path: Path, *, sample_rate: int) -> Iterator[ShardWriter]:
    """Yield a ShardWriter; on leaving, the tar gets its name and then its index. It must not be left empty."""
    with whole_file(path) as handle:
        writer = ShardWriter(handle, sample_rate=sample_rate)
        try:
            yield writer
        finally:
            writer.close()
    write_index(path)
