"""The corpus is disjoint in voice and sentence, complete after a kill, and the same for any number of jobs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seedling.data import demo_corpus, demo_text
from seedling.data.demo_corpus import DEMO_ACCENTS, Statistics, generate, plan, statistics, voices
from seedling.data.synthesis import VARIANTS

SETTINGS = {"hours": 0.02, "heldout_utterances": 12, "lm_sentences": 2000, "seed": 3}
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    pytest.importorskip("espeakng_loader", reason="espeak-ng comes from the extra `demo`")
    return generate(tmp_path_factory.mktemp("demo") / "corpus", **SETTINGS, jobs=2)


def rows(corpus: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{split}.jsonl").read_text().splitlines()]


def test_manifests_describe_audio_that_is_there(corpus):
    assert len(rows(corpus, "dev")) == len(rows(corpus, "test")) == 12
    listed = set()
    for row in (row for split in SPLITS for row in rows(corpus, split)):
        info = soundfile.info(corpus / row["audio_filepath"])
        assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
        assert info.frames / 16_000 == row["duration"] and 0.8 < row["duration"] < 8
        assert row["lang"] == "en" and all(keyword in row["text"] for keyword in row["keywords"])
        listed.add(row["audio_filepath"])
    assert listed == {path.relative_to(corpus).as_posix() for path in corpus.rglob("*.flac")}


def test_audio_is_neither_clipped_nor_silent(corpus):
    for row in rows(corpus, "train"):
        wave, _ = soundfile.read(corpus / row["audio_filepath"], dtype="float32")
        level_db = 20 * np.log10(np.sqrt(np.mean(wave**2)))
        assert np.abs(wave).max() <= 0.991 and -33 < level_db < -17, row


def test_splits_share_neither_voice_nor_variant_nor_sentence(corpus):
    seen: dict[str, dict[str, set]] = {"voice": {}, "variant": {}, "sentence": {}}
    for split in SPLITS:
        found = rows(corpus, split)
        seen["voice"][split] = {row["speaker"] for row in found}
        seen["variant"][split] = {row["speaker"].partition("+")[2] for row in found}
        seen["sentence"][split] = {demo_text.spoken_form(row["text"]) for row in found}
        assert len(seen["sentence"][split]) == len(found)
    for what, sets in seen.items():
        for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
            assert not sets[one] & sets[other], f"{one} and {other} share a {what}"


def test_language_model_text_has_all_training_sentences_and_no_held_out_one(corpus):
    lines = (corpus / "lm_text.txt").read_text().splitlines()
    train = [row["text"] for row in rows(corpus, "train")]
    assert lines[: len(train)] == train and len(lines) == len(train) + 2000
    held_out = {demo_text.spoken_form(row["text"]) for split in ("dev", "test") for row in rows(corpus, split)}
    assert not held_out & {demo_text.spoken_form(line) for line in lines}


def test_names_that_sound_alike_are_written_as_groups(corpus):
    groups = json.loads((corpus / "homophones.json").read_text())
    assert ["marc", "mark"] in groups and [tuple(group) for group in groups] == list(demo_text.HOMOPHONES)


def test_a_complete_corpus_is_left_alone(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # so that speaking would fail
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert generate(corpus, **SETTINGS, jobs=1) == corpus
    assert before == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}


def test_a_killed_run_goes_on_and_ends_as_one_never_killed(corpus, tmp_path):
    out = tmp_path / "corpus"
    program = f"from seedling.data.demo_corpus import generate; generate({str(out)!r}, jobs=1, **{SETTINGS})"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    first = out / "parts" / "train-000000.jsonl"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists() and not (out / "test.jsonl").exists()

    kept = {path: path.stat().st_mtime_ns for path in (out / "audio" / "train").iterdir()}
    generate(out, **SETTINGS, jobs=1)
    assert kept == {path: path.stat().st_mtime_ns for path in (out / "audio" / "train").iterdir()}
    names = sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    for name in names:
        assert (out / name).read_bytes() == (corpus / name).read_bytes(), name


def test_other_settings_replace_the_corpus(corpus, tmp_path):
    small = {**SETTINGS, "hours": 0.002, "heldout_utterances": 2, "lm_sentences": 5}
    out = generate(tmp_path / "corpus", **small, jobs=1)
    texts = [row["text"] for row in rows(out, "test")]
    generate(out, **{**small, "seed": 4, "heldout_utterances": 1}, jobs=1)
    assert len(rows(out, "test")) == 1 and rows(out, "test")[0]["text"] not in texts
    assert len(list((out / "audio" / "test").iterdir())) == 1


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(ValueError, match="not empty and holds no demo corpus"):
        generate(tmp_path, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("wrong", [{"hours": 0}, {"jobs": 0}, {"heldout_utterances": 0}])
def test_settings_without_meaning_are_refused_by_name(tmp_path, wrong):
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(wrong))} (0)")):
        generate(tmp_path / "corpus", **wrong)


def test_training_hours_are_met_within_a_few_percent(corpus):
    assert statistics(corpus / "train.jsonl").hours == pytest.approx(SETTINGS["hours"], rel=0.08)


def test_held_out_sentences_do_not_depend_on_the_hours():
    short, long = (plan(hours=hours, heldout_utterances=40, seed=0) for hours in (0.01, 0.5))
    assert short["test"] == long["test"] and short["dev"] == long["dev"]
    assert short["train"] == long["train"][: len(short["train"])]


def test_every_voice_belongs_to_one_split_and_speaks_equally_often():
    everybody = [voice for split in SPLITS for voice in voices(split)]
    assert sorted(everybody) == sorted(f"{accent}+{variant}" for accent in DEMO_ACCENTS for variant in VARIANTS)
    said = [utterance.voice for utterance in plan(hours=0.5, heldout_utterances=64, seed=0)["test"]]
    assert {said.count(voice) for voice in voices("test")} == {64 // len(voices("test"))}


def test_statistics_are_totals_of_the_manifest(tmp_path):
    manifest = tmp_path / "m.jsonl"
    made = [("call mark", 1.0, "a"), ("call mark now please", 3.0, "b"), ("stop", 2.0, "a")]
    manifest.write_text("".join(json.dumps({"text": t, "duration": d, "speaker": s}) + "\n" for t, d, s in made))
    assert statistics(manifest) == Statistics(3, 6 / 3600, 2.0, 7 / 6, 5, 2)
    manifest.write_text("")
    with pytest.raises(ValueError, match=r"m\.jsonl holds no utterance"):
        statistics(manifest)


def test_a_process_that_fails_fails_the_run(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="espeak-ng comes from the extra `demo`")
    monkeypatch.setattr(demo_corpus, "DEMO_ACCENTS", ("en-gb",))  # an accent that espeak-ng does not have
    with pytest.raises(RuntimeError, match="ended with code 1"):
        generate(tmp_path / "corpus", **SETTINGS, jobs=1)
    assert not (tmp_path / "corpus" / "train.jsonl").exists()
