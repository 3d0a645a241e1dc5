"""Hugging Face datasets as a source: from the hub, or a folder written by `save_to_disk`.

Audio stays encoded (`Audio(decode=False)`): the library's own decoder needs a package that breaks torch's CPU builds.
Only the columns without audio are read for the list; a worker fetches the bytes of a row when it comes to it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets

from .audio import AudioError
from .sources import Source, SourceError, SourceUtterance, choose_splits

TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "normalized_text")
LANG_COLUMNS = ("lang", "language", "locale")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
ID_COLUMNS = ("id", "utterance_id", "key")


@dataclass(frozen=True)
class HubAudio:
    """Reads the encoded audio of a row. Opens the dataset where it is used, so it is cheap to send to a process."""

    name: str  # a hub name or a folder
    saved: bool
    splits: tuple[str, ...]

    def __call__(self, utterance: SourceUtterance) -> str | bytes:
        table, column = _open(self)
        audio = table.select_columns([column])[int(utterance.audio)][column]
        if not audio or not (audio.get("bytes") or audio.get("path")):
            raise AudioError(f"{utterance.id}: the row has no audio")
        return audio["bytes"] or audio["path"]


def open_hub(name: str, *, split: str | None) -> Source:
    """ORG/NAME[:CONFIG] on the hub (or in the local cache)."""
    dataset, _, config = name.partition(":")
    try:
        found = datasets.get_dataset_split_names(dataset, config or None)
    except Exception as error:  # the library raises anything from ConnectionError to its own kinds
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{name}: neither a file or folder here, nor a dataset that the hub would give ({reason})"
        ) from error
    return _source(HubAudio(name, saved=False, splits=tuple(choose_splits(name, found, split))))


def open_saved(folder: Path, *, split: str | None) -> Source:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    loaded = datasets.load_from_disk(str(folder))
    found = sorted(map(str, loaded)) if isinstance(loaded, datasets.DatasetDict) else [str(loaded.split or "train")]
    return _source(HubAudio(str(folder.resolve()), saved=True, splits=tuple(choose_splits(folder, found, split))))


@lru_cache(maxsize=1)
def _open(audio: HubAudio) -> tuple[datasets.Dataset, str]:
    """Return the chosen splits in one table with undecoded audio, and the name of the audio column."""
    if audio.saved:
        loaded = datasets.load_from_disk(audio.name)
        if isinstance(loaded, datasets.Dataset):
            table = loaded
        else:
            table = datasets.concatenate_datasets([loaded[split] for split in audio.splits])
    else:
        name, _, config = audio.name.partition(":")
        parts = datasets.load_dataset(name, config or None, split=list(audio.splits))
        table = datasets.concatenate_datasets(list(parts))  # pyright: ignore[reportArgumentType]
    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Audio)]
    if len(columns) != 1:
        raise SourceError(f"{audio.name}: needs one column of type Audio, has {columns or list(table.features)}")
    return table.cast_column(columns[0], datasets.Audio(decode=False)), columns[0]


def _source(audio: HubAudio) -> Source:
    table, audio_column = _open(audio)
    rows = table.remove_columns([audio_column])
    columns = {
        role: next((name for name in names if name in rows.column_names), None)
        for role, names in [
            ("text", TEXT_COLUMNS),
            ("lang", LANG_COLUMNS),
            ("speaker", SPEAKER_COLUMNS),
            ("id", ID_COLUMNS),
        ]
    }
    if columns["text"] is None:
        raise SourceError(
            f"{audio.name}: no text column; looked for {', '.join(TEXT_COLUMNS)} in {', '.join(rows.column_names)}"
        )
    prefix = os.path.basename(audio.name.partition(":")[0]) + "-" + "+".join(audio.splits)
    kept = rows.select_columns([name for name in columns.values() if name])
    utterances = []
    for number, row in enumerate(kept):
        value = {role: row[name] if name else None for role, name in columns.items()}
        utterances.append(
            SourceUtterance(
                id=str(value["id"]) if value["id"] is not None else f"{prefix}-{number:08d}",
                audio=number,
                text=" ".join(str(value["text"] or "").split()),
                lang=_label(rows, columns["lang"], value["lang"]),
                speaker=_label(rows, columns["speaker"], value["speaker"]),
            )
        )
    return Source("hugging_face", utterances, audio, fingerprint=table._fingerprint)


def _label(rows: datasets.Dataset, column: str | None, value: object) -> str:
    """Return a value as text; classes by their name."""
    if column is None or value is None:
        return ""
    feature = rows.features[column]
    return str(feature.int2str(value) if isinstance(feature, datasets.ClassLabel) and isinstance(value, int) else value)
