"""Shards: the same bytes every time, readable by webdataset, whole or absent."""

import io
import json

import numpy as np
import pytest
import soundfile
import webdataset

from seedling.data.index import Corpus
from seedling.data.shards import open_shard, shard_path

RATE = 16000


def noise(seconds: float, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * RATE)).astype(np.float32)


def write(folder, *, utterances: int = 3):
    folder.mkdir()
    with open_shard(shard_path(folder, 0), sample_rate=RATE) as shard:
        for i in range(utterances):
            shard.add(f"u{i}", noise(0.5, seed=i), {"text": "größe 你好", "lang": "de"})
    return shard_path(folder, 0)


def test_the_same_utterances_give_the_same_bytes(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in first.parent.iterdir()) == ["shard-000000.index.npy", "shard-000000.tar"]


def test_webdataset_reads_back_what_was_written(tmp_path):
    samples = list(webdataset.WebDataset(str(write(tmp_path / "a")), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["u0", "u1", "u2"]
    for i, sample in enumerate(samples):
        meta = json.loads(sample["json"])
        assert meta == {"text": "größe 你好", "lang": "de", "seconds": 0.5, "sample_rate": RATE}
        with soundfile.SoundFile(io.BytesIO(sample["flac"])) as file:
            assert (file.samplerate, file.channels, file.subtype, file.frames) == (RATE, 1, "PCM_16", RATE // 2)
            np.testing.assert_allclose(file.read(), noise(0.5, seed=i), atol=1 / 32768)


def test_an_index_stands_beside_the_shard(tmp_path):
    write(tmp_path / "a")
    assert Corpus.open(tmp_path / "a").seconds == pytest.approx(1.5)


def test_a_failure_half_way_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="half way"):
        with open_shard(shard_path(tmp_path, 0), sample_rate=RATE) as shard:
            shard.add("a", noise(0.5), {"text": "a"})
            raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []
