"""The corpus is disjoint in voice and sentence, complete after a kill, and the same for any number of jobs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seedling.data import demo_plan
from seedling.data.demo_corpus import Statistics, generate, statistics
from seedling.data.demo_plan import LANGUAGES

SETTINGS = {
    "hours": 0.02,
    "mandarin_hours": 0.01,
    "rl_hours": 0.01,
    "heldout_utterances": 12,
    "lm_sentences": 2000,
    "seed": 3,
}
TRAINED = ("train", "rl")
MANIFESTS = (*TRAINED, "dev", "test", "dev_zh", "test_zh")
PARTS = {"train": TRAINED, "dev": ("dev", "dev_zh"), "test": ("test", "test_zh")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    pytest.importorskip("espeakng_loader", reason="espeak-ng comes from the extra `demo`")
    return generate(tmp_path_factory.mktemp("demo") / "corpus", **SETTINGS, jobs=2)


def rows(corpus: Path, manifest: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{manifest}.jsonl").read_text(encoding="utf-8").splitlines()]


def spoken_form(row: dict) -> str:
    return LANGUAGES[row["lang"]].grammar.spoken_form(row["text"])


def test_manifests_describe_audio_that_is_there(corpus):
    assert [len(rows(corpus, manifest)) for manifest in MANIFESTS[2:]] == [12, 12, 4, 4]
    listed = set()
    for row in (row for manifest in MANIFESTS for row in rows(corpus, manifest)):
        info = soundfile.info(corpus / row["audio_filepath"])
        assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
        assert info.frames / 16_000 == row["duration"] and 0.8 < row["duration"] < 8
        assert all(keyword in row["text"] for keyword in row["keywords"])
        listed.add(row["audio_filepath"])
    assert listed == {path.relative_to(corpus).as_posix() for path in corpus.rglob("*.flac")}


def test_languages_are_mixed_in_training_only(corpus):
    langs = {manifest: [row["lang"] for row in rows(corpus, manifest)] for manifest in MANIFESTS}
    assert {name: set(found) for name, found in langs.items()} == {
        "train": {"en", "zh"}, "rl": {"en", "zh"}, "dev": {"en"}, "test": {"en"}, "dev_zh": {"zh"}, "test_zh": {"zh"},
    }  # fmt: skip
    for name in TRAINED:
        half = len(langs[name]) // 2
        assert abs(langs[name][:half].count("zh") - langs[name][half:].count("zh")) <= 1
    for manifest in MANIFESTS:
        for row in rows(corpus, manifest):
            assert row["text"].isascii() == (row["lang"] == "en") == (not row["speaker"].startswith("cmn+")), row


def test_audio_is_neither_clipped_nor_silent(corpus):
    for row in rows(corpus, "train"):
        wave, _ = soundfile.read(corpus / row["audio_filepath"], dtype="float32")
        level_db = 20 * np.log10(np.sqrt(np.mean(wave**2)))
        assert np.abs(wave).max() <= 0.991 and -33 < level_db < -17, row


def test_parts_share_neither_voice_nor_variant_nor_sentence(corpus):
    seen: dict[str, dict[str, set]] = {"voice": {}, "variant": {}, "sentence": {}}
    for part, manifests in PARTS.items():
        found = [row for manifest in manifests for row in rows(corpus, manifest)]
        seen["voice"][part] = {row["speaker"] for row in found}
        seen["variant"][part] = {row["speaker"].partition("+")[2] for row in found}
        seen["sentence"][part] = {spoken_form(row) for row in found}
        assert len(seen["sentence"][part]) == len(found)
    for what, sets in seen.items():
        for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
            assert not sets[one] & sets[other], f"{one} and {other} share a {what}"


def test_language_model_text_has_all_training_sentences_and_no_held_out_one(corpus):
    lines = (corpus / "lm_text.txt").read_text(encoding="utf-8").splitlines()
    train = [row["text"] for row in rows(corpus, "train")]
    assert lines[: len(train)] == train and len(lines) == len(train) + 2000 + 1000
    assert sum(not line.isascii() for line in lines[len(train) :]) == 1000
    held_out = {spoken_form(row) for manifest in MANIFESTS[2:] for row in rows(corpus, manifest)}
    spoken = {LANGUAGES["en" if line.isascii() else "zh"].grammar.spoken_form(line) for line in lines}
    assert not held_out & spoken


@pytest.mark.parametrize(("lang", "name", "group"), [("en", "", ["marc", "mark"]), ("zh", "_zh", ["王芳", "王方"])])
def test_names_that_sound_alike_are_written_as_groups(corpus, lang, name, group):
    groups = json.loads((corpus / f"homophones{name}.json").read_text(encoding="utf-8"))
    assert group in groups
    for group in groups:
        assert len(set(group)) > 1 and len({LANGUAGES[lang].grammar.spoken_form(name) for name in group}) == 1


def test_a_complete_corpus_is_left_alone(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # so that speaking would fail
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert generate(corpus, **SETTINGS, jobs=1) == corpus
    assert before == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}


def test_a_killed_run_goes_on_and_ends_as_one_never_killed(corpus, tmp_path):
    out = tmp_path / "corpus"
    program = f"from seedling.data.demo_corpus import generate; generate({str(out)!r}, jobs=1, **{SETTINGS})"
    first = out / "parts" / "train-000000.jsonl"
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        deadline = time.monotonic() + 600
        while not first.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not (out / "test.jsonl").exists():
            break
        shutil.rmtree(out)  # on a busy machine it may end before we come to kill it
    assert first.exists() and not (out / "test.jsonl").exists()

    kept = {path: path.stat().st_mtime_ns for path in (out / "audio" / "train").iterdir()}
    generate(out, **SETTINGS, jobs=1)
    assert kept == {path: path.stat().st_mtime_ns for path in (out / "audio" / "train").iterdir()}
    names = sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    for name in names:
        assert (out / name).read_bytes() == (corpus / name).read_bytes(), name


def test_other_settings_replace_the_corpus(corpus, tmp_path):
    small = {**SETTINGS, "hours": 0.002, "mandarin_hours": 0.001, "heldout_utterances": 2, "lm_sentences": 5}
    out = generate(tmp_path / "corpus", **small, jobs=1)
    texts = [row["text"] for row in rows(out, "test")]
    assert (out / "rl.jsonl").exists()
    generate(out, **{**small, "seed": 4, "heldout_utterances": 1, "mandarin_hours": 0, "rl_hours": 0}, jobs=1)
    assert not (out / "rl.jsonl").exists()
    assert len(rows(out, "test")) == 1 and rows(out, "test")[0]["text"] not in texts
    assert len(list((out / "audio" / "test").iterdir())) == 1
    assert {row["lang"] for row in rows(out, "train")} == {"en"} and not list(out.rglob("*_zh*"))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(ValueError, match="not empty and holds no demo corpus"):
        generate(tmp_path, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "wrong", [{"hours": 0}, {"mandarin_hours": -1}, {"rl_hours": -1}, {"jobs": 0}, {"heldout_utterances": 0}]
)
def test_settings_without_meaning_are_refused_by_name(tmp_path, wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} ({value})")):
        generate(tmp_path / "corpus", **wrong)


def test_training_hours_are_met_within_a_few_percent(corpus):
    found = statistics(corpus / "train.jsonl")
    assert found["en"].hours == pytest.approx(SETTINGS["hours"], rel=0.08)
    assert found["zh"].hours == pytest.approx(SETTINGS["mandarin_hours"], rel=0.15)
    later = statistics(corpus / "rl.jsonl")
    assert later["en"].hours == pytest.approx(SETTINGS["rl_hours"], rel=0.12)
    share = SETTINGS["mandarin_hours"] / SETTINGS["hours"]
    assert later["zh"].hours / later["en"].hours == pytest.approx(share, rel=0.25)


def test_statistics_are_totals_of_a_manifests_languages(tmp_path):
    manifest = tmp_path / "m.jsonl"
    made = [("call mark", 1.0, "a"), ("call mark now please", 3.0, "b"), ("今天见", 1.5, "c"), ("stop", 2.0, "a")]
    lines = [
        {"text": text, "duration": duration, "speaker": speaker, "lang": "en" if text.isascii() else "zh"}
        for text, duration, speaker in made
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert statistics(manifest) == {
        "en": Statistics(3, 6 / 3600, 2.0, 7 / 6, 5, 2),
        "zh": Statistics(1, 1.5 / 3600, 1.5, 2.0, 3, 1),
    }
    manifest.write_text("")
    with pytest.raises(ValueError, match=r"m\.jsonl holds no utterance"):
        statistics(manifest)


def test_a_process_that_fails_fails_the_run(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="espeak-ng comes from the extra `demo`")
    # An accent that espeak-ng does not have.
    monkeypatch.setitem(demo_plan.LANGUAGES, "en", LANGUAGES["en"]._replace(accents=("en-gb",)))
    with pytest.raises(RuntimeError, match="ended with code 1"):
        generate(tmp_path / "corpus", **SETTINGS, jobs=1)
    assert not (tmp_path / "corpus" / "train.jsonl").exists()
