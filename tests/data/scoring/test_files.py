"""The written files: their lines, and scoring again from them."""

import json
import re

import pytest

from seedling.data.scoring import ScoredUtterance, read_hypotheses, score, score_folder, write_score_folder

RECORDS = [
    ScoredUtterance("a-1", "Hello, World!", "hello word", 2.0, ("hello word", "hello world"), (-0.5, -0.7), 0.25),
    ScoredUtterance("a-2", "good morning to you", "good morning", 3.0),
    ScoredUtterance("a-3", "yes", "yes oh yes", 1.0),
    ScoredUtterance("odd (id)", "今天 ok", "今天 ok"),
]


@pytest.fixture
def folder(tmp_path):
    report = score(RECORDS, normalizer="whisper-basic", equivalences=[["word", "world"]])
    write_score_folder(report, tmp_path / "test", model_hash="f00d", decode={"beam_size": 4})
    return tmp_path / "test"


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_every_hypothesis_line_has_raw_and_normalised_text(folder):
    rows = [json.loads(line) for line in lines_of(folder / "hyp.jsonl")]
    known = ["id", "ref_raw", "hyp_raw", "ref", "hyp", "nbest", "scores", "seconds", "rtf"]
    assert list(rows[0]) == [*known, "memory_gb", "lang", "keywords", "phrases", "context"]
    assert rows[0]["ref_raw"] == "Hello, World!" and rows[0]["ref"] == "hello world"
    assert rows[0]["nbest"] == ["hello word", "hello world"] and rows[0]["rtf"] == 0.25


def test_hypotheses_read_back_are_the_records(folder):
    assert read_hypotheses(folder / "hyp.jsonl") == RECORDS


def test_trn_lines_end_in_the_utterance_and_match_between_the_two_files(folder):
    references, hypotheses = lines_of(folder / "ref.trn"), lines_of(folder / "hyp.trn")
    assert references[0] == "hello world (a-1)" and hypotheses[0] == "hello word (a-1)"
    pattern = re.compile(r"^(.* )?\([^\s()]+\)$")
    assert all(pattern.match(line) for line in references + hypotheses)
    assert [line.split()[-1] for line in references] == [line.split()[-1] for line in hypotheses]


def test_trn_of_characters_is_split_by_character_with_named_spaces(tmp_path):
    write_score_folder(score(RECORDS[2:3], normalizer="none", unit="char"), tmp_path)
    assert lines_of(tmp_path / "hyp.trn") == ["y e s <space> o h <space> y e s (a-3)"]


def test_errs_has_the_lines_that_scripts_look_for(folder):
    lines = lines_of(folder / "errs.txt")
    assert lines[0] == "%WER 55.56 [ 5 / 9, 2 ins, 2 del, 1 sub ]"
    assert sum(line.startswith("%WER") for line in lines) == 1, "scripts that grep ^%WER must find one"
    assert lines[1] == "%SER 75.00 [ 3 / 4 ]"
    heads = ["PER-UTT DETAILS", "SUBSTITUTIONS", "DELETIONS", "INSERTIONS"]
    assert [line.split(":")[0] for line in lines if line.split(":")[0] in heads] == heads
    assert "a-1:\thello (world->word)" in lines
    assert "a-2:\tgood morning (to->*) (you->*)" in lines
    assert any(line.count("(*->") == 2 for line in lines if line.startswith("a-3:"))
    assert "1 world -> word" in lines and "1 you" in lines and "1 oh" in lines


def test_the_summary_has_percent_and_fraction_and_the_stamp(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "wer" and summary["fraction"] == 5 / 9 and summary["percent"] == pytest.approx(500 / 9)
    assert (summary["substitutions"], summary["deletions"], summary["insertions"]) == (1, 2, 2)
    low, high = summary["interval"]["fraction"]
    assert 0 <= low <= 5 / 9 <= high
    assert summary["merged"]["errors"] == 4 and summary["equivalences"] == [["word", "world"]]
    assert summary["stamp"]["normalizer"] == "whisper-basic" and summary["stamp"]["normalizer_version"]
    assert summary["utterances"] == 4 and summary["seconds"] == 6.0 and summary["rtf"] == 0.25
    assert summary["model_hash"] == "f00d" and summary["decode"] == {"beam_size": 4}


def test_a_rate_over_nothing_is_null_and_the_file_still_json(tmp_path):
    write_score_folder(score([ScoredUtterance("u", "", "words")], normalizer="none"), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["fraction"] is None and summary["insertions"] == 1 and summary["interval"] is None


def test_scoring_again_reads_raw_text_and_keeps_what_is_known_of_the_model(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    score_folder(folder / "hyp.jsonl", folder, normalizer="whisper-basic", equivalences=[["word", "world"]])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    report = score_folder(folder / "hyp.jsonl", folder / "raw", normalizer="none")
    assert report.headline.counts.errors == 6
    assert json.loads((folder / "raw" / "summary.json").read_text())["model_hash"] == "f00d"


def test_hypotheses_of_another_system_need_only_three_fields(tmp_path):
    path = tmp_path / "hyp.jsonl"
    path.write_text('{"id": "u", "ref_raw": "a b", "hyp_raw": "a"}\n\n')
    assert score_folder(path, tmp_path / "out", normalizer="none").headline.fraction == 0.5


@pytest.mark.parametrize("line, message", [('{"id": "u"', "not JSON"), ('{"id": "u"}', "ref_raw"), ("[1]", "ref_raw")])
def test_a_broken_line_is_named_with_its_number(tmp_path, line, message):
    path = tmp_path / "hyp.jsonl"
    path.write_text('{"id": "u", "ref_raw": "a", "hyp_raw": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"hyp.jsonl:2: .*{message}"):
        read_hypotheses(path)
