"""The loader: what a micro-batch holds, the same from any number of workers, and broken utterances named, not fatal."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from seedling.data.augment import AugmentConfig
from seedling.data.batches import STAND_IN_KEY, BadUtterance, PlannedBatches, make_loader
from seedling.data.index import Corpus
from seedling.data.loader import AudioDataset
from seedling.data.payload import PayloadReader
from seedling.data.plan import MicroBatch, Plan, PlanConfig
from seedling.data.shards import open_shard

RATES = (16000, 16000, 8000)
UTTERANCES = 12


def waveform_of(shard, row):
    """Noise with a smooth spectrum, 0.5 to 3 s: below 3 kHz, so that 8 kHz loses nothing of it."""
    random = np.random.default_rng([shard, row])
    noise = random.standard_normal(int(RATES[shard] * random.uniform(0.5, 3.0)))
    return (0.1 * np.convolve(noise, np.hanning(32) / 4, mode="same")).astype(np.float32)


@pytest.fixture(scope="module")
def shards_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard, rate in enumerate(RATES):
        with open_shard(folder / f"shard-{shard:06d}.tar", sample_rate=rate) as writer:
            for row in range(UTTERANCES):
                meta = {"text": f"text {shard} {row}", "lang": "en", "speaker": f"s{row}"}
                writer.add(f"u{shard}-{row:02d}", waveform_of(shard, row), meta)
    return folder


@pytest.fixture
def own_shards(shards_dir, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(shards_dir, tmp_path / "shards")


def micro_batch(*utterances, index=0, epoch=0):
    return MicroBatch(index, epoch, utterances)


def overwrite(corpus, shard, row, *, field, payload):
    """Write over the beginning of a payload inside the tar."""
    with open(corpus.shards[shard], "r+b") as handle:
        handle.seek(int(corpus.index(shard)[row][f"{field}_offset"]))
        handle.write(payload)


def planned(folder, *, augment=None, seed=0):
    corpus = Corpus.open(str(folder))
    plan = Plan(corpus, PlanConfig(max_seconds=8.0), seed=seed, micro_batches_per_step=2)
    return PlannedBatches(plan, AudioDataset(corpus, augment=augment, seed=seed))


def assert_same_batch(batch, other):
    assert batch.keys == other.keys and (batch.index, batch.epoch) == (other.index, other.epoch)
    assert torch.equal(batch.waveforms_BN, other.waveforms_BN)
    assert torch.equal(batch.lengths_B, other.lengths_B)
    assert batch.texts == other.texts and batch.meta == other.meta


def test_a_batch_holds_the_utterances_of_its_micro_batch_zero_padded(shards_dir):
    batch = AudioDataset(Corpus.open(str(shards_dir)))[micro_batch((0, 3), (1, 7), (0, 0), index=41, epoch=2)]
    expected = [waveform_of(0, 3), waveform_of(1, 7), waveform_of(0, 0)]
    assert batch.keys == ["u0-03", "u1-07", "u0-00"] and len(batch) == 3
    assert batch.texts == ["text 0 3", "text 1 7", "text 0 0"]
    assert (batch.index, batch.epoch, batch.bad) == (41, 2, [])
    assert batch.meta[1]["speaker"] == "s7"
    assert batch.lengths_B.tolist() == [len(waveform) for waveform in expected]
    assert batch.waveforms_BN.dtype == torch.float32
    assert batch.waveforms_BN.shape == (3, max(map(len, expected)))
    for row, waveform in zip(batch.waveforms_BN.numpy(), expected):
        assert np.abs(row[: len(waveform)] - waveform).max() <= 0.5 / 32768
        assert not row[len(waveform) :].any()
    assert batch.seconds == pytest.approx(sum(map(len, expected)) / 16000)
    assert batch.seconds == pytest.approx(sum(map(len, expected)) / 16000)
    assert batch.padded_seconds == pytest.approx(3 * max(map(len, expected)) / 16000)
    assert batch.characters == sum(map(len, batch.texts))
    assert batch.padded_characters == 3 * max(map(len, batch.texts))
    moved = batch.to("meta")
    assert moved.waveforms_BN.device.type == moved.lengths_B.device.type == "meta"
    assert moved.keys == batch.keys


def test_audio_of_another_rate_is_resampled(shards_dir):
    batch = AudioDataset(Corpus.open(str(shards_dir)))[micro_batch((2, 4))]
    original = waveform_of(2, 4)
    assert batch.lengths_B.item() == pytest.approx(2 * len(original), abs=1)
    # Every second sample of the doubled rate is a sample of the original.
    inner = slice(200, len(original) - 200)
    assert np.abs(batch.waveforms_BN[0, ::2].numpy()[: len(original)][inner] - original[inner]).max() < 0.005


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_delivers_the_same_batches_in_the_same_order(shards_dir, num_workers):
    augment = AugmentConfig(speed_probability=0.5, noise_probability=0.5, noise_data=[str(shards_dir)])
    batches = planned(shards_dir, augment=augment)

    def load(workers):
        steps = batches.plan.steps(epochs=2)
        return list(make_loader(batches, (m for s in steps for m in s.micro_batches), num_workers=workers))

    alone = load(0)  # also opens the shards in this process, before the workers are forked
    assert [batch.index for batch in alone] == list(range(len(alone)))
    assert sorted(key for batch in alone if batch.epoch == 1 for key in batch.keys) == sorted(
        f"u{shard}-{row:02d}" for shard in range(len(RATES)) for row in range(UTTERANCES)
    )
    with_workers = load(num_workers)
    assert len(with_workers) == len(alone)
    for batch, other in zip(alone, with_workers):
        assert_same_batch(batch, other)


def test_a_dataset_survives_pickling_for_spawned_workers(shards_dir):
    dataset = planned(shards_dir).dataset
    batch = dataset[micro_batch((0, 1), (2, 2))]
    assert_same_batch(pickle.loads(pickle.dumps(dataset))[micro_batch((0, 1), (2, 2))], batch)


def test_augmentation_depends_on_seed_epoch_and_key_alone(shards_dir):
    augment = AugmentConfig(
        speed_probability=1.0, speed_factors=[0.8, 0.9, 1.1, 1.2], noise_probability=1.0, noise_data=[str(shards_dir)]
    )

    def heard(*utterances, epoch=0, seed=0):
        dataset = AudioDataset(Corpus.open(str(shards_dir)), augment=augment, seed=seed)
        batch = dataset[micro_batch(*utterances, epoch=epoch)]
        return batch.waveforms_BN[0, : batch.lengths_B[0]]

    alone = heard((0, 5))
    assert torch.equal(alone, heard((0, 5), (1, 2), (2, 9)))
    for other in (heard((0, 5), epoch=1), heard((0, 5), seed=1)):
        assert other.shape != alone.shape or not torch.equal(other, alone)


def test_planned_with_stretch_no_augmented_batch_exceeds_the_limit(shards_dir):
    augment = AugmentConfig(speed_probability=1.0, speed_factors=[0.8])
    corpus = Corpus.open(str(shards_dir))
    plan = Plan(corpus, PlanConfig(max_seconds=8.0, stretch=augment.max_stretch), seed=0, micro_batches_per_step=2)
    dataset = AudioDataset(corpus, augment=augment)
    padded = [dataset[m].waveforms_BN.numel() / 16000 for step in plan.steps(epochs=1) for m in step.micro_batches]
    assert max(padded) <= 8.01
    assert max(padded) > 8.0 * 0.8, "the limit should be used"


def test_an_undecodable_utterance_is_named_and_the_others_are_delivered(own_shards):
    corpus = Corpus.open(str(own_shards))
    overwrite(corpus, 0, 2, field="audio", payload=b"this is not flac at all")
    batch = AudioDataset(corpus)[micro_batch((0, 1), (0, 2), (1, 3))]
    assert batch.keys == ["u0-01", "u1-03"] and len(batch.waveforms_BN) == 2
    (bad,) = batch.bad
    assert (bad.shard, bad.key) == (str(corpus.shards[0]), "u0-02")
    assert "decoded" in bad.reason
    assert str(bad).startswith(f"{corpus.shards[0]}: u0-02: ")


def test_broken_meta_and_a_text_that_is_no_string_are_bad(own_shards):
    corpus = Corpus.open(str(own_shards))
    size = int(corpus.index(0)[4]["meta_size"])
    overwrite(corpus, 0, 4, field="meta", payload=b"{broken")
    overwrite(corpus, 0, 5, field="meta", payload=json.dumps({"text": 7}).encode().ljust(size))
    batch = AudioDataset(corpus)[micro_batch((0, 4), (0, 5), (0, 6))]
    assert batch.keys == ["u0-06"]
    assert "meta cannot be read" in batch.bad[0].reason
    assert "its text is a int" in batch.bad[1].reason


def test_a_corpus_may_say_what_it_likes_of_members(tmp_path):
    with open_shard(tmp_path / "shard-000000.tar", sample_rate=16000) as writer:
        for row, members in enumerate((7, None, ["a", "b"])):
            writer.add(f"u{row}", waveform_of(0, row), {"text": "text", "members": members})
    batch = AudioDataset(Corpus.open(str(tmp_path)))[micro_batch((0, 0), (0, 1), (0, 2))]
    assert batch.utterances == 3 and [meta["members"] for meta in batch.meta] == [7, None, ["a", "b"]]


def test_a_torn_tar_and_a_lost_one_are_bad_utterances(own_shards):
    corpus = Corpus.open(str(own_shards))
    os.truncate(corpus.shards[0], int(corpus.index(0)[6]["audio_offset"]) + 100)
    corpus.shards[1].unlink()
    batch = AudioDataset(corpus)[micro_batch((0, 1), (0, 6), (1, 0))]
    assert batch.keys == ["u0-01"]
    assert [bad.key for bad in batch.bad] == ["u0-06", "u1-00"]
    assert "bytes before" in batch.bad[0].reason
    assert "No such file" in batch.bad[1].reason


def test_audio_that_is_not_as_long_as_the_index_says_is_bad(own_shards):
    corpus = Corpus.open(str(own_shards))
    index_file = own_shards / "shard-000000.index.npy"
    rows = np.load(index_file)
    rows["samples"][3] += 16000
    np.save(index_file, rows)
    batch = AudioDataset(corpus)[micro_batch((0, 3), (0, 4))]
    assert batch.keys == ["u0-04"]
    assert "run `seedling index` again" in batch.bad[0].reason


def test_text_is_required_only_where_asked(tmp_path):
    with open_shard(tmp_path / "shard-000000.tar", sample_rate=16000) as writer:
        writer.add("spoken", waveform_of(0, 0), {"text": "hello"})
        writer.add("untranscribed", waveform_of(0, 1), {})
        writer.add("blank", waveform_of(0, 2), {"text": "  "})
    corpus = Corpus.open(str(tmp_path))
    everything = micro_batch((0, 0), (0, 1), (0, 2))
    assert AudioDataset(corpus)[everything].texts == ["hello", "", "  "]
    batch = AudioDataset(corpus, require_text=True)[everything]
    assert batch.keys == ["spoken"]
    assert [bad.reason for bad in batch.bad] == ["its text is empty"] * 2


def test_a_second_of_silence_stands_in_where_nothing_is_usable(own_shards):
    corpus = Corpus.open(str(own_shards))
    overwrite(corpus, 0, 2, field="audio", payload=b"this is not flac at all")
    for batch in (AudioDataset(corpus)[micro_batch((0, 2), index=9)], AudioDataset(corpus)[micro_batch(index=9)]):
        assert (batch.keys, batch.texts, batch.meta) == ([STAND_IN_KEY], [""], [{}])
        assert batch.waveforms_BN.shape == (1, 16000) and not batch.waveforms_BN.any()
        assert (batch.seconds, batch.padded_seconds, batch.index) == (1.0, 1.0, 9)
        assert (batch.characters, batch.padded_characters) == (0, 0)


def test_unreadable_noise_is_named_with_its_own_shard(own_shards, shards_dir):
    noise = Corpus.open(str(own_shards))
    for shard in range(3):
        for row in range(UTTERANCES):
            overwrite(noise, shard, row, field="audio", payload=b"this is not flac at all")
    augment = AugmentConfig(noise_probability=1.0, noise_data=[str(own_shards)])
    batch = AudioDataset(Corpus.open(str(shards_dir)), augment=augment)[micro_batch((0, 0))]
    (bad,) = batch.bad
    assert bad.key == "u0-00" and f"noise {own_shards}" in bad.reason


def test_the_reader_keeps_few_files_open_and_reads_exact_ranges(tmp_path):
    for number in range(6):
        (tmp_path / str(number)).write_bytes(bytes(range(number, number + 50)))
    reader = PayloadReader(max_open=2)
    before = len(os.listdir("/proc/self/fd"))
    for number in (0, 1, 2, 3, 4, 5, 0, 5):
        assert reader.read(tmp_path / str(number), offset=10, size=5) == bytes(range(number + 10, number + 15))
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    with pytest.raises(ValueError, match=r"ends 10 bytes before byte 60"):
        reader.read(tmp_path / "0", offset=40, size=20)
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_bad_utterance_survives_the_way_from_a_worker():
    bad = BadUtterance("a.tar", "k", "why")
    assert pickle.loads(pickle.dumps(bad)) == bad
