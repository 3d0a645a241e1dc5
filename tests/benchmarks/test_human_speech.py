"""The benchmark on recorded speech may not learn what it is scored on, and its table says what was measured."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "human_speech.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("human_speech", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["human_speech"] = module  # dataclasses and NamedTuples look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["human_speech"]


@pytest.fixture
def held_out(benchmark):
    return benchmark.HeldOut(sentences=["Will we ever forget it?", "go on"], strings=["one two", "nine", "صفر واحد"])


@pytest.mark.parametrize(
    "text",
    [
        "will we ever forget it",
        "Will we ever, forget it!",
        "said he will we ever forget it",
        "go on",
        "one two",
        "صفر واحد",
    ],
)
def test_a_dev_sentence_is_found_alone_in_other_writing_and_within_a_text(held_out, text):
    assert held_out.holds(text)


@pytest.mark.parametrize(
    "text", ["will we ever forget", "they will we ever forget items", "go on then", "nine", "one two three", "two one"]
)
def test_what_only_shares_words_with_a_dev_set_is_kept(held_out, text):
    assert not held_out.holds(text)


def test_pieces_are_the_text_in_2_to_20_words_each(benchmark):
    draw = random.Random(0)
    for length in range(2, 200):
        words = [f"w{i}" for i in range(length)]
        cut = list(benchmark.pieces(" ".join(words), draw=draw))
        assert " ".join(cut).split() == words
        # A rest too short to stand alone goes with the piece before it.
        assert all(2 <= len(piece.split()) <= 21 for piece in cut)


def test_digit_strings_avoid_the_dev_strings(benchmark, held_out):
    drawn = list(benchmark.digit_strings(["one", "two"], count=500, draw=random.Random(0), held_out=held_out))
    assert len(drawn) == 500 and "one two" not in drawn and {"two one", "one", "two"} <= {*drawn}
    assert {len(text.split()) for text in drawn} == set(range(1, 8))


def test_validation_sentences_are_not_trained_on(benchmark):
    sentences = ["a b", "c d", "a b", "e f", "g h"]
    assert benchmark.set_apart(sentences, count=2) == (["a b", "a b", "g h"], ["c d", "e f"])


def test_the_table_has_a_row_per_set_and_a_column_per_baseline(benchmark):
    def summary(wer: float) -> dict:
        interval = {"percent": [wer - 1, wer + 1]}
        rates = {"wer": {"percent": wer, "interval": interval}, "cer": {"percent": wer / 2, "interval": interval}}
        return {"utterances": 1234, "seconds": 5400.0, "rates": rates}

    own = {"digits": summary(10.0), "german": summary(30.0)}
    baselines = {
        "untrained": {"digits": summary(100.0), "german": summary(250.0)},
        "text only": {"digits": summary(90.0), "german": summary(95.0)},
    }
    assert benchmark.table(own, baselines).splitlines() == [
        "| set | utterances | hours | WER [95 %] | CER | WER untrained | WER text only |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| digits | 1,234 | 1.50 | 10.0 [9.0, 11.0] | 5.0 | 100.0 | 90.0 |",
        "| german | 1,234 | 1.50 | 30.0 [29.0, 31.0] | 15.0 | 250.0 | 95.0 |",
    ]


def test_the_inputs_give_no_dev_text_away_and_are_written_once(benchmark, speech_dir, tmp_path):
    out = tmp_path / "inputs"

    def write() -> None:
        benchmark.write_inputs(speech_dir, out, strings=4, seed=0, quick=True)

    write()
    dev = {
        benchmark.spoken(utterance.text)
        for name, manifest in benchmark.DEV.items()
        for utterance in benchmark.read_set(speech_dir, name, manifest)
    }
    dev = {text for text in dev if " " in text}
    texts = [*(out / "lm_text.txt").read_text().splitlines(), *(out / "lm_valid.txt").read_text().splitlines()]
    manifests = sorted(out.glob("*.jsonl"))
    assert len(manifests) == len(benchmark.TRAIN) + len(benchmark.COMPOSED)
    rows = [json.loads(line) for manifest in manifests for line in manifest.read_text().splitlines()]
    texts += [row["text"] for row in rows]
    assert len(texts) > 10_000 and not dev & set(texts)
    assert len({row["id"] for row in rows}) == len(rows), "two utterances have the same id"
    assert all((out / row["audio_filepath"]).is_file() for row in rows)
    written = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    write()
    assert written == {file: file.stat().st_mtime_ns for file in out.rglob("*")}
