"""Shards of silence with texts, for tests of what is made from texts alone."""

import random
from pathlib import Path

import numpy as np

from seedling.data.demo_text import ENGLISH
from seedling.data.index import Corpus
from seedling.data.loader import utterance_key
from seedling.data.shards import open_shard, shard_path

SILENCE = np.zeros(160, np.float32)


def write_shards(folder: Path, entries: list[dict], *, shards: int = 1) -> Path:
    """Write utterances with the given meta; `entries` are spread over the shards one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(entries) // shards)
    for shard in range(shards):
        with open_shard(shard_path(folder, shard), sample_rate=16000) as writer:
            for row, entry in enumerate(entries[shard * size : (shard + 1) * size]):
                writer.add(f"u{shard}-{row:04d}", SILENCE, {"lang": "en", "speaker": "", **entry})
    return folder


def demo_entries(count: int, *, seed: int = 0) -> list[dict]:
    """Sentences of the demo's grammar."""
    rng = random.Random(seed)
    drawn = [ENGLISH.draw(rng) for _ in range(count)]
    return [
        {"text": one.text, "keywords": list(one.keywords), "speaker": f"s{number % 7}"}
        for number, one in enumerate(drawn)
    ]


def read_all(contexts, folder: Path) -> dict[str, tuple]:
    """Return the contexts of every utterance by key."""
    corpus = Corpus.open(folder)
    return {
        utterance_key(at): contexts.of(path, row, key=utterance_key(at))
        for number, path in enumerate(corpus.shards)
        for row, at in enumerate(corpus.index(number))
    }


def files(folder: Path) -> dict[str, bytes]:
    """The content of everything that is not a run's own business."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "lock"
    }
