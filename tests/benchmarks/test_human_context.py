"""The table of rare-word lists says what was measured, and the German words come from training alone."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "human_context.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("human_context", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["human_context"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["human_context"]


def entry(wer: float, *, recall: float, strict: float | None = None, echo: float | None = None) -> dict:
    """What context.json says of a condition."""

    def interval(percent: float) -> dict:
        return {"percent": [percent - 1, percent + 1]}

    def ratio(fraction: float | None) -> dict:
        return {"fraction": fraction, "interval": None if fraction is None else interval(100 * fraction)}

    fractions = {"b_wer": wer / 50, "u_wer": wer / 200, "recall": recall, "strict_recall": strict, "echo_rate": echo}
    rates = {name: ratio(fraction) for name, fraction in fractions.items()}
    chance = {"echo_rate": ratio(None if echo is None else echo / 2)}
    has_context = 0 if echo is None else 10
    headline = {"percent": wer, "interval": interval(wer)}
    return {"wer": headline, "with_context": has_context, "rates": rates, "chance": chance}


def test_the_table_has_a_row_without_a_list_and_one_per_list_and_search(benchmark):
    none = entry(20.0, recall=0.5, strict=0.0)
    joint = {"none": none, "right_20": entry(10.0, recall=0.75, strict=0.5, echo=0.02)}
    plain = {"none": none, "right_20": entry(30.0, recall=0.8, strict=0.6, echo=0.4)}
    assert benchmark.table({"reader": {"joint": joint, "plain": plain}}).splitlines() == [
        "| set | list | search | WER | B-WER | U-WER | recall | strict recall | echo | echo by chance |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| reader | none |  | 20.0 [19.0, 21.0] | 40.0 [39.0, 41.0] | 10.0 [9.0, 11.0] | 50.0 [49.0, 51.0] |  |  |  |",
        "| reader | right 20 | joint | 10.0 [9.0, 11.0] | 20.0 [19.0, 21.0] | 5.0 [4.0, 6.0] | 75.0 [74.0, 76.0] "
        "| 50.0 [49.0, 51.0] | 2.0 [1.0, 3.0] | 1.0 [0.0, 2.0] |",
        "| reader | right 20 | plain | 30.0 [29.0, 31.0] | 60.0 [59.0, 61.0] | 15.0 [14.0, 16.0] | 80.0 [79.0, 81.0] "
        "| 60.0 [59.0, 61.0] | 40.0 [39.0, 41.0] | 20.0 [19.0, 21.0] |",
    ]


def test_german_words_are_those_of_training_and_are_written_once(benchmark, tmp_path):
    (tmp_path / "inputs").mkdir()
    rows = [{"text": "ich danke ihm"}, {"text": "es gibt arten"}]
    (tmp_path / "inputs/kerstin_de.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    benchmark.write_words(tmp_path)
    written = tmp_path / "context/words_de.txt"
    before = written.stat().st_mtime_ns
    benchmark.write_words(tmp_path)
    assert written.read_text() == "ich danke ihm\nes gibt arten\n" and written.stat().st_mtime_ns == before


def test_every_set_is_decoded_by_both_searches_under_right_and_wrong_lists(benchmark, monkeypatch, tmp_path):
    from seedling.launch.pipeline_config import load_pipeline

    monkeypatch.setenv("SEEDLING_SPEECH", str(tmp_path))
    pipeline = load_pipeline("human_context", overrides=[f"run_dir={tmp_path}/context"])
    steps = {step.name: step for step in pipeline.steps}
    for name in benchmark.SETS:
        for search in benchmark.SEARCHES:
            config = steps[f"{name}_{search}"].reads["config"]
            assert config["decode"]["context_search"] == search and config["data"].endswith(f"dev_{name}")
            conditions = {f"{kind}_{size}" for kind in ("right", "wrong") for size in (20, 100, 500)}
            assert {*config["contexts"]} == conditions
            assert all(folder.endswith(f"{key}_{name}") for key, folder in config["contexts"].items())
