"""Frame labels: what was written is what is read, by whichever path; labels of other audio are refused by name."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from seedling.data import frame_labels
from seedling.data.augment import AugmentConfig
from seedling.data.batches import PlannedBatches, make_loader
from seedling.data.frame_labels import NO_LABEL, FrameLabels, StaleLabels, UtteranceLabels, audio_hash, count_codes
from seedling.data.index import Corpus, write_index
from seedling.data.loader import STAND_IN_KEY, AudioDataset
from seedling.data.plan import MicroBatch, Plan, PlanConfig
from seedling.data.shards import open_shard, shard_path

CODES = 700
UTTERANCES = 5
UNLABELLED = 3  # row of shard 1


def codes_of(shard: int, row: int) -> np.ndarray:
    return np.random.default_rng([shard, row]).integers(CODES, size=4 + 3 * row + shard).astype(np.uint16)


def speak(folder, *, shards=2, loudness=0.1):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with open_shard(shard_path(folder, shard), sample_rate=16000) as writer:
            for row in range(UTTERANCES):
                noise = np.random.default_rng([7, shard, row]).uniform(-loudness, loudness, 3000 + 500 * row)
                writer.add(f"u{shard}-{row}", noise.astype(np.float32), {"text": "a"})
    return folder


def label(folder, audio_folders, *, codes=codes_of):
    """Write the labels of every shard; return the names of the label shards."""
    folder.mkdir(exist_ok=True)
    names = []
    corpus = Corpus.open(list(map(str, audio_folders)))
    for number, path in enumerate(corpus.shards):
        labels = {}
        for row, at in enumerate(corpus.index(number)):
            if (number, row) != (1, UNLABELLED):
                audio = path.read_bytes()[at["audio_offset"] : at["audio_offset"] + at["audio_size"]]
                labels[row] = UtteranceLabels(audio_hash(audio), int(at["samples"]), codes(number, row))
        names.append(frame_labels.label_shard_name(number, path))
        frame_labels.write_label_shard(folder, names[-1], shard=path, labels=labels)
    frame_labels.write_label_index(folder, names, codes=CODES, made_by="abc")
    return names


@pytest.fixture
def audio(tmp_path):
    return speak(tmp_path / "audio")


@pytest.fixture
def labels(audio, tmp_path):
    label(tmp_path / "labels", [audio])
    return FrameLabels.open(tmp_path / "labels")


def read(labels, folder, shard, row, **expected):
    corpus = Corpus.open(str(folder))
    at = corpus.index(shard)[row]
    audio = corpus.shards[shard].read_bytes()[at["audio_offset"] : at["audio_offset"] + at["audio_size"]]
    return labels.read(corpus.shards[shard], row, audio=audio, **expected)


def test_every_utterance_gets_its_own_codes_also_from_a_pickled_reader(labels, audio):
    for reader in (labels, pickle.loads(pickle.dumps(labels))):
        for shard, row in [(1, 4), (0, 0), (0, 4), (1, 0), (0, 2)]:
            codes = read(reader, audio, shard, row)
            assert codes.dtype == np.uint16 and np.array_equal(codes, codes_of(shard, row))
    assert labels.num_codes == CODES and labels.made_by == "abc"


def test_two_bytes_a_frame_are_mapped_and_not_read(labels, audio, tmp_path):
    read(labels, audio, 0, 0)
    (mapped,) = labels._mapped.values()
    assert all(isinstance(part, np.memmap) for part in mapped[0])
    size = sum(file.stat().st_size for file in (tmp_path / "labels").glob("*.codes.npy"))
    frames = sum(len(codes_of(s, r)) for s in range(2) for r in range(UTTERANCES) if (s, r) != (1, UNLABELLED))
    assert size == 2 * frames + 2 * 128


def test_no_more_label_shards_stay_mapped_than_allowed(labels, audio, monkeypatch):
    monkeypatch.setattr(frame_labels, "MAX_MAPPED", 1)
    for shard in (0, 1, 0, 1):
        assert np.array_equal(read(labels, audio, shard, 1), codes_of(shard, 1))
        assert len(labels._mapped) == 1


def test_the_corpus_may_move_and_its_shards_may_be_renamed(labels, audio, tmp_path):
    moved = shutil.move(audio, tmp_path / "elsewhere")
    for part in ("tar", "index.npy"):
        (moved / f"shard-000000.{part}").rename(moved / f"x.{part}")
    assert np.array_equal(read(labels, moved, 1, 2), codes_of(0, 2))  # x sorts behind shard-000001


def test_corpora_with_the_same_keys_are_told_apart_by_their_audio(audio, tmp_path):
    louder = speak(tmp_path / "louder", loudness=0.5)
    label(tmp_path / "labels", [audio, louder])
    both = FrameLabels.open(tmp_path / "labels")
    for number, folder in enumerate((audio, louder)):
        assert np.array_equal(read(both, folder, 0, 2), codes_of(2 * number, 2))


def test_changed_audio_is_refused_by_shard_and_key_with_the_remedy(labels, tmp_path):
    other = speak(tmp_path / "other", loudness=0.2)
    with pytest.raises(StaleLabels, match=r"shard-000001.tar: u1-2: its audio has changed.*run cluster_labels again"):
        read(labels, other, 1, 2)


@pytest.mark.parametrize(("unit", "number"), [("samples", 3999), ("frames", 11)])
def test_another_length_is_refused(labels, audio, unit, number):
    assert len(read(labels, audio, 0, 2, samples=4000, frames=10)) == 10
    with pytest.raises(StaleLabels, match=rf"u0-2: has {number} {unit} here, its frame labels in \S+ were made of"):
        read(labels, audio, 0, 2, **{unit: number})


def test_a_shard_that_was_not_labelled_is_refused(labels, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    with open_shard(shard_path(folder, 0), sample_rate=16000) as writer:
        writer.add("new", np.full(4000, 0.1, np.float32), {"text": "a"})
    with pytest.raises(StaleLabels, match=r"has no frame labels for the utterances in it; run cluster_labels"):
        read(labels, folder, 0, 0)


def test_an_utterance_that_was_not_labelled_is_a_bad_one_and_not_the_end(labels, audio):
    with pytest.raises(ValueError, match=r"u1-3: has no frame labels") as caught:
        read(labels, audio, 1, UNLABELLED)
    assert not isinstance(caught.value, StaleLabels)
    batch = AudioDataset(Corpus.open(str(audio)), labels=labels)[MicroBatch(0, 0, ((1, UNLABELLED), (1, 0)))]
    assert batch.keys == ["u1-0"] and [bad.key for bad in batch.bad] == ["u1-3"]


def test_labels_made_by_another_encoder_are_refused(labels, tmp_path):
    with pytest.raises(StaleLabels, match=r"made by the encoder abc, expected is def; run cluster_labels"):
        FrameLabels.open(tmp_path / "labels", made_by="def")
    with pytest.raises(ValueError, match="no frame labels here; run cluster_labels"):
        FrameLabels.open(tmp_path)


def test_a_killed_writer_leaves_no_label_shard(audio, tmp_path, monkeypatch):
    (tmp_path / "labels").mkdir()

    def killed(handle, array):
        if array.dtype != np.uint16:
            raise KeyboardInterrupt
        handle.write(b"x")

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path / "labels", [audio])
    name = frame_labels.label_shard_name(0, audio / "shard-000000.tar")
    assert name.startswith("00000-shard-000000-") and not frame_labels.is_written(tmp_path / "labels", name)


def test_the_fingerprint_follows_the_labels_and_not_their_place(labels, audio, tmp_path):
    shutil.copytree(tmp_path / "labels", tmp_path / "copy")
    assert FrameLabels.open(tmp_path / "copy").fingerprint == labels.fingerprint
    label(tmp_path / "others", [audio], codes=lambda shard, row: codes_of(shard, row) // 2)
    assert FrameLabels.open(tmp_path / "others").fingerprint != labels.fingerprint


def test_codes_are_counted(labels, audio, tmp_path):
    names = [frame_labels.label_shard_name(shard, shard_path(audio, shard)) for shard in range(2)]
    counts = count_codes(tmp_path / "labels", names, codes=CODES)
    every = [codes_of(s, r) for s in range(2) for r in range(UTTERANCES) if (s, r) != (1, UNLABELLED)]
    assert counts.tolist() == np.bincount(np.concatenate(every), minlength=CODES).tolist()


# ---- in batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_carries_its_labels_padded(labels, audio, num_workers):
    corpus = Corpus.open(str(audio))
    plan = Plan(corpus, PlanConfig(max_seconds=1.0), seed=1, micro_batches_per_step=1)
    planned = PlannedBatches(plan, AudioDataset(corpus, labels=labels))
    micro_batches = [micro_batch for step in plan.steps(epochs=1) for micro_batch in step.micro_batches]
    seen = 0
    for batch in make_loader(planned, micro_batches, num_workers=num_workers):
        batch = batch.to("cpu")
        assert batch.labels_BT.dtype == batch.label_lengths_B.dtype == torch.int64
        for key, labels_T, length in zip(batch.keys, batch.labels_BT, batch.label_lengths_B.tolist()):
            shard, row = int(key[1]), int(key[3])
            assert labels_T[:length].tolist() == codes_of(shard, row).tolist()
            assert (labels_T[length:] == NO_LABEL).all()
            seen += 1
    assert seen == 2 * UTTERANCES - 1


def test_the_stand_in_has_no_labels_and_a_set_without_labels_has_none(labels, audio):
    corpus = Corpus.open(str(audio))
    batch = AudioDataset(corpus, labels=labels)[MicroBatch(0, 0, ())]
    assert batch.keys == [STAND_IN_KEY] and batch.labels_BT.shape == (1, 0) and batch.label_lengths_B.tolist() == [0]
    batch = AudioDataset(corpus)[MicroBatch(0, 0, ((0, 0),))].to("cpu")
    assert batch.labels_BT is None and batch.label_lengths_B is None


def test_stale_labels_end_the_run_instead_of_being_counted_as_bad(labels, audio):
    speak(audio, loudness=0.3)
    for tar in audio.glob("*.tar"):
        write_index(tar)
    with pytest.raises(StaleLabels, match="u0-0: its audio has changed"):
        AudioDataset(Corpus.open(str(audio)), labels=labels)[MicroBatch(0, 0, ((0, 0),))]


def test_noise_may_be_mixed_to_labelled_audio_and_its_speed_may_not_change(labels, audio):
    corpus = Corpus.open(str(audio))
    AudioDataset(corpus, labels=labels, augment=AugmentConfig(noise_probability=1.0, noise_data=[str(audio)]))
    with pytest.raises(ValueError, match=r"speed_probability is 0.5 with frame labels.*set it to 0"):
        AudioDataset(corpus, labels=labels, augment=AugmentConfig(speed_probability=0.5))
