"""Every kind of source gives the same kind of list, and an unknown one an error that says what was looked for."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from seedling.data.audio import encode_flac, read_audio
from seedling.data.sources import SourceError, open_source

RATE = 16000


def flac(seconds: float = 0.5, *, seed: int = 0) -> bytes:
    waveform = np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * RATE)).astype(np.float32)
    return encode_flac(waveform, sample_rate=RATE)


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def put_manifest(path: Path, entries: list) -> Path:
    return put(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def librispeech(root: Path) -> Path:
    for split, speaker in (("dev-clean", "84"), ("train-clean-100", "19")):
        chapter = root / split / speaker / "7"
        put(chapter / f"{speaker}-7.trans.txt", f"{speaker}-7-0000 HELLO WORLD\n{speaker}-7-0001 GOOD  BYE\n")
        for number in range(2):
            put(chapter / f"{speaker}-7-{number:04d}.flac", flac(seed=number))
    return root


def aishell(root: Path) -> Path:
    put(root / "transcript/aishell_transcript_v0.8.txt", "BAC1 而 对 楼市 iPhone 成交\nBAC2 好 的\n")
    for split, name in (("train", "BAC1"), ("test", "BAC2"), ("train", "BAC3")):
        put(root / "wav" / split / "S0002" / f"{name}.wav", flac())
    return root


def with_audio(rows: dict[str, list]) -> datasets.Dataset:
    """A dataset of encoded audio beside `rows`; encoding through the Audio feature would need torchcodec."""
    count = len(next(iter(rows.values())))
    audio = [{"bytes": flac(seed=i), "path": None} for i in range(count)]
    features = datasets.Dataset.from_dict(rows).features
    features["audio"] = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return datasets.Dataset.from_dict({**rows, "audio": audio}, features=features).cast_column(
        "audio", datasets.Audio(RATE)
    )


def saved_dataset(folder: Path, *, splits: bool = False) -> Path:
    rows = {"sentence": ["eins", " zwei  drei ", None], "speaker_id": [7, 8, 9]}
    dataset = with_audio(rows)
    (datasets.DatasetDict({"train": dataset, "test": dataset}) if splits else dataset).save_to_disk(str(folder))
    return folder


def test_a_manifest_gives_all_its_keys(tmp_path):
    put(tmp_path / "audio" / "a.flac", flac())
    entry = {
        "audio_filepath": "audio/a.flac",
        "duration": 0.25,
        "offset": 0.125,
        "text": " two  words ",
        "lang": "en",
        "speaker": 12,
        "keywords": ["two", "words"],
        "room": "kitchen",
    }
    source = open_source(put_manifest(tmp_path / "m.jsonl", [entry, {"audio_filepath": str(tmp_path / "b.wav")}]))
    first, second = source.utterances
    assert source.kind == "manifest"
    assert (first.id, first.text, first.lang, first.speaker) == ("audio/a-125ms", "two words", "en", "12")
    assert (first.keywords, first.offset_s, first.duration_s) == (["two", "words"], 0.125, 0.25)
    assert first.extra == {"room": "kitchen", "session": "audio/a.flac"} and second.extra == {}
    assert first.size == len(flac())
    assert len(read_audio(source.reader(first))) == RATE // 2
    assert (second.text, second.duration_s, second.size, second.problem) == ("", None, 0, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not a line of JSON"),
        ("[1]", "audio_filepath"),
        ('{"text": "no audio"}', "audio_filepath"),
        ('{"audio_filepath": "a.wav", "text": 3}', "text must be a string, not 3"),
        ('{"audio_filepath": "a.wav", "duration": "long"}', "duration must be a number"),
        ('{"audio_filepath": "a.wav", "offset": -1}', "offset must be a number"),
        ('{"audio_filepath": "a.wav", "keywords": "one"}', "keywords must be a list"),
    ],
)
def test_a_broken_manifest_line_is_kept_with_its_number_and_reason(tmp_path, line, reason):
    manifest = put(tmp_path / "m.jsonl", '{"audio_filepath": "a.wav"}\n\n' + line + "\n")
    good, bad = open_source(manifest).utterances
    assert good.problem is None
    assert bad.id == "m-line-3"
    assert bad.problem.startswith("m.jsonl, line 3: ")
    assert reason in bad.problem


def test_a_folder_of_manifests_wants_a_choice(tmp_path):
    put_manifest(tmp_path / "dev.jsonl", [{"audio_filepath": "a.wav"}])
    assert len(open_source(tmp_path).utterances) == 1
    put_manifest(tmp_path / "train.jsonl", [{"audio_filepath": "b.wav"}, {"audio_filepath": "c.wav"}])
    with pytest.raises(SourceError, match="holds the splits dev, train"):
        open_source(tmp_path)
    assert [u.id for u in open_source(tmp_path, split="train").utterances] == ["b", "c"]
    assert [u.id for u in open_source(tmp_path, split="all").utterances] == ["a", "b", "c"]
    with pytest.raises(SourceError, match="no split 'test'"):
        open_source(tmp_path, split="test")
    with pytest.raises(SourceError, match="a manifest has no splits"):
        open_source(tmp_path / "dev.jsonl", split="train")


def test_a_librispeech_tree_is_read_from_any_of_its_levels(tmp_path):
    librispeech(tmp_path / "LibriSpeech")
    for folder, split in (
        (tmp_path, "dev-clean"),
        (tmp_path / "LibriSpeech", "dev-clean"),
        (tmp_path / "LibriSpeech/dev-clean", None),
    ):
        source = open_source(folder, split=split)
        assert source.kind == "librispeech"
        assert [(u.id, u.text, u.speaker, u.lang) for u in source.utterances] == [
            ("84-7-0000", "HELLO WORLD", "84", "en"),
            ("84-7-0001", "GOOD BYE", "84", "en"),
        ]
    both = open_source(tmp_path, split="train-clean-100,dev-clean").utterances
    assert [u.id for u in both] == ["19-7-0000", "19-7-0001", "84-7-0000", "84-7-0001"]


def test_librispeech_audio_without_a_line_is_a_problem(tmp_path):
    librispeech(tmp_path)
    put(tmp_path / "dev-clean/84/7/84-7-0009.flac", flac())
    problems = {u.id: u.problem for u in open_source(tmp_path, split="dev-clean").utterances if u.problem}
    assert problems == {"84-7-0009": "no line for it in 84-7.trans.txt"}


def test_an_aishell_tree_drops_the_spaces_between_chinese_words_only(tmp_path):
    source = open_source(aishell(tmp_path / "data_aishell").parent, split="train")
    assert source.kind == "aishell"
    first, second = source.utterances
    assert (first.id, first.text, first.lang, first.speaker) == ("BAC1", "而对楼市 iPhone 成交", "zh", "S0002")
    assert first.problem is None
    assert "no line for it" in second.problem
    assert [u.id for u in open_source(tmp_path, split="test").utterances] == ["BAC2"]
    with pytest.raises(SourceError, match="test, train"):
        open_source(tmp_path)


def test_an_aishell_tree_still_packed_says_to_unpack(tmp_path):
    put(tmp_path / "transcript/aishell_transcript_v0.8.txt", "BAC1 好\n")
    put(tmp_path / "wav/S0002.tar.gz", b"")
    with pytest.raises(SourceError, match="unpack"):
        open_source(tmp_path)


def test_a_saved_hugging_face_dataset_gives_rows_with_undecoded_audio(tmp_path):
    source = open_source(saved_dataset(tmp_path / "set"))
    assert source.kind == "hugging_face"
    assert [u.text for u in source.utterances] == ["eins", "zwei drei", ""]
    assert [u.speaker for u in source.utterances] == ["7", "8", "9"]
    assert len({u.id for u in source.utterances}) == 3
    assert source.fingerprint
    for i, utterance in enumerate(source.utterances):
        assert source.reader(utterance) == flac(seed=i)


def test_a_saved_dataset_dict_wants_a_split(tmp_path):
    folder = saved_dataset(tmp_path / "set", splits=True)
    with pytest.raises(SourceError, match="test, train"):
        open_source(folder)
    assert len(open_source(folder, split="train").utterances) == 3
    both = open_source(folder, split="test,train")
    assert len(both.utterances) == 6
    assert both.reader(both.utterances[5]) == flac(seed=2)


def test_a_dataset_without_audio_or_text_names_its_columns(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "path": ["b"]}).save_to_disk(str(tmp_path / "no_audio"))
    with pytest.raises(SourceError, match="one column of type Audio"):
        open_source(tmp_path / "no_audio")
    with_audio({"label": ["a"]}).save_to_disk(str(tmp_path / "no_text"))
    with pytest.raises(SourceError, match=r"no text column; looked for text, .* in label"):
        open_source(tmp_path / "no_text")


def test_what_is_no_source_is_told_what_a_source_is(tmp_path):
    put(tmp_path / "empty" / "readme.md", "nothing to hear")
    for source in (tmp_path / "empty", tmp_path / "absent", "./absent.jsonl", "absent"):
        with pytest.raises(SourceError, match=r"JSONL manifest.*LibriSpeech.*AISHELL-1.*Hugging Face"):
            open_source(source)


def test_a_hub_name_that_cannot_be_had_says_so(monkeypatch):
    def refuse(name, config):
        raise ConnectionError("the hub is out of reach\nwith details")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(SourceError, match=r"someone/something: neither .* \(the hub is out of reach\)"):
        open_source("someone/something")
