"""tune_decoding: one decode without context, two for each setting, and overrides that evaluate takes."""

import json

import pytest
import tiny_runs
from test_evaluate_contexts import OFTEN, TEXTS, context, write_sidecar

from seedling.launch.cli import main
from seedling.stages.runtime.artifacts import load_artifact

GRID = ["alphas=[0.5,2.0]", "prunes=[4.0,.inf]", "decode.beam_size=2"]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return tiny_runs.make_shards(tmp_path_factory.mktemp("heldout"), TEXTS)


@pytest.fixture(scope="module")
def sidecars(heldout, tmp_path_factory):
    said = [context(word for word in OFTEN if word in text.split()) for text in TEXTS]
    unsaid = [context(word for word in tiny_runs.WORDS if word not in text.split()) for text in TEXTS]
    folder = tmp_path_factory.mktemp("contexts")
    return {
        "right": write_sidecar(folder / "right", heldout, lambda i: said[i]),
        "wrong": write_sidecar(folder / "wrong", heldout, lambda i: unsaid[i]),
    }


def test_the_command_prints_overrides_that_give_the_numbers_it_chose_by(
    sft_run, heldout, sidecars, tmp_path, capsys, monkeypatch
):
    from seedling.model.audio_llm import AudioLLM

    decodes = []
    transcribe_ids = AudioLLM.transcribe_ids
    monkeypatch.setattr(
        AudioLLM, "transcribe_ids", lambda self, *a, **k: decodes.append(k["config"]) or transcribe_ids(self, *a, **k)
    )
    given = ["--data", heldout, "--right", sidecars["right"], "--wrong", sidecars["wrong"], "--out", tmp_path / "tune"]
    limits = ["max_loss=1", "max_echo=1"]
    assert main([str(word) for word in ["tune-decoding", sft_run, *given, *GRID, *limits]]) == 0
    assert len(decodes) == 1 + 2 * (4 + 1), "one batch: without context, four settings, and the plain search"
    overrides = capsys.readouterr().out.splitlines()[-1].split()
    folder = tmp_path / "tune" / "artifact"
    tuning = json.loads((folder / "tuning.json").read_text())
    assert overrides == tuning["overrides"] and tuning["allowed"]
    assert [trial["settings"]["context_prune"] for trial in tuning["trials"]] == ["4.0", "4.0", ".inf", ".inf"]
    assert (folder / "tuning.md").read_text().count("\n") == 2 + 1 + 4 + 1
    assert "<svg" in (folder / "tuning.svg").read_text()

    contexts = [f"contexts.{name}={folder}" for name, folder in sidecars.items()]
    inputs = [f"inputs.acllm={sft_run}/artifact", f"data={heldout}", "decode.beam_size=2"]
    evaluated = tiny_runs.train("evaluate", tmp_path / "evaluate", {}, *inputs, *contexts, *overrides) / "artifact"
    chosen, again = load_artifact(folder).metrics, load_artifact(evaluated).metrics
    assert chosen["none/wer"] == again["wer"]
    assert all(chosen[name] == again[name] for name in ("right/wer", "wrong/wer", "right/recall", "wrong/echo_rate"))


def test_a_run_fails_where_every_setting_harms_and_leaves_its_table(sft_run, heldout, sidecars, tmp_path):
    given = [f"inputs.acllm={sft_run}/artifact", f"data={heldout}"]
    given += [f"{name}={folder}" for name, folder in sidecars.items()]
    with pytest.raises(ValueError, match=r"no setting keeps max_loss \(-1\)"):
        tiny_runs.train("tune_decoding", tmp_path / "run", {}, *given, *GRID, "alphas=[1.0]", "max_loss=-1")
    assert list((tmp_path / "run").rglob("tuning.md"))


def test_a_grid_that_cannot_be_is_named_before_any_work(sft_run, heldout, sidecars, tmp_path):
    given = [f"inputs.acllm={sft_run}/artifact", f"data={heldout}"]
    given += [f"{name}={folder}" for name, folder in sidecars.items()]
    for override, message in (("alphas=[]", "alphas is empty"), ("forms=[sum]", "context_form")):
        with pytest.raises(ValueError, match=message):
            tiny_runs.train("tune_decoding", tmp_path / "run", {}, *given, override)
