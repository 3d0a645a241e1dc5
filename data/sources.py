"""Where speech comes from: every source becomes a list of `SourceUtterance`s, which say where their audio is.

Kinds: a JSONL manifest with NeMo's keys, a LibriSpeech tree, an AISHELL-1 tree, a Hugging Face dataset (hub.py).
`open_source` finds out which. Nothing is decoded here. What cannot be used (a broken manifest line, audio without a
transcript) stays in the list with its `problem`, so that whoever prepares it can name and count it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from .tars import AUDIO_EXTENSIONS

AISHELL_TRANSCRIPT = "transcript/aishell_transcript_v0.8.txt"
MANIFEST_KEYS = {"audio_filepath", "duration", "text", "offset", "lang", "speaker", "keywords", "id"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
CJK_GAP = re.compile(r"(?<=[\u3400-\u9fff])\s+(?=[\u3400-\u9fff])")


class SourceError(ValueError):
    """A source that is not there or not understood; the message says what was looked for."""


@dataclass(slots=True)
class SourceUtterance:
    """One utterance of a source. `id` is a name or path without suffix; `size` is the bytes of its audio, if known."""

    id: str
    audio: str | int  # a path, or the row of a dataset
    text: str = ""
    lang: str = ""
    speaker: str = ""
    keywords: list[str] = field(default_factory=list)
    size: int = 0
    offset_s: float | None = None  # None: the whole file, else a segment of `duration_s`
    duration_s: float | None = None  # as the source says it
    extra: dict = field(default_factory=dict)  # what else the source says; kept in the shard's meta
    problem: str | None = None


class AudioReader(Protocol):
    """Finds an utterance's audio; travels to worker processes."""

    def __call__(self, utterance: SourceUtterance) -> str | bytes: ...


class PathReader:
    """The audio of sources whose utterances name files."""

    def __call__(self, utterance: SourceUtterance) -> str:
        return str(utterance.audio)


class Source(NamedTuple):
    """A source in full: its kind, its utterances in a fixed order, and how to get at their audio."""

    kind: str
    utterances: list[SourceUtterance]
    reader: AudioReader
    fingerprint: str = ""  # of the audio, where utterances have no size to tell a change by


def open_source(source: str | Path, *, split: str | None = None) -> Source:
    """Find out what `source` is and list it. Raises SourceError.

    `split` chooses among several splits ("train-clean-100", or several joined by commas, or "all"); where a source has
    more than one it must be given, because a test split mixed into training data is not noticed later.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if split not in (None, "all"):
            raise SourceError(f"{source}: a manifest has no splits, so split={split} cannot be taken; leave it out")
        return Source("manifest", list(read_manifest(path)), PathReader())
    if path.is_dir():
        return _open_folder(path, split)
    if HUB_NAME.fullmatch(str(source)) and not str(source).endswith((".json", ".jsonl")):
        from .hub import open_hub  # here, because importing datasets takes seconds

        return open_hub(str(source), split=split)
    raise SourceError(f"{source}: no such file or folder; a source is {_SOURCES}")


_SOURCES = (
    "a JSONL manifest (file, or folder with NAME.jsonl), a LibriSpeech tree (*.trans.txt), an AISHELL-1 tree "
    f"({AISHELL_TRANSCRIPT}), or a Hugging Face dataset (ORG/NAME[:CONFIG] on the hub, or a folder from save_to_disk)"
)


def _open_folder(folder: Path, split: str | None) -> Source:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        from .hub import open_saved

        return open_saved(folder, split=split)
    if (folder / AISHELL_TRANSCRIPT).exists():
        return Source("aishell", list(read_aishell(folder, split=split)), PathReader())
    manifests = sorted(folder.glob("*.jsonl"))
    if manifests:
        chosen = choose_splits(folder, [manifest.stem for manifest in manifests], split)
        # Ids are relative to the folder, so those of several manifests do not depend on which of them are taken.
        utterances = [u for name in chosen for u in read_manifest(folder / f"{name}.jsonl")]
        return Source("manifest", utterances, PathReader())
    if transcripts := sorted(folder.glob("*/*/*.trans.txt")) or sorted(folder.glob("*/*/*/*.trans.txt")):
        return Source("librispeech", list(read_librispeech(folder, transcripts, split=split)), PathReader())
    for unpacked in ("LibriSpeech", "data_aishell"):  # the folder around a published archive is as good
        if (folder / unpacked).is_dir():
            return _open_folder(folder / unpacked, split)
    raise SourceError(f"{folder}: nothing in this folder is a known kind of source; a source is {_SOURCES}")


def choose_splits(source: object, found: list[str], split: str | None) -> list[str]:
    """Return those of the `found` splits that `split` names ("a,b" or "all"); None is enough if there is only one."""
    if split == "all":
        return found
    if split is None:
        if len(found) == 1:
            return found
        raise SourceError(f"{source}: holds the splits {', '.join(found)}; choose with split=NAME, NAME,NAME or all")
    wanted = [name.strip() for name in split.split(",")]
    if missing := [name for name in wanted if name not in found]:
        raise SourceError(f"{source}: has no split {missing[0]!r}; it holds {', '.join(found) or 'none'}")
    return wanted


def read_manifest(path: Path) -> Iterator[SourceUtterance]:
    """NeMo's keys (audio_filepath, relative to the manifest or absolute; duration, text, offset) and a few more."""
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                yield _manifest_utterance(path, json.loads(line.decode("utf-8")))
            except (ValueError, TypeError) as error:
                reason = "not a line of JSON" if isinstance(error, json.JSONDecodeError) else str(error)
                yield SourceUtterance(f"{path.stem}-line-{number}", "", problem=f"{path.name}, line {number}: {reason}")


def _manifest_utterance(path: Path, entry: object) -> SourceUtterance:
    if not isinstance(entry, dict) or not isinstance(entry.get("audio_filepath"), str):
        raise ValueError("needs an object with the key audio_filepath")
    keywords = entry.get("keywords") or []
    if not isinstance(keywords, list) or not all(isinstance(word, str) for word in keywords):
        raise ValueError(f"keywords must be a list of strings, not {keywords!r}")
    audio = entry["audio_filepath"]
    offset, duration = _seconds(entry, "offset"), _seconds(entry, "duration")
    identity = entry.get("id") or os.path.splitext(audio)[0] + ("" if offset is None else f"-{round(offset * 1000)}ms")
    return SourceUtterance(
        id=str(identity),
        audio=os.path.join(path.parent, audio),
        text=_string(entry, "text"),
        lang=_string(entry, "lang"),
        speaker=_string(entry, "speaker"),
        keywords=keywords,
        size=file_size(os.path.join(path.parent, audio)),
        offset_s=offset,
        duration_s=duration,
        # Segments of one file are one recording, unless the manifest knows better.
        extra=({} if offset is None else {"session": audio})
        | {key: value for key, value in entry.items() if key not in MANIFEST_KEYS},
    )


def _string(entry: dict, key: str) -> str:
    value = entry.get(key)
    if key == "speaker" and isinstance(value, int):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {value!r}")
    return " ".join(value.split()) if value else ""


def _seconds(entry: dict, key: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{key} must be a number of seconds, not {value!r}")
    return float(value)


@lru_cache(maxsize=1)  # neighbouring segments share their file
def file_size(path: str) -> int:
    """Bytes of a file; 0 if it is not there, which reading it will report."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def read_librispeech(folder: Path, transcripts: list[Path], *, split: str | None) -> Iterator[SourceUtterance]:
    """[SPLIT/]SPEAKER/CHAPTER/ holds S-C.trans.txt and S-C-NUMBER.flac; the text stays as published (capitals).

    A chapter is a session.
    """
    by_split: dict[str, list[Path]] = {}
    for transcript in transcripts:
        parts = transcript.relative_to(folder).parts
        by_split.setdefault(parts[0] if len(parts) == 4 else folder.name, []).append(transcript)
    for name in choose_splits(folder, sorted(by_split), split):
        for transcript in by_split[name]:
            yield from _librispeech_chapter(transcript)


def _librispeech_chapter(transcript: Path) -> Iterator[SourceUtterance]:
    audio = _audio_files(transcript.parent)
    for line in transcript.read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition(" ")
        path = audio.pop(name, transcript.parent / f"{name}.flac")
        yield SourceUtterance(
            id=name,
            audio=str(path),
            text=" ".join(text.split()),
            lang="en",
            speaker=transcript.parent.parent.name,
            size=file_size(str(path)),
            extra={"session": transcript.name.removesuffix(".trans.txt")},
        )
    for name, path in audio.items():
        yield SourceUtterance(name, str(path), problem=f"no line for it in {transcript.name}")


def _audio_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix[1:].lower() in AUDIO_EXTENSIONS}


def read_aishell(folder: Path, *, split: str | None) -> Iterator[SourceUtterance]:
    """wav/SPLIT/SPEAKER/NAME.wav and one transcript file; spaces between Chinese words are dropped."""
    texts = {}
    for line in (folder / AISHELL_TRANSCRIPT).read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition(" ")
        texts[name] = CJK_GAP.sub("", " ".join(text.split()))
    found = sorted(path.name for path in folder.glob("wav/*") if path.is_dir())
    if not any(folder.glob("wav/*/*/*.wav")):
        raise SourceError(f"{folder}: no wav/{{train,dev,test}}/SPEAKER/*.wav here; unpack the speakers' .tar.gz first")
    for name in choose_splits(folder, found, split):
        for path in sorted((folder / "wav" / name).glob("*/*.wav")):
            yield SourceUtterance(
                id=path.stem,
                audio=str(path),
                text=texts.get(path.stem, ""),
                lang="zh",
                speaker=path.parent.name,
                size=file_size(str(path)),
                problem=None if path.stem in texts else f"no line for it in {AISHELL_TRANSCRIPT}",
            )
