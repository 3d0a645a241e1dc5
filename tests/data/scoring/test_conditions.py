"""One recogniser under several conditions: metrics, files, scoring again without the model, limits, the report."""

import json
from dataclasses import replace

import pytest

from seedling.data.scoring import ScoredUtterance, rescore_conditions, score_conditions, write_conditions, write_report

REFERENCES = ("call Caitlin Adams", "navigate to Stockholm", "ring Marc now")
KEYWORDS = (("Caitlin Adams",), ("Stockholm",), ("Marc",))
HEARD = {
    "none": ("call kaitlyn adams", "navigate to stockholm", "ring mark now"),
    "right": ("call caitlin adams", "navigate to stockholm", "ring marc now"),
    "wrong": ("call kaitlyn adams", "navigate to lisbon", "ring mark now"),
}
PHRASES = {
    "none": ((), (), ()),
    "right": (("Caitlin Adams", "Neal"), ("Stockholm", "Lisbon"), ("Marc",)),
    "wrong": (("Neal",), ("Lisbon",), ("Paula Abdul",)),
}


@pytest.fixture
def records():
    return {
        name: [
            ScoredUtterance(f"u{i}", r, h, 1.5, (h,), (-0.5,), 0.1, "en", KEYWORDS[i], PHRASES[name][i])
            for i, (r, h) in enumerate(zip(REFERENCES, heard))
        ]
        for name, heard in HEARD.items()
    }


@pytest.fixture
def scores(records):
    return score_conditions(records, equivalences=[["marc", "mark"]], seed=3)


def test_metrics_stand_side_by_side(scores):
    metrics = scores.metrics()
    assert metrics["wer"] == 2 / 9 and metrics["right/wer"] == 0 and metrics["wrong/wer"] == 3 / 9
    assert metrics["recall"] == 1 / 3 and metrics["right/strict_recall"] == 1 and metrics["wrong/strict_recall"] == 0
    assert metrics["right/echo_rate"] == 0 and metrics["wrong/echo_rate"] == 1 / 3
    assert metrics["wrong/echo_rate_chance"] == 0 and metrics["wer_sound_alikes_merged"] == 1 / 9
    assert metrics["b_wer"] == 2 / 4 and metrics["u_wer"] == 0 and metrics["right/rtf"] == pytest.approx(0.1)
    assert not {"echo_rate", "strict_recall", "conflict_rate"} & metrics.keys(), "without contexts these mean nothing"


def test_files_of_every_condition_are_written(scores, tmp_path):
    write_conditions(scores, tmp_path, model_hash="f00d", decode={"context_alpha": float("inf"), "beam_size": 2})
    for folder in (tmp_path, tmp_path / "right", tmp_path / "wrong"):
        assert {"hyp.jsonl", "hyp.trn", "ref.trn", "errs.txt", "summary.json"} <= {f.name for f in folder.iterdir()}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [round(summary["conditions"][name]["wer"], 3) for name in HEARD] == [0.222, 0, 0.333]
    assert summary["conditions"]["wrong"]["echo_rate"] == 1 / 3 and summary["decode"]["context_alpha"] == "inf"
    conditions = json.loads((tmp_path / "context.json").read_text())["conditions"]
    assert conditions["wrong"]["echoes"] == {"u1": ["lisbon"]} and conditions["none"]["echoes"] == {}
    assert conditions["wrong"]["rates"]["echo_rate"]["of"] == conditions["wrong"]["with_context"] == 3
    assert conditions["right"]["change"]["difference"] == pytest.approx(-2 / 9) and conditions["none"]["change"] is None


def test_scoring_again_needs_only_the_files(scores, tmp_path):
    write_conditions(scores, tmp_path / "first", model_hash="f00d", decode={"beam_size": 4})
    again = rescore_conditions(tmp_path / "first", tmp_path / "again", equivalences=[["marc", "mark"]], seed=3)
    files = sorted(f.relative_to(tmp_path / "first") for f in (tmp_path / "first").rglob("*") if f.is_file())
    assert len(files) == 16
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    assert again.metrics() == scores.metrics()
    assert again.reports["right"].utterances == scores.reports["right"].utterances


def test_without_keywords_and_contexts_there_is_nothing_to_say_of_them(records, tmp_path):
    plain = [replace(record, keywords=()) for record in records["none"]]
    scores = score_conditions({"none": plain})
    write_conditions(scores, tmp_path)
    assert scores.contexts == {} and not (tmp_path / "context.json").exists()
    assert "conditions" not in json.loads((tmp_path / "summary.json").read_text())
    assert set(scores.metrics()) == {"wer", "cer", "mer", "wer_low", "wer_high", "rtf"}
    assert rescore_conditions(tmp_path, tmp_path / "again").metrics() == scores.metrics()


def test_an_echo_rate_above_its_limit_is_named_with_the_limit(scores):
    assert scores.over_limit({"wrong": 0.5, "right": 0}) == []
    (problem,) = scores.over_limit({"wrong": 0.02, "right": 0})
    assert "'wrong'" in problem and "33.33%" in problem and "2.00%" in problem and "1 of 3" in problem


def test_a_limit_that_cannot_be_checked_is_named(records):
    records["wrong"] = [replace(record, phrases=()) for record in records["wrong"]]
    (problem,) = score_conditions(records).over_limit({"wrong": 0.02})
    assert "max_echo.wrong" in problem and "no utterance has a context" in problem


def test_copied_prose_is_over_the_limit_also_after_scoring_again(records, tmp_path):
    records["wrong"] = [
        replace(record, phrases=(), context="Ignore it.", hypothesis="ignore") for record in records["wrong"]
    ]
    write_conditions(score_conditions(records), tmp_path / "first")
    for scores in (score_conditions(records), rescore_conditions(tmp_path / "first", tmp_path / "again")):
        assert len(scores.over_limit({"wrong": 0.9})) == 1


def test_metrics_name_the_languages_of_a_corpus_of_several(records):
    for name, side in records.items():
        heard = "打给张玮" if name == "none" else "打给张伟"
        side.append(ScoredUtterance("z", "打给张伟", heard, lang="zh", keywords=("张伟",)))
    metrics = score_conditions(records).metrics()
    assert metrics["zh/cer"] == 1 / 4 and metrics["right/zh/cer"] == 0 and metrics["en/wer"] == 2 / 9
    assert metrics["mer"] == metrics["mer"] and "right/mer" in metrics and "b_mer" in metrics


def test_the_report_shows_the_conditions_and_what_was_copied(scores, tmp_path):
    html = write_report(scores.plain, tmp_path / "report.html", conditions=scores).read_text()
    assert "<h2>Contexts</h2>" in html and "wrong: echoes (1)" in html and "lisbon" in html
    assert "right: WER" in html and "strict recall" in html


def test_the_report_escapes_what_comes_from_contexts(records, tmp_path):
    records["wrong"] = [
        replace(record, phrases=("<b>x</b>",), hypothesis="<b>x</b>", keywords=("<i>",)) for record in records["wrong"]
    ]
    scores = score_conditions(records, normalizer="none")
    html = write_report(scores.plain, tmp_path / "report.html", conditions=scores).read_text()
    assert "<b>x</b>" not in html and "&lt;b&gt;x&lt;/b&gt;" in html


def test_a_condition_may_not_be_named_as_a_language_of_the_corpus(records):
    german = [replace(one, lang="de") if one.id == "u0" else one for one in records["none"]]
    with pytest.raises(ValueError, match=r"contexts\.de: .*choose another name for the condition, such as de-contexts"):
        score_conditions({"none": german, "de": german})
