"""check-data: silent on good data, and every planted defect is found with its shard, key and reason."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seedling.data.audio import encode_flac
from seedling.data.check import Problem, check_data
from seedling.data.index import index_path, read_index, write_index
from seedling.data.shards import open_shard, shard_path
from seedling.data.text_check import character_problem, expected_scripts, mixed_word, scripts

RATE = 16000
WORDS = ("turn on the light", "call caitlin please", "at seven thirty", "in the kitchen", "play my music")
Files = dict[str, bytes]


def noise(seconds: float, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * RATE)).astype(np.float32)


def meta(seed: int) -> dict:
    words = np.random.default_rng(seed).choice(WORDS, 2)
    return {"text": " ".join(words), "lang": "en", "seconds": 2.0, "sample_rate": RATE}


def good_files(number: int, *, utterances: int = 20) -> Files:
    """The members of a shard without defects: `u{number}-{i}.flac` and `.json`."""
    files = {}
    for i in range(utterances):
        seed = 100 * number + i
        files[f"u{number}-{i}.flac"] = encode_flac(noise(2.0, seed=seed), sample_rate=RATE)
        files[f"u{number}-{i}.json"] = json.dumps(meta(seed)).encode()
    return files


def write_tar(path: Path, files: Files) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def check_with(tmp_path: Path, change: Callable[[Files], None] = lambda files: None) -> list[Problem]:
    """Check two shards, of which the second was changed before it was written and indexed."""
    for number in range(2):
        files = good_files(number)
        if number == 1:
            change(files)
        write_tar(shard_path(tmp_path, number), files)
        write_index(shard_path(tmp_path, number))
    return check_data(tmp_path)


def set_meta(files: Files, key: str, **changes: object) -> None:
    files[f"{key}.json"] = json.dumps({**json.loads(files[f"{key}.json"]), **changes}).encode()


def test_good_shards_have_no_problems_in_any_number_of_processes(tmp_path):
    assert check_with(tmp_path) == []
    assert check_data(tmp_path, jobs=2) == []


def wav(waveform: np.ndarray, *, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="WAV")
    return buffer.getvalue()


def cut_audio(files: Files) -> None:
    files["u1-3.flac"] = files["u1-3.flac"][:5000]


def no_audio(files: Files) -> None:
    del files["u1-3.flac"]


def two_audios(files: Files) -> None:
    changed = {}
    for name, content in files.items():
        changed[name] = content
        if name == "u1-3.flac":
            changed["u1-3.wav"] = wav(noise(2.0, seed=999))
    files.clear()
    files.update(changed)


def other_rate(files: Files) -> None:
    files["u1-3.flac"] = encode_flac(noise(2.0, seed=3), sample_rate=8000)
    set_meta(files, "u1-3", sample_rate=8000, seconds=4.0)


def stereo(files: Files) -> None:
    files["u1-3.flac"] = wav(np.stack([noise(2.0, seed=1), noise(2.0, seed=2)], axis=1))


def silence(files: Files) -> None:
    files["u1-3.flac"] = encode_flac(np.zeros(2 * RATE, np.float32), sample_rate=RATE)


def same_audio(files: Files) -> None:
    files["u1-3.flac"] = encode_flac(noise(2.0, seed=5), sample_rate=RATE)  # that of u0-5


def same_key(files: Files) -> None:
    files["u0-4.flac"] = encode_flac(noise(2.0, seed=999), sample_rate=RATE)
    files["u0-4.json"] = json.dumps(meta(999)).encode()


def bad_key(files: Files) -> None:
    files["with space.flac"] = encode_flac(noise(2.0, seed=999), sample_rate=RATE)
    files["with space.json"] = json.dumps(meta(999)).encode()


def no_meta(files: Files) -> None:
    del files["u1-3.json"]


@pytest.mark.parametrize(
    ("change", "key", "reason"),
    [
        (cut_audio, "u1-3", "breaks off while decoding"),
        (no_audio, "u1-3", "no audio among .json"),
        (two_audios, "u1-3", "several audio files (flac, wav)"),
        (other_rate, "u1-3", "8000 Hz, most here has 16000 Hz"),
        (stereo, "u1-3", "2 channels"),
        (silence, "u1-3", "digital silence"),
        (same_audio, "u1-3", "the same audio as u0-5 in shard-000000.tar, with another text"),
        (same_key, "u0-4", "already used in shard-000000.tar"),
        (bad_key, "with space", "the key is empty or holds spaces"),
        (no_meta, "u1-3", "neither .json nor .txt"),
    ],
)
def test_a_planted_defect_is_found(tmp_path, change, key, reason):
    problems = check_with(tmp_path, change)
    assert [(problem.shard, problem.key) for problem in problems if reason in problem.reason] == [
        ("shard-000001.tar", key)
    ], problems
    assert {problem.key for problem in problems} == {key}, "nothing else is reported"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seconds": 2.5}, "lasts 2.00 s, its meta says 2.50 s"),
        ({"sample_rate": 8000}, "16000 Hz, its meta says 8000"),
        ({"text": ""}, "the text is empty"),
        ({"text": ["a", "list"]}, "the text is a list"),
        ({"text": "turn \u0007 on the light please"}, "control character (U+0007)"),
        ({"text": "turn on the l\ufffdght please"}, "U+FFFD"),
        ({"text": "turn on\u200b the light please"}, "invisible character (U+200B)"),
        ({"text": "turn on \ud800 the light please"}, "surrogate character (U+D800)"),
        ({"text": "turn on the l\u0456ght please"}, "mixes CYRILLIC and LATIN"),
        ({"text": "включи свет на кухне пожалуйста"}, "CYRILLIC letters, unexpected in language en (LATIN)"),
        ({"text": "turn on the light " * 20}, "characters per second"),
        ({"text": "a"}, "characters per second"),
    ],
)
def test_a_planted_defect_of_the_meta_is_found(tmp_path, changes, reason):
    problems = check_with(tmp_path, lambda files: set_meta(files, "u1-3", **changes))
    assert any(reason in problem.reason for problem in problems), problems
    assert {(problem.shard, problem.key) for problem in problems} == {("shard-000001.tar", "u1-3")}


def test_broken_json_is_found(tmp_path):
    def change(files: Files) -> None:
        files["u1-3.json"] = b'{"text": '

    assert any("meta cannot be read" in problem.reason for problem in check_with(tmp_path, change))


def test_a_text_far_too_short_for_long_audio_is_found(tmp_path):
    with open_shard(shard_path(tmp_path, 0), sample_rate=RATE) as shard:
        shard.add("a", noise(12.0, seed=0), {"text": "yes", "lang": "en"})
    (problem,) = check_data(tmp_path)
    assert problem[:2] == ("shard-000000.tar", "a")
    assert "0.25 characters per second (12.00 s)" in problem.reason


def test_a_tar_cut_anywhere_is_reported_and_its_whole_part_checked(tmp_path):
    assert check_with(tmp_path) == []
    tar = shard_path(tmp_path, 1)
    whole = tar.read_bytes()
    for size in (0, 1, 511, 512, 70000, len(whole) // 2, len(whole) // 2 // 512 * 512, len(whole) - 11000):
        tar.write_bytes(whole[:size])
        problems = check_data(tmp_path)
        assert problems, size
        assert {problem.shard for problem in problems} == {"shard-000001.tar"}, size
        assert problems[0].key == "", size


def test_damaged_bytes_anywhere_are_reported_and_never_crash_the_check(tmp_path):
    assert check_with(tmp_path) == []
    tar = shard_path(tmp_path, 1)
    whole = tar.read_bytes()
    rows = read_index(tar)
    random = np.random.default_rng(0)
    used = int(rows["meta_offset"][-1] + rows["meta_size"][-1])
    for _ in range(12):
        damaged = bytearray(whole)
        at = int(random.integers(0, used - 2000))
        damaged[at : at + 2000] = random.bytes(2000)
        tar.write_bytes(damaged)
        assert {problem.shard for problem in check_data(tmp_path)} == {"shard-000001.tar"}, at


def test_an_index_that_is_missing_or_of_another_tar_is_found(tmp_path):
    assert check_with(tmp_path) == []
    index = index_path(shard_path(tmp_path, 1))
    rows = np.array(read_index(shard_path(tmp_path, 1)))
    rows["samples"][4] += 1
    np.save(index, rows)
    (problem,) = check_data(tmp_path)
    assert (problem.shard, problem.key) == ("shard-000001.tar", "u1-4")
    assert "samples 32001 for 32000" in problem.reason
    np.save(index, rows[:-1])
    assert "19 utterances, the tar 20" in check_data(tmp_path)[0].reason
    index.unlink()
    (problem,) = check_data(tmp_path)
    assert problem.shard == "shard-000001.tar"
    assert "seedling index" in problem.reason


def test_a_shard_lost_in_copying_is_found_by_the_totals(tmp_path):
    assert check_with(tmp_path) == []
    totals = {"shards": ["shard-000000.tar", "shard-000001.tar"], "utterances": 40, "seconds": 80.0}
    (tmp_path / "corpus.json").write_text(json.dumps(totals))
    assert check_data(tmp_path) == []
    shard_path(tmp_path, 0).unlink()
    lost, fewer = check_data(tmp_path)
    assert lost == Problem("shard-000000.tar", "", "listed in corpus.json, but not there")
    assert "20 utterances here, corpus.json says 40" in fewer.reason


def test_a_corpus_without_any_text_is_unlabelled_and_not_wrong(tmp_path):
    with open_shard(shard_path(tmp_path, 0), sample_rate=RATE) as shard:
        for i in range(4):
            shard.add(f"u{i}", noise(1.0, seed=i), {"text": "", "lang": "en"})
    assert check_data(tmp_path) == []


def test_persian_joiners_accents_and_code_switching_are_no_problems():
    for text in ("می\u200cخواهم", "größe à la carte", "我用iPhone打电话", "東京タワーへ行く", "naïve café"):
        assert character_problem(text) is None
        assert mixed_word(text) is None


def test_scripts_of_a_language_are_the_most_used_and_the_frequent_ones():
    english, greek, chinese = scripts("hello"), scripts("γεια"), scripts("你好")
    assert expected_scripts([english] * 50 + [greek]) == {"LATIN"}
    assert expected_scripts([english] * 50 + [greek] * 3) == {"LATIN", "GREEK"}
    assert expected_scripts([chinese] * 5) == {"CJK", "LATIN"}
    assert expected_scripts([scripts("123")]) == set()
