"""evaluate under context conditions: side by side in every file, the same on two ranks, and a limit on echoes."""

import json

import numpy as np
import pytest
import tiny_runs

from seedling.data.contexts.sidecar import (
    UtteranceContext,
    context_shard_name,
    write_context_index,
    write_context_shard,
)
from seedling.data.index import Corpus, read_index
from seedling.data.loader import utterance_key
from seedling.data.scoring import rescore_conditions
from seedling.launch.cli import main
from seedling.stages.runtime.artifacts import load_artifact

TEXTS = tiny_runs.sentences(12, seed=7)
OFTEN = ("go", "six", "lamp")  # stand-ins for names: one utterance in two has one


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return tiny_runs.make_shards(tmp_path_factory.mktemp("heldout"), TEXTS)


def write_sidecar(folder, shards, contexts_of):
    """Write contexts_of(number of the utterance in TEXTS) for every utterance."""
    folder.mkdir(parents=True, exist_ok=True)
    names, paths = [], Corpus.open(str(shards)).shards
    for number, shard in enumerate(paths):
        keys = [utterance_key(at) for at in read_index(shard)]
        names.append(context_shard_name(number, shard))
        contexts = {row: contexts_of(int(key.rpartition("/")[2])) for row, key in enumerate(keys)}
        write_context_shard(folder, names[-1], shard=shard, contexts=contexts)
    write_context_index(folder, names, shards=paths)
    return folder


def context(words) -> list[UtteranceContext]:
    words = tuple(words)
    return [UtteranceContext("relevant", ", ".join(words), words)] if words else []


@pytest.fixture(scope="module")
def right(heldout, tmp_path_factory):
    """The names that are said, and nothing for the utterances without one."""
    said = [context(word for word in OFTEN if word in text.split()) for text in TEXTS]
    return write_sidecar(tmp_path_factory.mktemp("right"), heldout, lambda i: said[i])


@pytest.fixture(scope="module")
def wrong(heldout, tmp_path_factory):
    """All words that are not said: whatever is recognised in error is an echo."""
    unsaid = [context(word for word in tiny_runs.WORDS if word not in text.split()) for text in TEXTS]
    return write_sidecar(tmp_path_factory.mktemp("wrong"), heldout, lambda i: unsaid[i])


@pytest.fixture(scope="module")
def arguments(sft_run, heldout, right, wrong):
    return [f"inputs.acllm={sft_run}/artifact", f"data={heldout}", f"contexts.right={right}", f"contexts.wrong={wrong}"]


@pytest.fixture(scope="module")
def evaluated(arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    return tiny_runs.train("evaluate", run_dir, {}, *arguments, "max_echo.wrong=1") / "artifact"


def hypotheses(folder) -> dict[str, dict]:
    return {line["id"]: line for line in tiny_runs.read_lines(folder / "hyp.jsonl")}


def test_conditions_stand_side_by_side_in_every_file(evaluated):
    metrics = load_artifact(evaluated).metrics
    summary = json.loads((evaluated / "summary.json").read_text())["conditions"]
    conditions = json.loads((evaluated / "context.json").read_text())["conditions"]
    html = (evaluated / "report.html").read_text()
    assert list(summary) == list(conditions) == ["none", "right", "wrong"]
    for name in ("right", "wrong"):
        own = json.loads((evaluated / name / "summary.json").read_text())
        assert metrics[f"{name}/wer"] == own["fraction"] == summary[name]["wer"] == conditions[name]["wer"]["fraction"]
        for rate in ("recall", "strict_recall", "echo_rate", "b_wer", "u_wer"):
            value = conditions[name]["rates"][rate]["fraction"]
            assert (summary[name][rate], metrics.get(f"{name}/{rate}")) == (value, value), (name, rate)
        assert f"{name}: WER" in html
    assert "<h2>Contexts</h2>" in html and metrics["wer"] == summary["none"]["wer"]
    assert conditions["wrong"]["with_context"] == 12 > conditions["right"]["with_context"] > 0


def test_keywords_are_the_context_phrases_that_are_said(evaluated):
    for folder in (evaluated, evaluated / "right", evaluated / "wrong"):
        for row in hypotheses(folder).values():
            assert row["keywords"] == [word for word in OFTEN if word in row["ref_raw"].split()], folder
    rows = hypotheses(evaluated / "wrong").values()
    assert all(set(row["phrases"]).isdisjoint(row["ref_raw"].split()) for row in rows)
    assert all(row["phrases"] == [] for row in hypotheses(evaluated).values())


def test_every_error_is_an_echo_where_the_context_has_every_word_that_is_not_said(evaluated):
    """Not those that only lose words, nor those in what is no word at all."""
    echoes = json.loads((evaluated / "context.json").read_text())["conditions"]["wrong"]["echoes"]
    rows = hypotheses(evaluated / "wrong")
    wrong = {id_ for id_, row in rows.items() if set(row["hyp_raw"].split()) & set(row["phrases"])}
    assert wrong and set(echoes) == wrong


def test_an_utterance_without_context_is_decoded_as_ever(evaluated):
    plain = hypotheses(evaluated)
    without = [row for row in hypotheses(evaluated / "right").values() if not row["phrases"]]
    assert without
    for row in without:
        assert row["hyp_raw"] == plain[row["id"]]["hyp_raw"]
        np.testing.assert_allclose(row["scores"], plain[row["id"]]["scores"], atol=1e-3)


def test_scoring_again_without_the_model_gives_the_same(evaluated, tmp_path):
    rescore_conditions(evaluated, tmp_path, seed=1)
    for file in ("context.json", "summary.json", "right/errs.txt", "wrong/hyp.jsonl"):
        assert (tmp_path / file).read_bytes() == (evaluated / file).read_bytes(), file


def test_two_ranks_find_the_same_under_every_condition(evaluated, arguments, tmp_path):
    config = tiny_runs.write_yaml(tmp_path / "evaluate.yaml", {})
    given = [*arguments, f"inputs.baseline={evaluated}"]
    tiny_runs.run_ranks(tmp_path, 2, "evaluate", "--config", str(config), f"run_dir={tmp_path}/run", *given)
    for name in ("", "right", "wrong"):
        one, two = hypotheses(evaluated / name), hypotheses(tmp_path / "run" / "artifact" / name)
        assert one.keys() == two.keys()
        for id_, row in one.items():
            by_process = ("scores", "rtf", "memory_gb")
            assert {k: v for k, v in row.items() if k not in by_process} == {
                k: v for k, v in two[id_].items() if k not in by_process
            }
            np.testing.assert_allclose(two[id_]["scores"], row["scores"], atol=1e-3)
    ours, theirs = (load_artifact(folder).metrics for folder in (evaluated, tmp_path / "run" / "artifact"))
    by_process = {name for name in ours if name.endswith(("rtf", "peak_memory_gb"))}
    compared = theirs.keys() - ours.keys()
    assert {k: ours[k] for k in ours.keys() - by_process} == {
        k: theirs[k] for k in theirs.keys() - by_process - compared
    }
    assert len(compared) > 10 and not any(theirs[name] for name in compared if "_change" in name)


def test_a_run_that_echoes_too_much_writes_everything_and_fails(arguments, tmp_path, capsys):
    assert main(["run", "evaluate", f"run_dir={tmp_path}/run", *arguments, "max_echo.wrong=0"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert "condition 'wrong' has an echo rate of" in error and "max_echo.wrong of 0.00%" in error
    kept = tmp_path / "run" / "refused"
    assert str(kept) in error and not (tmp_path / "run" / "artifact").exists()
    assert {"context.json", "summary.json", "report.html", "right", "wrong"} <= {file.name for file in kept.iterdir()}


def test_a_limit_that_cannot_be_checked_is_named_before_anything_is_decoded(heldout, arguments, tmp_path, monkeypatch):
    from seedling.stages import evaluate

    monkeypatch.setattr(evaluate, "decoded", lambda *_, **__: pytest.fail("decoded"))
    bare = write_sidecar(tmp_path / "bare", heldout, lambda i: context([]))
    with pytest.raises(ValueError, match=r"max_echo\.bare: no utterance of .* has a context in .*bare"):
        tiny_runs.train(
            "evaluate", tmp_path / "run", {}, *arguments, f"contexts.bare={bare}", "max_echo.bare=1", "max_echo.wrong=1"
        )
    (tmp_path / "groups.json").write_text('["one"]')
    with pytest.raises(ValueError, match=r"equivalences: .*groups\.json must hold lists of words"):
        tiny_runs.train("evaluate", tmp_path / "other", {}, *arguments, f"equivalences={tmp_path}/groups.json")


def test_a_condition_has_one_context_an_utterance(heldout, arguments, tmp_path, capsys):
    two = write_sidecar(tmp_path / "two", heldout, lambda i: context(["six"]) + context(["lamp"]))
    assert main(["run", "evaluate", f"run_dir={tmp_path}/run", *arguments, f"contexts.two={two}"]) == 2
    assert "contexts.two: utterance" in capsys.readouterr().err


def test_contexts_of_another_corpus_are_refused(arguments, shards, tmp_path, capsys):
    assert main(["run", "evaluate", f"run_dir={tmp_path}/run", *arguments, f"data={shards}"]) == 2
    assert "has no contexts for the utterances in it" in capsys.readouterr().err
