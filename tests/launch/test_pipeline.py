"""Pipelines: steps are real processes, unchanged ones are skipped, a failing one stops the rest with its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from range_server import serving

from seedling.data import host
from seedling.launch.fingerprint import fingerprint, paths_in
from seedling.launch.pipeline import digest, metrics_of, placement_of_step, run_pipeline, shown
from seedling.launch.pipeline_config import Step, load_pipeline, yaml_argument
from seedling.launch.placement import Placement
from seedling.launch.process import Ended, child_environment
from seedling.stages.runtime.config import ConfigError, parse_override
from seedling.stages.runtime.rendezvous import RANK_VARIABLES

HERE = Path(__file__).parent
TWO_STEPS = """
name: toy
run_dir: runs/toy
steps:
  - {name: one, stage: "toy_stages:Count", config: count}
  - {name: two, stage: "toy_stages:Count", inputs: {first: "${one}"}, set: {number: 10}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the pipeline of TWO_STEPS, the toy stages importable here and in the steps' processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    (tmp_path / "toy.yaml").write_text(TWO_STEPS)
    (tmp_path / "count.yaml").write_text("number: 1\n")
    return tmp_path


def run(*overrides: str, start: str | None = None) -> tuple[int, list[str]]:
    """Run the toy pipeline; return its exit code and the steps that were not skipped."""
    before = {path: path.stat().st_mtime_ns for path in Path("runs/toy").glob("*/artifact/manifest.json")}
    code = run_pipeline(load_pipeline("toy.yaml", overrides=overrides), start=start)
    after = {path: path.stat().st_mtime_ns for path in Path("runs/toy").glob("*/artifact/manifest.json")}
    return code, [
        path.parts[2] for path in sorted(after) if before.get(path) != after[path] and "." not in path.parts[2]
    ]


def number(step: str) -> int:
    return int(Path(f"runs/toy/{step}/artifact/number.txt").read_text())


def test_steps_run_once_and_again_only_where_something_changed(folder, capfd):
    assert run() == (0, ["one", "two"])
    assert (number("one"), number("two")) == (1, 11)
    summary = json.loads(Path("runs/toy/summary.json").read_text())
    assert summary["stages"]["two"]["wer"] == 0.11 and summary["stages"]["one"]["seconds"] > 0
    assert Path("runs/toy/report.html").read_text() == "<p>11</p>"
    table = capfd.readouterr().out
    assert "wer 11.00 %" in table

    assert run() == (0, [])
    assert "unchanged" in capfd.readouterr().out
    assert json.loads(Path("runs/toy/summary.json").read_text()) == summary

    assert run("two.number=20") == (0, ["two"])
    assert number("two") == 21 and Path("runs/toy/two.1/artifact/number.txt").read_text() == "11"

    # A change upstream that gives another result reaches everything below it.
    (folder / "count.yaml").write_text("number: 5\n")
    assert run("two.number=20") == (0, ["one", "two"])
    assert number("two") == 25


def test_from_forces_a_step_and_all_after_it_and_a_deleted_output_is_made_again(folder):
    assert run()[0] == 0
    assert run(start="two") == (0, ["two"])
    Path("runs/toy/two/artifact/manifest.json").unlink()
    assert run() == (0, ["two"])
    with pytest.raises(ValueError, match="--from three: no such step; steps: one, two"):
        run(start="three")


def test_a_failing_step_stops_the_pipeline_with_its_code_and_goes_on_in_its_folder(folder, capfd):
    assert run("two.fail=mistake") == (2, ["one"])
    said = "stopped at step two (exit code 2); to go on: seedling pipeline toy.yaml two.fail=mistake (finished"
    assert said in capfd.readouterr().err
    Path("runs/toy/two/checkpoint").touch()
    assert run("two.fail=mistake") == (2, [])
    assert Path("runs/toy/two/checkpoint").exists() and not Path("runs/toy/two.1").exists()


def test_an_outage_of_the_data_server_moves_no_checkpoint_aside(folder, monkeypatch):
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
    monkeypatch.setattr(host, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("seedling.launch.pipeline.run_child", lambda *_, **__: Ended(2, asked=False))
    listing, step = folder / "served" / "train" / "shards.npy", Path("runs/toy/one")
    listing.parent.mkdir(parents=True)
    listing.write_bytes(b"one")
    with serving(folder / "served") as server:
        settings = [f"one.data={server.url}/train", "one.remote.tries=3", f"one.remote.cache_dir={folder}/cache"]
        assert run(*settings) == (2, [])
        step.mkdir()
        (step / "checkpoint").touch()
        for fault, said in ((503, "no good answer in 3 tries"), (403, "does not let this job read it")):
            server.always = fault
            with pytest.raises(ValueError, match=f"{server.url}/train/shards.npy: .*{said}"):
                run(*settings)
        server.always = None
        server.faults.extend([503, "cut"])  # what may pass is waited for
        assert run(*settings) == (2, [])
        assert (step / "checkpoint").exists() and not step.with_name("one.1").exists()
        listing.write_bytes(b"two")
        assert run(*settings) == (2, [])
        assert (step.with_name("one.1") / "checkpoint").exists(), "another corpus is another step"


def test_a_stopped_pipeline_stops_its_step_and_runs_nothing_more(folder):
    command = [sys.executable, "-m", "seedling.launch.cli", "pipeline", "toy.yaml", "one.sleep_seconds=3600"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, stderr=subprocess.PIPE) as pipeline:
        try:
            deadline = time.monotonic() + 600
            while not Path("runs/toy/one/config.yaml").exists():
                assert time.monotonic() < deadline and pipeline.poll() is None
                time.sleep(0.1)
            pipeline.send_signal(signal.SIGTERM)
            assert pipeline.wait(timeout=600) == 128 + signal.SIGTERM  # long before the step would end by itself
            assert b"stopped at step one" in pipeline.stderr.read()
        finally:
            pipeline.kill()
    assert not Path("runs/toy/two").exists()


def test_a_changed_file_that_a_config_names_makes_its_step_run_again(folder):
    (folder / "words.txt").write_text("a\n")
    step = load_pipeline("toy.yaml", overrides=["two.text=words.txt"]).steps[1]
    before = digest(step)
    assert digest(step) == before
    (folder / "words.txt").write_text("b\n")
    assert digest(step) != before


@pytest.mark.parametrize("source", ["corpus/train.jsonl", "./corpus"])
def test_audio_that_a_manifest_names_and_that_was_replaced_is_prepared_again(folder, source):
    (folder / "corpus").mkdir()
    (folder / "elsewhere").mkdir()
    audio = folder / "elsewhere/a.wav"
    audio.write_bytes(b"one")
    lines = [f'{{"audio_filepath": "{audio}", "offset": {at}, "duration": 1, "text": "a"}}\n' for at in (0, 1)]
    lines += ["not a line of JSON\n", '{"audio_filepath": "missing.wav", "text": "b"}\n']
    (folder / "corpus/train.jsonl").write_text("".join(lines))
    step = Step("shards", "prepare", [], None, {"command": "prepare", "arguments": [source], "options": {}})
    before = digest(step)
    assert digest(step) == before
    (folder / "elsewhere/b.wav").write_bytes(b"not in the manifest")
    assert digest(step) == before
    audio.write_bytes(b"two")
    os.utime(audio, ns=(0, 0))  # the clock by which files are dated may not have gone on since
    replaced = digest(step)
    assert replaced != before
    audio.unlink()
    assert digest(step) not in (before, replaced)


def test_commands_get_their_arguments_options_and_output_folder(folder):
    (folder / "data.yaml").write_text(
        "name: data\nrun_dir: out\nsteps:\n"
        "  - {name: corpus, command: demo-corpus, set: {hours: 0.1, lm_sentences: 5}}\n"
        '  - {name: shards, command: prepare, args: ["${corpus}/train.jsonl"], set: {jobs: 1}}\n'
        '  - {name: words, command: transcribe, args: [model, "${corpus}/*.wav"], set: {json: true}}\n'
    )
    corpus, shards, words = load_pipeline("data", overrides=["corpus.hours=0.2"]).steps
    assert corpus.arguments == ["demo-corpus", "--out", "out/corpus", "--hours", "0.2", "--lm-sentences", "5"]
    assert shards.arguments == ["prepare", "out/corpus/train.jsonl", "--out", "out/shards", "--jobs", "1"]
    assert words.arguments == ["transcribe", "model", "out/corpus/*.wav", "--json"] and words.output is None


def test_run_dir_and_environment_can_be_referred_to(folder, monkeypatch):
    monkeypatch.setenv("SPEECH", "/some/where")
    text = TWO_STEPS + '  - {name: p, command: prepare, args: ["${oc.env:SPEECH}/x", "${run_dir}/y"]}\n'
    (folder / "toy.yaml").write_text(text)
    pipeline = load_pipeline("toy", overrides=["run_dir=elsewhere", "nproc=2", "two.nproc=3"])
    steps = pipeline.steps
    assert steps[2].arguments[1:3] == ["/some/where/x", "elsewhere/y"]
    placed = [placement_of_step(step, Placement(nproc=pipeline.nproc)) for step in steps]
    assert placed == [["--nproc", "2"], ["--nproc", "3"], []]
    assert "inputs.first=elsewhere/one/artifact" in steps[1].arguments


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("${one}", "${oen}", "step two: ${oen} is no earlier step with an output; nearest: ${one}"),
        ("${one}", "${two}", "step two: ${two} is no earlier step"),
        ("${one}", "${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE is not set"),
        ("number: 10", "numbr: 10", "step two: override numbr=10: unknown key; nearest valid key: number"),
        ("number: 10", "number: -10", "number (-10) must not be negative"),
        ("inputs:", "input:", "steps[1].input"),
        ('stage: "toy_stages:Count", inputs', "command: prepaer, inputs", "command = prepaer: choose one of"),
        ("name: two", "name: one", "one appears twice"),
        ("name: two", "name: a/b", "step a/b: a name has letters"),
        ("config: count", "config: cuont", "cuont: no such file"),
        ("steps:", "stepz:", "nearest valid key: steps"),
    ],
)
def test_mistakes_anywhere_are_found_before_the_first_step(folder, old, new, said):
    assert old in TWO_STEPS
    (folder / "toy.yaml").write_text(TWO_STEPS.replace(old, new))
    with pytest.raises((ConfigError, FileNotFoundError)) as caught:
        load_pipeline("toy.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_for_a_step_that_is_not_there_names_the_nearest(folder):
    with pytest.raises(ConfigError, match="nearest step: two"):
        load_pipeline("toy.yaml", overrides=["tow.number=1"])
    with pytest.raises(ConfigError, match=r"expected STEP\.key=value"):
        load_pipeline("toy.yaml", overrides=["number=1"])


@pytest.mark.parametrize(
    "value", ["plain/path", "no", "1e3", "null", "a: b", "a = b", "", " x", "[1]", "é", {"a": 1}, 1.5]
)
def test_values_survive_the_way_through_a_command_line(value):
    assert parse_override(f"key={yaml_argument(value)}").values["key"] == value


def test_fingerprints_follow_content_and_paths_are_told_from_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "llm", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "corpus/a.index.npy").write_bytes(b"1")
    (tmp_path / "corpus/a.tar").write_bytes(b"x")
    before = fingerprint("corpus")
    (tmp_path / "corpus/a.tar").write_bytes(b"touched, index unchanged")
    assert fingerprint("corpus") == before != fingerprint("llm")
    (tmp_path / "corpus/a.index.npy").write_bytes(b"2")
    assert fingerprint("corpus") != before and fingerprint("nowhere") == "absent"
    values = {"data": ["./corpus", "./*llm"], "word": "model", "n": 1, "absent": "no/where"}
    assert list(paths_in(values)) == ["./corpus", "./llm"]


def test_rates_are_shown_in_percent():
    assert shown("wer", 0.1234) == shown("wer_low", 0.1234) == "12.34 %"
    assert shown("rtf", 0.1234) == "0.1234" and shown("utterances", 12345) == "12,345"


def test_a_prepared_corpus_is_reported_by_its_utterances_and_hours(tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps({"utterances": 12, "seconds": 7200.0, "kind": "nemo"}))
    assert metrics_of(Step("s", "prepare", [], tmp_path, {})) == {"utterances": 12, "hours": 2.0}
    assert metrics_of(Step("s", "transcribe", [], None, {})) == {}


def test_a_step_does_not_inherit_the_job_that_its_parent_is_a_rank_of(monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "1")
    assert not set(RANK_VARIABLES) & set(child_environment())
