"""The recogniser and `seedling transcribe`: any file, one answer; silence is empty; a broken file stops no other."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr
import tiny_runs

from seedling import load
from seedling.data.audio import AudioError
from seedling.data.windows import SILENCE_RMS, is_silent, split_windows
from seedling.launch.cli import main

RATE = tiny_runs.SAMPLE_RATE


@pytest.fixture(scope="module")
def recogniser(sft_run):
    return load(sft_run)


@pytest.fixture(scope="module")
def known(texts) -> list[tuple[str, np.ndarray]]:
    """The utterances that were learnt by heart: (text, waveform)."""
    return [(text, tiny_runs.speak(text, seed=i)) for i, text in enumerate(texts)]


def write(path, wave, *, rate=RATE, **options):
    soundfile.write(path, soxr.resample(wave, RATE, rate) if rate != RATE else wave, rate, **options)
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000])
def test_every_format_and_rate_gives_the_same_text(recogniser, known, tmp_path, suffix, rate):
    sample = known[::4]
    files = [write(tmp_path / f"{i}.{suffix}", wave, rate=rate) for i, (_, wave) in enumerate(sample)]
    heard = [transcript.text for transcript in recogniser.transcribe(files)]
    expected = [transcript.text for transcript in recogniser.transcribe([wave for _, wave in sample])]
    # Lossy codecs change what is heard a little; the rest may not.
    wrong = [(a, b) for a, b in zip(heard, expected) if a != b]
    assert len(wrong) <= (1 if suffix in ("ogg", "mp3") else 0), wrong


def test_stereo_is_heard_as_the_mean_of_its_channels(recogniser, known, tmp_path):
    wave = known[0][1]
    soundfile.write(tmp_path / "both.wav", np.stack([wave + 0.1, wave - 0.1], axis=1), RATE, subtype="FLOAT")
    (transcript,) = recogniser.transcribe(tmp_path / "both.wav")
    (mono,) = recogniser.transcribe(wave)
    assert transcript.text == mono.text and transcript.score == pytest.approx(mono.score, abs=1e-3)


def test_a_low_rate_and_eight_bits_decode(recogniser, known, tmp_path):
    file = write(tmp_path / "phone.wav", known[0][1], rate=8000, subtype="ULAW")
    (transcript,) = recogniser.transcribe(file)
    assert transcript.seconds == pytest.approx(len(known[0][1]) / RATE, abs=0.01)


def test_answers_come_in_the_order_of_the_questions_and_do_not_depend_on_the_batch(recogniser, known):
    waves = [wave for _, wave in known]
    singly = [recogniser.transcribe(wave)[0] for wave in waves]
    together = recogniser.transcribe(waves)
    recogniser_in_small_batches = type(recogniser)(recogniser.model, batch_seconds=2.0)
    for found in (together, recogniser_in_small_batches.transcribe(waves)):
        assert [t.text for t in found] == [t.text for t in singly]
        assert [t.score for t in found] == pytest.approx([t.score for t in singly], abs=1e-3)
    assert [t.seconds for t in together] == [len(wave) / RATE for wave in waves]
    assert len({t.text for t in together}) > 6


def test_groups_hold_at_most_the_batch_seconds_of_padded_audio(recogniser):
    waves = [np.zeros(RATE * seconds, np.float32) for seconds in (1, 9, 4, 4, 30, 2)]
    small = type(recogniser)(recogniser.model, batch_seconds=10.0)
    groups = small._groups(list(range(6)), waves)
    assert sorted(i for group in groups for i in group) == list(range(6))
    # One longer than the limit goes alone.
    assert all(len(g) == 1 or len(g) * max(len(waves[i]) for i in g) <= 10 * RATE for g in groups), groups


def test_windows_are_heard_as_if_they_were_files_and_silent_ones_not_at_all(recogniser, known):
    gap = np.zeros(RATE // 2, np.float32)
    long = np.concatenate([piece for _, wave in known[::8] for piece in (wave, gap)] + [np.zeros(3 * RATE, np.float32)])
    spans = split_windows(long, sample_rate=RATE, window_seconds=1.5)
    assert len(spans) > 4 and is_silent(long[slice(*spans[-1])], RATE)
    apart = recogniser.transcribe([long[slice(*span)] for span in spans])
    other = known[3][1]
    first, windowed, last = recogniser.transcribe([other, long, other], window_seconds=1.5)
    assert windowed.text == " ".join(piece.text for piece in apart if piece.text)
    assert windowed.seconds == pytest.approx(len(long) / RATE) and len(windowed.nbest) == 1
    assert windowed.score == pytest.approx(sum(piece.score for piece in apart), abs=1e-2)
    assert first.text == last.text == recogniser.transcribe(other)[0].text
    with pytest.raises(ValueError, match=r"window_seconds \(0.2\)"):
        recogniser.transcribe(long, window_seconds=0.2)


@pytest.mark.parametrize("level", [0.0, 1e-5, 3e-4])
def test_silence_gives_empty_text_among_utterances_that_do_not(recogniser, known, level):
    silence = level * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    text, wave = known[0]
    before, silent, after = recogniser.transcribe([wave, silence, wave], beam_size=2)
    assert (silent.text, silent.seconds) == ("", 1.0)
    assert before.text == after.text == text


def test_only_what_is_below_the_threshold_everywhere_is_silent():
    quiet = np.zeros(RATE, np.float32)
    assert is_silent(quiet, RATE) and is_silent(quiet[:7], RATE)
    click = quiet.copy()
    click[-100:] = 0.1  # in the last, unfinished window
    assert not is_silent(click, RATE)
    tone = np.sin(np.arange(RATE) / 10).astype(np.float32) * np.sqrt(2)
    assert is_silent(0.98 * SILENCE_RMS * tone, RATE) and not is_silent(1.05 * SILENCE_RMS * tone, RATE)


@pytest.mark.parametrize("samples", [1, 160, 399, 800])
def test_audio_shorter_than_a_frame_is_answered_not_refused(recogniser, samples):
    (transcript,) = recogniser.transcribe(np.full(samples, 0.1, np.float32))
    assert transcript.seconds == samples / RATE and isinstance(transcript.text, str)


def test_the_n_best_are_in_order_and_the_first_is_the_answer(recogniser, known):
    for transcript in recogniser.transcribe([wave for _, wave in known[:4]], beam_size=4, nbest=3):
        scores = [score for _, score in transcript.nbest]
        assert 1 <= len(scores) <= 3 and transcript.nbest[0] == (transcript.text, transcript.score)
        assert len({text for text, _ in transcript.nbest}) == len(scores)


def test_a_context_reaches_the_model_and_an_empty_one_is_none(recogniser, known):
    wave = known[0][1]
    scores = [recogniser.transcribe(wave, context)[0].score for context in (None, "", "Marc, Mark")]
    assert scores[0] == scores[1] != scores[2]
    one_each = recogniser.transcribe([wave, wave], [None, "Marc, Mark"])
    assert [t.score for t in one_each] == pytest.approx([scores[0], scores[2]], abs=1e-3)


def test_keywords_are_the_list_that_a_context_would_be(recogniser, known):
    wave = known[0][1]
    (listed,) = recogniser.transcribe(wave, keywords=["Marc ", "", "Mark\n Miller", "Marc"])
    assert listed == recogniser.transcribe(wave, "Marc, Mark Miller")[0]
    for given, said in (
        ({"context": "x", "keywords": ["y"]}, "context and keywords are both given"),
        ({"keywords": []}, "no word in it"),
        ({"keywords": [" "]}, "no word in it"),
        ({"keywords": "Marc"}, "keywords is one text, 'Marc'"),
        ({"language": "en"}, r"language is 'en'; the languages of this recogniser are none"),
        ({"language": ["en", None]}, "1 pieces of audio and 2 languages"),
    ):
        with pytest.raises(ValueError, match=said):
            recogniser.transcribe(wave, **given)


def test_a_recogniser_that_was_not_trained_with_contexts_says_so_once(recogniser, known, caplog):
    fresh = type(recogniser)(recogniser.model)
    fresh.transcribe(known[0][1])
    assert not caplog.records
    for _ in range(2):
        fresh.transcribe(known[0][1], "Marc, lamp")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "was not trained with contexts" in warning


def test_the_search_with_a_context_can_be_chosen(recogniser, known):
    wave, lists = known[0][1], "Marc, lamp"
    plain, joint, deaf = (
        recogniser.transcribe(wave, lists, context_search=search, context_alpha=alpha)[0]
        for search, alpha in (("plain", None), ("joint", 1.0), ("joint", 0.0))
    )
    without = recogniser.transcribe(wave)[0]
    assert deaf.text == without.text and deaf.score == pytest.approx(without.score, abs=1e-3)
    assert len({round(found.score, 3) for found in (plain, joint, without)}) == 3


def test_questions_that_make_no_sense_are_refused_by_name(recogniser, tmp_path):
    with pytest.raises(ValueError, match="2 pieces of audio and 1 contexts"):
        recogniser.transcribe([np.ones(9), np.ones(9)], ["x"])
    with pytest.raises(ValueError, match=r"shape \(2, 9\)"):
        recogniser.transcribe([np.ones((2, 9))])
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        recogniser.transcribe([np.ones(0)])
    with pytest.raises(AudioError, match=r"nothing\.wav"):
        recogniser.transcribe([tmp_path / "nothing.wav"])
    assert recogniser.transcribe([]) == []


def test_load_takes_a_run_or_its_artifact_and_nothing_else(sft_run, lm_run, known, tmp_path):
    text, wave = known[0]
    for folder in (sft_run, sft_run / "artifact", str(sft_run)):
        assert load(folder).transcribe(wave)[0].text == text
    for folder, said in ((lm_run, "expects 'acllm'"), (tmp_path, "no manifest"), (tmp_path / "x", "no such")):
        with pytest.raises(ValueError, match=said):
            load(folder)


# ---- the command


def test_the_command_names_a_broken_file_and_ends_with_1_after_the_others(sft_run, known, tmp_path):
    (first, wave), (second, other) = known[0], known[4]
    write(tmp_path / "a.flac", wave)
    write(tmp_path / "c.mp3", other, rate=44100)
    (tmp_path / "b.wav").write_bytes(b"RIFF, but not really")
    soundfile.write(tmp_path / "d.ogg", np.zeros(RATE), RATE)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "e.flac").write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, "-m", "seedling.launch.cli", "transcribe", str(sft_run)]
    files = ["a.flac", "b.wav", "missing.wav", "c.mp3", "d.ogg", "e.flac"]
    options = {"env": tiny_runs.ENVIRONMENT, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    ended = subprocess.run([*command, *files], **options)
    assert ended.returncode == 1
    lines = [line.split("\t") for line in ended.stdout.splitlines()]
    assert [line[0] for line in lines] == ["a.flac", "c.mp3", "d.ogg"]
    assert lines[0][-1].strip() == first and lines[1][-1].strip() == second and lines[2][-1].strip() in ("", "d.ogg")
    errors = [line for line in ended.stderr.splitlines() if "seedling" in line]
    assert len(errors) == 3
    assert [name for line in errors for name in ("b.wav", "missing.wav", "e.flac") if name in line] == [
        "b.wav",
        "missing.wav",
        "e.flac",
    ]
    assert "Traceback" not in ended.stderr


def test_the_command_takes_patterns_limits_and_json(sft_run, known, tmp_path, capsys):
    for i, (_, wave) in enumerate(known[:4]):
        write(tmp_path / f"{i}.wav", wave)
    assert main(["transcribe", str(sft_run), f"{tmp_path}/*.wav", "--limit", "3", "--json", "--beam-size", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(lines) == 3 and [line["text"] for line in lines] == [text for text, _ in known[:3]]


def test_the_command_takes_a_context_as_text_as_file_and_as_keywords(sft_run, known, tmp_path, capsys):
    wave = write(tmp_path / "a.wav", known[0][1])
    (tmp_path / "names.txt").write_text("\ufeffMarc, lamp\n", encoding="utf-8")
    found = []
    for given in (
        [],
        ["--context", "Marc, lamp"],
        ["--context-file", f"{tmp_path}/names.txt"],
        ["--keywords", "Marc，lamp;"],
    ):
        assert main(["transcribe", str(sft_run), str(wave), "--json", *given, "--context-search", "plain"]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["score"])
    assert found[0] != found[1] == found[2] == found[3]


def test_the_command_on_a_context_of_ten_thousand_words_says_once_what_it_kept(
    sft_run, known, tmp_path, capsys, caplog
):
    for i, (_, wave) in enumerate(known[:10]):  # more than are transcribed at a time
        write(tmp_path / f"{i}.wav", wave)
    (tmp_path / "long.txt").write_text(" ".join(f"word{i}" for i in range(10_000)))
    given = ["--context-file", f"{tmp_path}/long.txt"]
    assert main(["transcribe", str(sft_run), f"{tmp_path}/*.wav", *given]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
    (warning,) = [record.getMessage() for record in caplog.records if "the context has" in record.getMessage()]
    assert "tokens and this recogniser takes" in warning and "kept the first" in warning


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--context-file", "missing.txt"], "missing.txt: No such file"),
        (["--context-file", "."], "directory"),
        (["--context-file", "empty.txt"], "empty.txt: the context file is empty"),
        (["--context-file", "latin.txt"], "latin.txt: byte 1 is not UTF-8"),
        (["--keywords", " ,，"], "has no word in it"),
        (["--context", "bad\udcff"], "no text"),
        (["--language", "en"], "the languages of this recogniser are none"),
        (["--context", "a", "--keywords", "b"], "not allowed with argument"),
        (["--context-search", "other"], "invalid choice: 'other'"),
        (["--context-alpha", "2"], "context_alpha is 2 and there is no context"),
        (["--context", " "], "--context is empty"),
        (
            ["--keywords", "go", "--context-search", "plain", "--context-alpha", "2"],
            "context_alpha is 2 and context_search plain",
        ),
        (["--context-alpha", "-1"], "decode.context_alpha (-1.0) must be 0 or more"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong_with_a_context(
    sft_run, known, tmp_path, capsys, monkeypatch, given, said
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.wav", known[0][1])
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Zoé".encode("latin-1")[1:])
    try:
        code = main(["transcribe", str(sft_run), "a.wav", *given])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0], errors


def test_the_command_on_a_folder_that_is_no_recogniser_is_one_line_and_exit_2(lm_run, tmp_path, capsys):
    assert main(["transcribe", str(lm_run), "x.wav"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "expects 'acllm'" in error
