"""evaluate: files that agree with one another and with jiwer; listening shows."""

import json
import shutil

import jiwer
import numpy as np
import pytest
import soundfile
import tiny_runs

from seedling.data.prepare import prepare
from seedling.data.scoring import get_normalizer
from seedling.launch.cli import main
from seedling.stages.runtime.artifacts import lineage, load_artifact
from seedling.stages.runtime.files import describe_files

FILES = {"hyp.jsonl", "hyp.trn", "ref.trn", "errs.txt", "summary.json", "report.html", "manifest.json"}


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Sentences that were not learnt, so that there are errors to count."""
    return tiny_runs.make_shards(tmp_path_factory.mktemp("heldout"), tiny_runs.sentences(16, seed=7))


@pytest.fixture(scope="module")
def one_each(tmp_path_factory, texts):
    """The sentences that were learnt, once each."""
    return tiny_runs.make_shards(tmp_path_factory.mktemp("learnt"), texts[::4])


@pytest.fixture(scope="module")
def evaluation(sft_run, heldout, tmp_path_factory):
    """evaluate(*overrides, data=...) -> the finished artifact's folder"""

    def evaluate(*overrides: str, data=heldout):
        run_dir = tmp_path_factory.mktemp("evaluate") / "run"
        given = [f"inputs.acllm={sft_run}/artifact", f"data={data}"]
        return tiny_runs.train("evaluate", run_dir, {}, *given, *overrides) / "artifact"

    return evaluate


@pytest.fixture(scope="module")
def report(evaluation):
    """Greedy decoding of the heldout sentences."""
    return evaluation()


def hypotheses(folder) -> dict[str, dict]:
    return {line["id"]: line for line in tiny_runs.read_lines(folder / "hyp.jsonl")}


def test_the_artifact_holds_every_file_and_leads_back_to_the_llm(report):
    assert {file.name for file in report.iterdir()} == FILES
    assert [(a.name, a.kind, a.problem) for a in lineage(report)] == [
        ("", "report", ""),
        ("acllm", "acllm", ""),
        ("llm", "llm", ""),
    ]


def test_the_error_rate_is_the_one_that_jiwer_finds_in_the_hypotheses(report):
    rows, summary = hypotheses(report).values(), json.loads((report / "summary.json").read_text())
    assert len(rows) == summary["utterances"] == 16
    normalize = get_normalizer("whisper-basic")
    references, found = ([normalize(row[key]) for row in rows] for key in ("ref_raw", "hyp_raw"))
    truth = jiwer.process_words(references, found)
    rate = summary["rates"]["wer"]
    assert rate["fraction"] == pytest.approx(truth.wer) and truth.wer > 0
    assert (rate["reference_tokens"], rate["errors"]) == (
        truth.hits + truth.substitutions + truth.deletions,
        truth.substitutions + truth.deletions + truth.insertions,
    )
    metrics = load_artifact(report).metrics
    assert metrics["wer"] == rate["fraction"] and metrics["wer_low"] <= metrics["wer"] <= metrics["wer_high"]
    assert metrics["rtf"] > 0


def test_trn_files_and_the_raw_texts_tell_of_the_same_utterances(report):
    rows = hypotheses(report)
    assert sorted(row["ref_raw"] for row in rows.values()) == sorted(tiny_runs.sentences(16, seed=7))
    for name, key in (("ref.trn", "ref"), ("hyp.trn", "hyp")):
        for line in (report / name).read_text().splitlines():
            text, _, id_ = line.rstrip(")").rpartition("(")
            assert text.strip() == rows[id_][key], (name, line)
    assert "%WER" in (report / "errs.txt").read_text()


def test_the_report_is_one_file_that_needs_no_other_and_plays_the_audio(report):
    html = (report / "report.html").read_text()
    assert "data:audio/flac;base64," in html
    assert "<script src" not in html and '<link rel="stylesheet"' not in html and 'src="http' not in html


def test_hypotheses_do_not_depend_on_the_size_of_the_batches(report, evaluation):
    small = hypotheses(evaluation("batch_seconds=2"))
    assert {id_: row["hyp_raw"] for id_, row in small.items()} == {
        id_: row["hyp_raw"] for id_, row in hypotheses(report).items()
    }


@pytest.mark.parametrize("batch_seconds", [120, 1.2])
def test_a_model_that_listens_is_lost_without_its_own_audio(evaluation, one_each, batch_seconds):
    """Also where an utterance is alone in its batch and has no neighbour to hear."""
    rates = {}
    for audio in ("own", "silence", "other"):
        folder = evaluation(f"audio={audio}", f"batch_seconds={batch_seconds}", "worst=1", data=one_each)
        rates[audio] = load_artifact(folder).metrics["wer"]
    assert rates["own"] < 0.1 and rates["silence"] > 0.5 and rates["other"] > 0.5, rates


def test_beam_search_keeps_its_n_best_with_scores(evaluation):
    for row in hypotheses(evaluation("decode.beam_size=3", "decode.nbest=2")).values():
        assert 1 <= len(row["nbest"]) == len(row["scores"]) <= 2 and row["nbest"][0] == row["hyp_raw"]


def test_a_decode_setting_changes_that_one_of_the_recognisers_own(sft_run, heldout, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(sft_run / "artifact", folder)
    config = json.loads((folder / "config.json").read_text())
    config["decode"] = {"beam_size": 2, "max_repeats": 3}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] |= describe_files(folder, ["config.json"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    given = [f"inputs.acllm={folder}", f"data={heldout}", "decode.nbest=2"]
    made = tiny_runs.train("evaluate", tmp_path / "run", {}, *given) / "artifact"
    decode = json.loads((made / "summary.json").read_text())["decode"]
    assert (decode["beam_size"], decode["max_repeats"], decode["nbest"]) == (2, 3, 2)


def test_words_that_sound_alike_are_merged_in_a_second_rate(evaluation, tmp_path):
    (tmp_path / "alike.json").write_text(json.dumps([[word.lower() for word in tiny_runs.WORDS]]))
    metrics = load_artifact(evaluation(f"equivalences={tmp_path}/alike.json")).metrics
    assert metrics["wer_sound_alikes_merged"] < metrics["wer"]


def test_learning_curves_of_the_run_are_drawn_into_the_report(evaluation, sft_run):
    html = (evaluation(f"learning_curves.sft={sft_run}") / "report.html").read_text()
    assert "train/loss" in html or "loss" in html.lower()
    assert "<svg" in html


def test_the_command_prints_the_metrics_and_where_the_report_is(sft_run, heldout, report, tmp_path, capsys):
    assert main(["evaluate", str(sft_run), "--data", str(heldout), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"report: {tmp_path}/run/artifact" in out
    (line,) = [line for line in out.splitlines() if line.startswith("wer\t")]
    assert f"{100 * load_artifact(report).metrics['wer']:.1f}"[:3] in line


@pytest.fixture
def textless(tmp_path):
    """One utterance with text, one without."""
    lines = []
    for name, text in (("a", "go"), ("b", "")):
        soundfile.write(tmp_path / f"{name}.wav", tiny_runs.speak("go"), tiny_runs.SAMPLE_RATE)
        lines.append({"audio_filepath": f"{name}.wav", "duration": len(tiny_runs.speak("go")) / 16000, "text": text})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(tmp_path / "m.jsonl", tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["audio=noise"], "own, silence, other"),
        (["precision=fp8"], "fp32, bf16"),
        (["normalizer=whisker"], "whisker"),
        (["data=/nowhere"], "/nowhere"),
        (["data=TEXTLESS"], "its text is empty"),
        (["batch_seconds=0.7"], "raise batch_seconds (0.7)"),
        (["equivalences=/nowhere.json"], "/nowhere.json"),
        (["learning_curves.sft=/nowhere"], "/nowhere"),
        (["decode.nbest=3"], "decode.nbest (3)"),
        (["decode.beam_sise=3"], "override decode.beam_sise=3: unknown key; nearest valid key: decode.beam_size"),
        (["decode.beam_size=wide"], "override decode.beam_size=wide: expected int"),
        (["contexts.right=/nowhere"], "/nowhere: no finished contexts here"),
        (["contexts.none=/nowhere"], "contexts.none"),
        (["tell_language=true"], "was trained without prompts.languages"),
        (["max_echo.wrong=0.1"], "there is no contexts.wrong"),
        (["contexts.wrong=/nowhere", "max_echo.wrong=2"], "max_echo.wrong (2)"),
        (["inputs.acllm=SHARDS"], "manifest.json"),
        (["unit=phone"], "phone"),
        (["train.precision=bf16"], "override train.precision=bf16: unknown key"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(sft_run, heldout, textless, tmp_path, capsys, given, said):
    places = {"TEXTLESS": textless, "SHARDS": heldout}
    for name, folder in places.items():
        given = [text.replace(name, str(folder)) for text in given]
    arguments = [f"run_dir={tmp_path}/run", f"inputs.acllm={sft_run}/artifact", f"data={heldout}", *given]
    assert main(["run", "evaluate", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0], errors
    assert not (tmp_path / "run" / "artifact").exists()


def test_silence_counts_what_a_language_model_says_by_itself(evaluation, tmp_path):
    """Digital silence in a corpus is decoded like anything else: the rate must not flatter."""
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    line = {"audio_filepath": "a.wav", "duration": 1.0, "text": "go"}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "id": "b"}) + "\n")
    prepare(tmp_path / "m.jsonl", tmp_path / "shards")
    assert load_artifact(evaluation(data=tmp_path / "shards")).metrics["wer"] > 0


def test_joined_utterances_are_scored_whole_and_by_windows_and_their_memory_is_known(evaluation, one_each):
    joined = ["concat.share=1", "concat.by=corpus", "concat.min_seconds=3", "concat.max_seconds=6"]
    whole = evaluation(*joined, data=one_each)
    windowed = evaluation(*joined, "window_seconds=1.5", data=one_each)
    single = hypotheses(evaluation(data=one_each))
    rows, pieces = hypotheses(whole), hypotheses(windowed)
    assert rows.keys() == pieces.keys() and len(rows) < len(single)
    assert all(rows[key]["ref_raw"] == pieces[key]["ref_raw"] for key in rows)
    said = sorted(word for row in rows.values() for word in row["ref_raw"].split())
    assert said == sorted(word for row in single.values() for word in row["ref_raw"].split())
    assert all(0 < row["memory_gb"] < 100 for row in rows.values())
    assert load_artifact(whole).metrics["peak_memory_gb"] == max(row["memory_gb"] for row in rows.values())


def test_contexts_of_single_utterances_do_not_fit_joined_ones(evaluation):
    with pytest.raises(ValueError, match=r"concat.share is 1.0 and there are contexts"):
        evaluation("concat.share=1", "contexts.right=somewhere")
