"""The index finds every utterance of any WebDataset, and says so when it cannot."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from seedling.data.audio import encode_flac
from seedling.data.index import (
    Corpus,
    MissingIndex,
    TarError,
    index_folder,
    index_path,
    parse_meta,
    read_index,
    scan_tar,
    write_index,
)

RATE = 16000


def noise(seconds: float, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * RATE)).astype(np.float32)


def flac(seconds: float, *, seed: int = 0) -> bytes:
    return encode_flac(noise(seconds, seed=seed), sample_rate=RATE)


def ogg(seconds: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(seconds), RATE, format="OGG", subtype="OPUS")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], *, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def simple_tar(path: Path, *, utterances: int = 5, seed: int = 0) -> Path:
    files = {}
    for i in range(utterances):
        files[f"utt{i}.flac"] = flac(0.1 * (i + 1), seed=seed + i)
        files[f"utt{i}.json"] = json.dumps({"text": f"text {i}", "lang": "en"}).encode()
    return write_tar(path, files)


def payload(tar: Path, offset: int, size: int) -> bytes:
    return tar.read_bytes()[offset : offset + size]


def test_offsets_lead_to_the_bytes_that_webdataset_reads(tmp_path):
    tar = simple_tar(tmp_path / "a.tar")
    rows = write_index(tar)
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [row["key"].decode() for row in rows] == [sample["__key__"] for sample in samples]
    for row, sample in zip(rows, samples):
        assert payload(tar, row["audio_offset"], row["audio_size"]) == sample["flac"]
        assert payload(tar, row["meta_offset"], row["meta_size"]) == sample["json"]
    assert rows["samples"].tolist() == [1600, 3200, 4800, 6400, 8000]
    assert set(rows["sample_rate"].tolist()) == {RATE}
    assert set(rows["text_chars"].tolist()) == {6}
    assert set(rows["lang"].tolist()) == {b"en"}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_found(tmp_path, format):
    name = "folder/" + "long" * 40 + "-é"
    tar = write_tar(tmp_path / "a.tar", {f"{name}.flac": flac(0.2), f"{name}.txt": "größe".encode()}, format=format)
    (row,) = write_index(tar)
    assert row["key"].decode() == name
    assert payload(tar, row["audio_offset"], row["audio_size"]) == flac(0.2)
    assert row["text_chars"] == 5


def test_text_comes_from_json_or_from_txt(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar",
        {
            "a.json": b'{"text": "from json"}',
            "a.wav.flac": flac(0.1),
            "a.txt": b"from txt",
            "b.opus": ogg(0.5),
            "b.json": b'{"speaker": "s"}',
            "b.txt": b" from txt \n",
            "c.FLAC": flac(0.1),
            "d.flac": flac(0.1),
            "d.json": b"{broken",
            "e.cls": b"1",
        },
    )
    rows = write_index(tar)
    metas = [
        parse_meta(payload(tar, row["meta_offset"], row["meta_size"]), is_json=bool(row["meta_json"]))
        for row in rows[:2]
    ]
    assert metas == [{"text": "from json"}, {"text": "from txt"}]
    assert rows["key"].tolist() == [b"a", b"b", b"c", b"d"]
    assert rows["meta_size"][2] == 0
    assert rows["text_chars"].tolist() == [9, 8, 0, 0]


def test_unreadable_audio_keeps_its_row_with_no_samples(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.flac": flac(0.1), "b.flac": b"no audio"})
    summary = index_folder(tmp_path)
    assert summary == (1, 2, 0.1, 1)
    assert read_index(tmp_path / "a.tar")["samples"].tolist() == [1600, 0]


def test_a_tar_cut_anywhere_is_torn_and_never_crashes_the_scan(tmp_path):
    whole = simple_tar(tmp_path / "whole.tar")
    content = whole.read_bytes()
    names = [member.name for member in scan_tar(whole).members]
    end = max(member.offset + member.size for member in scan_tar(whole).members)
    torn = tmp_path / "torn.tar"
    for size in [*range(0, end, 700), *range(0, end, 512 * 3)]:
        torn.write_bytes(content[:size])
        scan = scan_tar(torn)
        assert scan.error
        assert [member.name for member in scan.members] == names[: len(scan.members)]
        with pytest.raises(TarError, match=r"torn\.tar"):
            write_index(torn)
    assert not index_path(torn).exists()


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path):
    tar = simple_tar(tmp_path / "a.tar")
    content = bytearray(tar.read_bytes())
    third = scan_tar(tar).members[4]
    content[third.offset - 512 : third.offset - 400] = b"\xff" * 112
    tar.write_bytes(content)
    scan = scan_tar(tar)
    assert scan.error
    assert len(scan.members) == 4


def test_a_missing_or_foreign_index_says_which_command_writes_it(tmp_path):
    tar = simple_tar(tmp_path / "a.tar")
    with pytest.raises(MissingIndex, match=f"seedling index {tmp_path}"):
        Corpus.open(tmp_path)
    np.save(index_path(tar), np.zeros(3))
    with pytest.raises(MissingIndex, match="seedling index"):
        read_index(tar)
    index_path(tar).write_bytes(b"not an array")
    with pytest.raises(MissingIndex, match="seedling index"):
        read_index(tar)


def test_an_index_written_anew_is_not_served_from_the_cache(tmp_path):
    tar = simple_tar(tmp_path / "a.tar", utterances=2)
    write_index(tar)
    assert len(read_index(tar)) == 2
    write_index(simple_tar(tar, utterances=3))
    assert len(read_index(tar)) == 3


def test_a_corpus_sums_its_shards_in_the_order_of_its_folders(tmp_path):
    for folder, seed in (("b", 0), ("a", 10)):
        simple_tar(tmp_path / folder / "1.tar", seed=seed)
        simple_tar(tmp_path / folder / "0.tar", utterances=2, seed=seed)
    index_folder(tmp_path, jobs=2)
    corpus = Corpus.open([tmp_path / "b", str(tmp_path / "a" / "*.tar")])
    assert [str(shard.relative_to(tmp_path)) for shard in corpus.shards] == ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]
    assert corpus.num_utterances == 14
    assert corpus.seconds == pytest.approx(2 * (1.5 + 0.3))
    assert len(Corpus.open(tmp_path).shards) == 4


def test_the_fingerprint_follows_content_and_not_place(tmp_path):
    prints = []
    for folder, utterances in (("a", 3), ("b", 3), ("c", 4)):
        write_index(simple_tar(tmp_path / folder / "0.tar", utterances=utterances))
        prints.append(Corpus.open(tmp_path / folder).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_mistakes_in_naming_a_corpus_are_explained(tmp_path):
    write_index(simple_tar(tmp_path / "x" / "0.tar"))
    with pytest.raises(ValueError, match="twice"):
        Corpus.open([tmp_path / "x", tmp_path / "x" / "0.tar"])
    with pytest.raises(ValueError, match="seedling prepare"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one folder"):
        Corpus.open([])
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "0.tar.gz").touch()
    with pytest.raises(ValueError, match="compressed"):
        Corpus.open(tmp_path / "y")
    (tmp_path / "x" / "prepare.json").write_text("{}")
    with pytest.raises(ValueError, match="not finished"):
        Corpus.open(tmp_path / "x")
    write_tar(tmp_path / "z" / "0.tar", {"a.png": b"image"})
    with pytest.raises(TarError, match="no audio in 1 files"):
        index_folder(tmp_path / "z")
