"""Prepare: the same bytes whatever happens on the way, and nothing lost in silence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seedling.data.audio import encode_flac, read_audio
from seedling.data.check import check_data
from seedling.data.cutting import assign_keys
from seedling.data.index import Corpus
from seedling.data.prepare import PrepareError, prepare

RATE = 16000


def noise(seconds: float, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * RATE)).astype(np.float32)


def make_source(folder: Path, *, utterances: int = 12, seconds: float = 0.5) -> Path:
    """A manifest of noise with texts of a likely length."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(utterances):
        (folder / f"u{i:03d}.flac").write_bytes(encode_flac(noise(seconds, seed=i), sample_rate=RATE))
        text = " ".join(["seven"] * max(1, int(seconds * 2)))
        lines.append({"audio_filepath": f"u{i:03d}.flac", "duration": seconds, "text": text, "lang": "en"})
    return rewrite(folder / "m.jsonl", lines)


def entries(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def rewrite(manifest: Path, lines: list[dict]) -> Path:
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def keys(folder: Path) -> list[str]:
    corpus = Corpus.open(folder)
    return [key.decode() for i in range(len(corpus.shards)) for key in corpus.index(i)["key"]]


def test_the_number_of_processes_changes_no_byte(tmp_path):
    source = make_source(tmp_path / "source")
    one = prepare(source, tmp_path / "one", jobs=1, shard_seconds=2.0)
    two = prepare(source, tmp_path / "two", jobs=2, shard_seconds=2.0)
    assert one == two
    assert one.shards == [f"shard-{i:06d}.tar" for i in range(3)]
    assert (one.utterances, one.seconds, one.rejected, one.languages) == (12, 6.0, 0, {"en": 6.0})
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert keys(tmp_path / "one") == [f"u{i:03d}" for i in range(12)]
    assert check_data(tmp_path / "one") == []


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    source = make_source(tmp_path / "source", utterances=40, seconds=12.0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(source, whole, shard_seconds=30.0)
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(source), str(killed)], cwd=tmp_path)
    deadline = time.monotonic() + 600
    while len(list(killed.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_ino for path in killed.glob("*.tar")}
    assert len(workers) >= 2
    assert 3 <= len(kept) < 16, "the run must be killed half way"
    with pytest.raises(ValueError, match="not finished"):
        Corpus.open(killed)
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers)), "workers must end with their parent"

    prepare(source, killed, shard_seconds=30.0)
    noted = [name for name, inode in kept.items() if (killed / name).stat().st_ino == inode]
    assert len(noted) >= 1, "finished shards are not written again"
    assert content(killed) == content(whole)


KILLED_RUN = """
import sys
from seedling.data.prepare import prepare
if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2], shard_seconds=30.0, jobs=2)
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    source = make_source(tmp_path / "source")
    first = prepare(source, tmp_path / "out", shard_seconds=2.0)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert prepare(source, tmp_path / "out", shard_seconds=2.0) == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")} == times


@pytest.mark.parametrize("lost", ["shard-000001.tar", "shard-000001.index.npy", ".prepare/000001.json", "corpus.json"])
def test_what_was_lost_is_written_again(tmp_path, lost):
    source = make_source(tmp_path / "source")
    prepare(source, tmp_path / "out", shard_seconds=2.0)
    before = content(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    prepare(source, tmp_path / "out", shard_seconds=2.0)
    assert content(tmp_path / "out") == before


def test_a_changed_source_or_setting_is_refused_with_the_way_out(tmp_path):
    source = make_source(tmp_path / "source")
    prepare(source, tmp_path / "out")
    with pytest.raises(PrepareError, match=r"sample_rate was 16000, is 8000\); delete the folder"):
        prepare(source, tmp_path / "out", sample_rate=8000)
    lines = entries(source)
    rewrite(source, lines[:-1])
    with pytest.raises(PrepareError, match="utterances was 12, is 11"):
        prepare(source, tmp_path / "out")
    rewrite(source, [{**lines[0], "text": "changed"}, *lines[1:]])
    with pytest.raises(PrepareError, match="texts or files of the source changed"):
        prepare(source, tmp_path / "out")


def test_a_folder_with_shards_from_elsewhere_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.tar").touch()
    with pytest.raises(PrepareError, match=r"mine\.tar, which was not prepared here"):
        prepare(make_source(tmp_path / "source"), tmp_path / "out")


def test_what_cannot_be_used_is_named_counted_and_listed(tmp_path):
    source = make_source(tmp_path / "source", utterances=20)
    (source.parent / "u003.flac").write_bytes(b"broken")
    (source.parent / "u007.flac").unlink()
    lines = entries(source)
    lines[11]["duration"] = 3.0
    lines[13]["text"] = 5
    rewrite(source, lines)
    with pytest.raises(PrepareError, match=r"3 of the first 12 utterances \(20 in all\) rejected, .*\(0\.1\).*u003"):
        prepare(source, tmp_path / "out", shard_seconds=2.0, max_bad_fraction=0.1)
    assert not (tmp_path / "out" / "corpus.json").exists()
    summary = prepare(source, tmp_path / "out", shard_seconds=2.0, max_bad_fraction=0.3)
    assert (summary.utterances, summary.rejected) == (16, 4)
    rejected = entries(tmp_path / "out" / "rejected.jsonl")
    assert [entry["id"] for entry in rejected] == ["u003", "u007", "u011", "m-line-14"]
    for entry, reason in zip(rejected, ["not an audio file", "No such file", "lasts 0.50 s", "must be a string"]):
        assert reason in entry["reason"]
    assert keys(tmp_path / "out") == [f"u{i:03d}" for i in range(20) if i not in (3, 7, 11, 13)]


def test_a_shard_of_which_nothing_is_left_is_not_written(tmp_path):
    source = make_source(tmp_path / "source", utterances=8)
    for i in range(4):
        (source.parent / f"u{i:03d}.flac").write_bytes(b"broken")
    summary = prepare(source, tmp_path / "out", shard_seconds=1.0, max_bad_fraction=0.5)
    assert summary.shards == ["shard-000002.tar", "shard-000003.tar"]
    assert prepare(source, tmp_path / "out", shard_seconds=1.0, max_bad_fraction=0.5) == summary
    assert len(keys(tmp_path / "out")) == 4


def test_many_bad_ones_stop_the_run_early(tmp_path):
    source = make_source(tmp_path / "source", utterances=8)
    (source.parent / "u000.flac").write_bytes(b"broken")
    with pytest.raises(PrepareError, match="1 of the first 2 utterances"):
        prepare(source, tmp_path / "out", shard_seconds=1.0)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1


def test_segments_of_one_recording_become_utterances(tmp_path):
    recording = noise(3.0, seed=0)
    (tmp_path / "long.flac").write_bytes(encode_flac(recording, sample_rate=RATE))
    lines = [{"audio_filepath": "long.flac", "offset": o, "duration": 0.75, "text": "t"} for o in (0.0, 0.5, 2.25)]
    prepare(rewrite(tmp_path / "m.jsonl", lines), tmp_path / "out", lang="de")
    corpus = Corpus.open(tmp_path / "out")
    rows = corpus.index(0)
    assert rows["key"].tolist() == [b"long-0ms", b"long-500ms", b"long-2250ms"]
    assert set(rows["lang"].tolist()) == {b"de"}
    content = corpus.shards[0].read_bytes()
    for row, offset in zip(rows, (0.0, 0.5, 2.25)):
        audio = read_audio(content[row["audio_offset"] :][: row["audio_size"]])
        start = int(offset * RATE)
        np.testing.assert_allclose(audio, recording[start : start + RATE * 3 // 4], atol=1 / 32768)


def test_audio_is_brought_to_the_wanted_rate(tmp_path):
    prepare(make_source(tmp_path / "source", utterances=2), tmp_path / "out", sample_rate=8000)
    rows = Corpus.open(tmp_path / "out").index(0)
    assert set(zip(rows["samples"].tolist(), rows["sample_rate"].tolist())) == {(4000, 8000)}


def test_a_limit_takes_the_first_and_zero_is_refused(tmp_path):
    source = make_source(tmp_path / "source")
    prepare(source, tmp_path / "out", limit=3)
    assert keys(tmp_path / "out") == ["u000", "u001", "u002"]
    with pytest.raises(PrepareError, match="no utterances"):
        prepare(source, tmp_path / "none", limit=0)


def test_two_runs_at_once_do_not_write_into_one_folder(tmp_path):
    import fcntl

    source = make_source(tmp_path / "source")
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with open(tmp_path / "out" / ".prepare" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PrepareError, match="another `seedling prepare`"):
            prepare(source, tmp_path / "out")


def test_keys_are_unique_and_safe_in_a_tar():
    ids = ["a/x", "b/x", "c/y.z", "a/x", "名字", "w" * 200, "c d", "a-x-2"]
    found = assign_keys(ids)
    assert len(set(found)) == len(ids)
    assert found[:4] == ["a-x", "b-x", "y-z", "a-x-2"]
    assert found[6:] == ["c-d", "a-x-2-2"]
    assert all(len(key) <= 90 and "." not in key and key.isascii() and "/" not in key for key in found)
    assert assign_keys(ids) == found


def test_human_speech_passes_from_source_to_clean_shards(tmp_path, speech_dir):
    for name in ("librispeech_250", "kerstin_de"):
        out = tmp_path / name
        summary = prepare(speech_dir / name, out, split="dev", limit=12, shard_seconds=60.0, jobs=1)
        assert summary.utterances == 12
        assert len(summary.shards) >= 1
        assert check_data(out) == []
        lines = entries(speech_dir / name / "dev.jsonl")[:12]
        assert summary.seconds == pytest.approx(sum(line["duration"] for line in lines), abs=0.1)
    assert os.listdir(tmp_path)
