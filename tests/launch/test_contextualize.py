"""contextualize as its users start it: from the command line, from a pipeline, by a local LLM."""

import json
import shutil

import pytest
import tiny_runs
from tiny_corpus import demo_entries, read_all, write_shards

from seedling.data.contexts.sidecar import Contexts
from seedling.launch.cli import main
from seedling.launch.commands.contextualize import load_contexts_config
from seedling.launch.fingerprint import fingerprint
from seedling.launch.pipeline import metrics_of
from seedling.launch.pipeline_config import load_pipeline
from seedling.launch.stage_lookup import PACKAGED
from seedling.stages.runtime.config import ConfigError

PIPELINE = """
name: toy
run_dir: runs/toy
steps:
  - {name: shards, command: prepare, args: [m.jsonl]}
  - name: contexts
    command: contextualize
    args: ["${shards}"]
    set: SETTINGS
"""


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", demo_entries(60))


def counts_in(folder):
    return json.loads((folder / "contexts.json").read_text())["counts"]


def test_a_sidecar_is_written_and_its_totals_are_printed(shards, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("variants: 3\nlist_size: [1, 3]\n")
    arguments = ["contextualize", str(shards), "variants=2", "--config", str(tmp_path / "c.yaml")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "shares={irrelevant: 1}", "jobs=1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / 'out'}: 120 contexts of 60 utterances, 1 shards: irrelevant 100.0 %")
    assert {len(contexts) for contexts in read_all(Contexts(tmp_path / "out"), shards).values()} == {2}


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["variant=2"], "unknown key; nearest valid key: variants"),
        (["shares={relevant: x}"], "shares.relevant"),
        (["writer=llm", "llm.path=/nowhere"], "/nowhere: not a Hugging Face model folder"),
        (["writer=llm"], "set llm.path"),
        (["writer=endpoint", "endpoint.base_url=foo", "endpoint.model=m"], "endpoint.base_url = foo"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(shards, tmp_path, capsys, overrides, said):
    assert main(["contextualize", str(shards), "--out", str(tmp_path / "out"), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_the_packaged_settings_load_and_the_evaluation_lists_are_of_one_kind():
    files = sorted((PACKAGED / "contextualize").glob("*.yaml"))
    loaded = {file.stem: load_contexts_config(str(file), overrides=[]).config for file in files}
    assert len(loaded) >= 3
    for name, kind in {"right_list": "relevant", "wrong_list": "irrelevant"}.items():
        assert (loaded[name].shares, loaded[name].forms) == ({kind: 1.0}, {"list": 1.0})


def test_a_local_llm_writes_and_its_answers_are_kept(shards, tmp_path):
    llm = tiny_runs.make_llm(tmp_path / "llm")
    settings = ["writer=llm", f"llm.path={llm}", "llm.max_new_tokens=12", "llm.batch_size=7", "variants=2"]
    settings += [
        "shares={relevant: 1, irrelevant: 1}",
        "forms={description: 1, list: 1}",
        f"cache={tmp_path / 'a.jsonl'}",
    ]
    for out in ("one", "two"):
        assert main(["contextualize", str(shards), "--out", str(tmp_path / out), *settings]) == 0
    one, two = counts_in(tmp_path / "one"), counts_in(tmp_path / "two")
    assert one["requests"] == len((tmp_path / "a.jsonl").read_text().splitlines()) > 20
    assert "requests" not in two and two["answers from the cache"] == one["requests"]
    # An untrained LLM names no keyword: what must have one falls back to templates, the rest is its own words.
    assert one["sentences by the writer"] > 0 and one["sentences left to templates"] > 0
    assert one["relevant rejected: name missing"] > 0 and one["completion tokens"] > 0
    assert read_all(Contexts(tmp_path / "one"), shards) == read_all(Contexts(tmp_path / "two"), shards)


def test_a_pipeline_runs_it_as_a_step(tmp_path, shards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(PIPELINE.replace("SETTINGS", "{config: few, variants: 2, list_size: [1, 3]}"))
    (tmp_path / "few.yaml").write_text("shares: {relevant: 1}\n")
    step = load_pipeline("toy.yaml", overrides=["contexts.seed=3"]).steps[1]
    shutil.copytree(shards, "runs/toy/shards")
    assert step.output is not None and main(step.arguments) == 0
    stored = json.loads((step.output / "contexts.json").read_text())
    assert stored["settings"]["seed"] == 3 and stored["settings"]["list_size"] == [1, 3]
    assert stored["settings"]["shares"] == {"relevant": 1.0}
    assert metrics_of(step)["contexts"] == 120
    before = fingerprint(step.output)
    assert main(step.arguments) == 0 and fingerprint(step.output) == before != "absent"


@pytest.mark.parametrize("settings", ["{variant: 2}", "{shares: {relevnt: 1}}", "{config: nowhere}"])
def test_a_pipeline_finds_a_wrong_setting_before_anything_runs(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(PIPELINE.replace("SETTINGS", settings))
    with pytest.raises((ConfigError, FileNotFoundError), match=r"toy\.yaml: step contexts: |nowhere: no such file"):
        load_pipeline("toy.yaml")
