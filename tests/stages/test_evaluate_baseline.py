"""evaluate against an earlier evaluation: what it says of both, limits, and refusals before anything is decoded."""

import json

import pytest
import tiny_runs

from seedling.data.contexts.sidecar import UtteranceContext
from seedling.launch.cli import main
from seedling.stages import evaluate as stage
from seedling.stages.runtime.artifacts import ArtifactWriter, lineage, load_artifact


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, texts):
    """The sentences that were learnt, once each."""
    return tiny_runs.make_shards(tmp_path_factory.mktemp("learnt"), texts[::4])


def told(text: str) -> list[UtteranceContext]:
    return [UtteranceContext("relevant", ", ".join(text.split()), tuple(text.split()))]


@pytest.fixture(scope="module")
def right(learnt, tmp_path_factory):
    """Every word that is said."""
    return tiny_runs.make_contexts(tmp_path_factory.mktemp("contexts") / "right", learnt, told)


@pytest.fixture(scope="module")
def arguments(sft_run, learnt, right):
    return [f"inputs.acllm={sft_run}/artifact", f"data={learnt}", f"contexts.right={right}"]


@pytest.fixture(scope="module")
def deaf(arguments, tmp_path_factory):
    """An evaluation of who hears another utterance's audio."""
    run_dir = tmp_path_factory.mktemp("baseline") / "deaf"
    return tiny_runs.train("evaluate", run_dir, {}, *arguments, "audio=other") / "artifact"


@pytest.fixture(scope="module")
def listening(arguments, deaf, tmp_path_factory):
    """One of who hears its own, against that."""
    run_dir = tmp_path_factory.mktemp("evaluate") / "listening"
    limits = ["max_rise.none=0", "max_rise.right=0", "max_recall_fall.right=0"]
    return tiny_runs.train("evaluate", run_dir, {}, *arguments, f"inputs.baseline={deaf}", *limits) / "artifact"


def read(folder, name="summary.json") -> dict:
    return json.loads((folder / name).read_text())


def test_the_difference_of_two_evaluations_stands_in_every_file(listening, deaf):
    metrics, entry = load_artifact(listening).metrics, read(listening, "baseline.json")
    assert (entry["baseline"], list(entry["conditions"])) == ("deaf", ["none", "right"])
    for condition, prefix in (("none", ""), ("right", "right/")):
        rates = entry["conditions"][condition]["rates"]
        for rate in ("wer", "recall", "f1"):
            before, after = (read(folder)["conditions"][condition][rate] for folder in (deaf, listening))
            assert (rates[rate]["before"], rates[rate]["after"]) == (before, after), (condition, rate)
            assert metrics[f"{prefix}{rate}_change"] == after - before != 0
        low, high = rates["wer"]["interval"]["fraction"]
        assert (metrics[f"{prefix}wer_change_low"], metrics[f"{prefix}wer_change_high"]) == (low, high)
        assert low <= metrics[f"{prefix}wer_change"] <= high < 0
    assert (listening / "baseline.txt").read_text().startswith("Against deaf\n")
    assert "<h2>Against deaf</h2>" in (listening / "report.html").read_text()
    assert ("baseline", "report") in [(one.name, one.kind) for one in lineage(listening)]


def test_strict_recall_is_also_that_of_the_words_that_the_baseline_missed(listening, deaf):
    """Counted from the hypotheses, word by word; by its own measure it has none, as it misses nothing."""
    rows = {
        (folder, condition): {row["id"]: row for row in tiny_runs.read_lines(folder / condition / "hyp.jsonl")}
        for folder in (listening, deaf)
        for condition in (".", "right")
    }
    missed, regained = 0, {deaf: 0, listening: 0}
    for id_, row in rows[deaf, "."].items():
        for word in set(row["ref_raw"].split()):
            said, plainly = (row[text].split().count(word) for text in ("ref_raw", "hyp_raw"))
            missed += max(0, said - plainly)
            for folder in regained:
                told_of = rows[folder, "right"][id_]["hyp_raw"].split().count(word)
                regained[folder] += max(0, min(said, told_of) - min(said, plainly))
    change = read(listening, "baseline.json")["conditions"]["right"]["rates"]["strict_recall_fixed"]
    assert (change["before"], change["after"]) == (regained[deaf] / missed, regained[listening] / missed)
    assert load_artifact(listening).metrics["right/strict_recall_fixed"] == change["after"] > change["before"] > 0
    assert "right/strict_recall" not in load_artifact(listening).metrics


def test_what_is_beyond_its_limit_writes_everything_and_fails(arguments, deaf, tmp_path, capsys):
    limits = ["max_rise.none=0.01", "max_recall_fall.right=0.01"]
    given = [*arguments, "audio=silence", f"inputs.baseline={deaf}", *limits]
    assert main(["run", "evaluate", f"run_dir={tmp_path}/run", *given]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert "condition 'none' has a wer of" in error and "max_rise.none of 1.00" in error
    assert "condition 'right' has a strict_recall_fixed of" in error and "max_recall_fall.right of 1.00" in error
    kept = tmp_path / "run" / "refused"
    assert str(kept) in error and not (tmp_path / "run" / "artifact").exists()
    assert {"baseline.json", "baseline.txt", "report.html", "summary.json"} <= {file.name for file in kept.iterdir()}


def test_the_command_prints_both_and_the_difference(sft_run, learnt, right, deaf, tmp_path, capsys):
    given = [f"contexts.right={right}", f"inputs.baseline={deaf}"]
    assert main(["evaluate", str(sft_run), "--data", str(learnt), "--out", str(tmp_path / "run"), *given]) == 0
    out = capsys.readouterr().out
    assert "Against deaf\n" in out and (tmp_path / "run" / "artifact" / "baseline.txt").read_text() in out
    assert [line for line in out.splitlines() if line.startswith("right/strict_recall_fixed\t") and line.endswith(" %")]


def test_a_baseline_that_does_not_fit_is_named_before_anything_is_decoded(
    sft_run, arguments, learnt, right, deaf, texts, shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(stage, "decoded", lambda *_, **__: pytest.fail("decoded"))
    longer = tiny_runs.make_contexts(
        tmp_path / "longer",
        learnt,
        lambda text: [UtteranceContext("relevant", f"{text}, six", (*text.split(), "six"))],
    )
    reworded = tiny_runs.make_shards(tmp_path / "reworded", [*texts[:-4:4], "call Marc call"])
    no_evaluation = ArtifactWriter(tmp_path / "probe" / "artifact", kind="report", stage="layer_probe").start()
    plain = [f"inputs.acllm={sft_run}/artifact"]
    cases = [
        (
            [*arguments, f"contexts.wrong={right}", "max_rise.wrong=0"],
            r"max_rise\.wrong: baseline .*deaf.* has no cond",
        ),
        ([*arguments, "normalizer=whisper-english"], r"deaf.*: reports are not comparable.*whisper-english"),
        ([*plain, f"data={shards}"], r"deaf.*: reports hold different utterances \(48 and 12"),
        ([*plain, f"data={reworded}"], r"deaf.*: utterance '.*' has two different references"),
        (
            [*plain, f"data={learnt}", f"contexts.right={longer}"],
            r"deaf.*: utterance '.*' had other .* under condition",
        ),
        (
            [*arguments, f"inputs.baseline={no_evaluation.finish().path}"],
            r"probe.*: no hyp\.jsonl and summary\.json here",
        ),
        ([*arguments, f"inputs.baseline={sft_run}/artifact"], r"artifact is of kind 'acllm'.*expects 'report'"),
    ]
    for number, (given, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            tiny_runs.train("evaluate", tmp_path / f"run{number}", {}, f"inputs.baseline={deaf}", *given)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("max_rise.none=0", "max_rise.none: there is no inputs.baseline"),
        ("max_recall_fall.right=0", "max_recall_fall.right: there is no inputs.baseline"),
        ("max_recall_fall.none=0", "max_recall_fall.none: without a context there is nothing to limit"),
        ("max_rise.wrong=0", "max_rise.wrong: there is no contexts.wrong"),
        ("max_rise.none=1.5", "max_rise.none (1.5) is a fraction"),
        ("max_recall_fall.right=-0.1", "max_recall_fall.right (-0.1) is a fraction"),
    ],
)
def test_a_limit_that_cannot_be_is_one_line(arguments, tmp_path, capsys, limit, message):
    assert main(["run", "evaluate", f"run_dir={tmp_path}/run", *arguments, limit]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert message in error
