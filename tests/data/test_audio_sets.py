"""Sets of audio: training is shuffled and augmented, validation is neither, and both keep the config's limits."""

import json

import numpy as np
import pytest
import soundfile
import torch

from seedling.data.audio_sets import AudioDataConfig, heldout
from seedling.data.augment import AugmentConfig
from seedling.data.plan import PlanLimits
from seedling.data.prepare import prepare

LIMITS = {"micro_batch_seconds": 4.0, "micro_batches": 2, "sample_rate": 16000, "require_text": True}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 utterances of 0.5 to 1.4 s of noise in two shards; the text is the utterance's number."""
    folder = tmp_path_factory.mktemp("corpus")
    lines, draws = [], np.random.default_rng(0)
    for i in range(24):
        seconds = 0.5 + 0.1 * (i * 7 % 10)
        soundfile.write(folder / f"{i}.wav", 0.1 * draws.standard_normal(round(16000 * seconds)), 16000)
        lines.append({"audio_filepath": f"{i}.wav", "duration": seconds, "text": f"number {i}"})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(folder / "all.jsonl", folder / "shards", shard_seconds=12)
    return folder / "shards"


def epoch(planned) -> list:
    """Return the batches of the first epoch, in order."""
    return [planned.dataset[mb] for step in planned.plan.steps(epochs=1) for mb in step.micro_batches]


def texts(batches) -> list[str]:
    return [text for batch in batches for text in batch.texts]


def test_training_and_validation_see_every_utterance_once_in_different_orders(shards):
    data = AudioDataConfig(train=[str(shards)], valid={"dev": str(shards)})
    train, valid = data.training(seed=1, **LIMITS), data.validation(**LIMITS)
    assert list(valid) == ["dev"]
    seen, held = texts(epoch(train)), texts(epoch(valid["dev"]))
    assert sorted(seen) == sorted(held) == sorted(f"number {i}" for i in range(24))
    assert seen != held
    assert texts(epoch(data.training(seed=2, **LIMITS))) != seen
    assert texts(epoch(data.validation(**LIMITS)["dev"])) == held


def test_micro_batches_keep_to_the_limits_of_the_config(shards):
    data = AudioDataConfig(train=[str(shards)], limits=PlanLimits(max_utterance_seconds=1.0, min_seconds=0.6))
    planned = data.training(seed=1, **LIMITS)
    batches = epoch(planned)
    assert all(batch.waveforms_BN.numel() / 16000 <= 4.0 for batch in batches)
    lengths = torch.cat([batch.lengths_B for batch in batches]) / 16000
    assert lengths.min() > 0.59 and lengths.max() < 1.01
    assert planned.plan.summary().num_refused == 24 - len(lengths) > 0


def test_speed_perturbation_is_for_training_only_and_the_plan_leaves_room_for_it(shards):
    augment = AugmentConfig(speed_probability=1.0, speed_factors=[0.8])
    data = AudioDataConfig(train=[str(shards)], valid={"dev": str(shards)}, augment=augment)
    train, valid = epoch(data.training(seed=1, **LIMITS)), epoch(data.validation(**LIMITS)["dev"])
    assert sum(b.seconds for b in train) == pytest.approx(1.25 * sum(b.seconds for b in valid), rel=1e-3)
    assert max(batch.waveforms_BN.numel() / 16000 for batch in train) <= 4.0


def test_heldout_without_text_is_bad_only_where_text_is_required(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(16000), 16000)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": "a.wav", "duration": 1.0, "text": ""}))
    prepare(tmp_path / "m.jsonl", tmp_path / "shards")
    limits = {"micro_batch_seconds": 4.0, "micro_batches": 1, "sample_rate": 16000}
    for required, bad in ((True, ["its text is empty"]), (False, [])):
        (batch,) = epoch(heldout(str(tmp_path / "shards"), PlanLimits(), require_text=required, **limits))
        assert [b.reason for b in batch.bad] == bad


def test_training_without_a_folder_says_how_to_name_one():
    with pytest.raises(ValueError, match=r"data\.train is empty.*data\.train=\[DIR\]"):
        AudioDataConfig().training(seed=1, **LIMITS)


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        AudioDataConfig(valid={"dev": str(tmp_path)}).validation(**LIMITS)


def test_no_validation_set_is_an_empty_choice():
    assert AudioDataConfig(train=["x"]).validation(**LIMITS) == {}
