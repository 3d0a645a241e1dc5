"""`seedling prepare`: any source to shards, in parallel, resumable after a kill, the same bytes every time.

A finished shard leaves a note in `OUT/.prepare/`; a run that finds notes of the same plan keeps their shards.
Utterances that cannot be used are named in `OUT/rejected.jsonl` and counted; too many fail the run. `OUT/corpus.json`
comes last, and after it the list of the shards (shard_list.py).
"""

from __future__ import annotations

import fcntl
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from .audio import AudioError, read_audio
from .cutting import cut_into_shards
from .index import index_path, list_shards
from .parallel import advance, over_shards
from .shards import open_shard, shard_path
from .sources import AudioReader, Source, SourceUtterance, open_source
from .whole_file import PART, whole_file, write_json

FORMAT = 1  # raised when the same source would give other bytes
# Duration said by a source and held by its file may differ by rounding and by codec delay.
DURATION_SLACK_S = 0.1
DURATION_SLACK = 0.02


class PrepareError(ValueError):
    """The source or the output folder does not allow what was asked; the message says the way out."""


@dataclass
class PrepareSummary:
    """The totals in corpus.json."""

    kind: str
    utterances: int
    seconds: float
    rejected: int
    sample_rate: int
    shards: list[str]
    languages: dict[str, float]  # seconds by language


class ShardTask(NamedTuple):
    """All that a worker needs to write one shard."""

    out: Path
    number: int
    plan: str
    keys: list[str]
    utterances: list[SourceUtterance]
    reader: AudioReader
    sample_rate: int
    lang: str


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    sample_rate: int = 16000,
    jobs: int = 1,
    shard_seconds: float = 3600.0,
    split: str | None = None,
    lang: str | None = None,
    limit: int | None = None,
    max_bad_fraction: float = 0.01,
) -> PrepareSummary:
    """Write `source` as shards into the folder `out`, or go on where a killed run stopped.

    `shard_seconds` bounds the audio in a shard, as estimated (an hour is about 60 MB at 16 kHz). `lang` fills in where
    the source names no language; `limit` takes the first utterances only. Raises SourceError where the source is not
    understood, PrepareError where `out` holds something else or too much is rejected.
    """
    if shard_seconds <= 0 or sample_rate <= 0:
        raise PrepareError(f"shard_seconds ({shard_seconds}) and sample_rate ({sample_rate}) must be positive")
    listing = open_source(source, split=split)
    utterances = listing.utterances[:limit]
    if not utterances:
        raise PrepareError(f"{source}: no utterances in this {listing.kind} source (limit {limit})")
    listing = listing._replace(utterances=utterances)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "sample_rate": sample_rate,
        "shard_seconds": shard_seconds,
        "lang": lang,
        "split": split,
        "limit": limit,
    }
    with _only_one(out):
        plan = _claim(out, source, listing, settings)
        tasks = [
            ShardTask(out, number, plan, keys, utterances, listing.reader, sample_rate, lang or "")
            for number, (keys, utterances) in enumerate(cut_into_shards(listing, shard_seconds))
        ]
        notes = _write_shards(tasks, jobs=jobs, max_bad=max_bad_fraction * len(utterances))
        return _finish(out, listing, notes, sample_rate=sample_rate, max_bad_fraction=max_bad_fraction)


def _write_shards(tasks: list[ShardTask], *, jobs: int, max_bad: float) -> list[dict]:
    """Write the shards that are not there yet and return all notes in order; stop early once too many are rejected."""
    notes = {task.number: note for task in tasks if (note := _finished(task))}
    todo = [task for task in tasks if task.number not in notes]
    if not todo:
        return [notes[number] for number in sorted(notes)]
    (tasks[0].out / "corpus.json").unlink(missing_ok=True)
    total = sum(len(task.utterances) for task in todo)
    for number, note in over_shards(_write_shard, todo, jobs=jobs, label="prepare", total=total, unit="utt"):
        notes[todo[number].number] = note
        if sum(len(note["rejected"]) for note in notes.values()) > max_bad:
            break
    return [notes[number] for number in sorted(notes)]


def _finish(
    out: Path, listing: Source, notes: list[dict], *, sample_rate: int, max_bad_fraction: float
) -> PrepareSummary:
    rejected = [entry for note in notes for entry in note["rejected"]]
    with whole_file(out / "rejected.jsonl") as handle:
        handle.writelines(json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n" for entry in rejected)
    total = len(listing.utterances)
    if len(rejected) > max_bad_fraction * total:
        done = len(rejected) + sum(note["utterances"] for note in notes)
        which = f"{done} utterances" if done == total else f"the first {done} utterances ({total} in all)"
        raise PrepareError(
            f"{out}: {len(rejected)} of {which} rejected, more than max_bad_fraction "
            f"({max_bad_fraction:g}); the first is {rejected[0]['id']} ({rejected[0]['reason']}), all are in "
            f"{out / 'rejected.jsonl'}; mend the source, or raise max_bad_fraction to go on without them"
        )
    seconds: dict[str, float] = defaultdict(float)
    for note in notes:
        for language, length in note["seconds"].items():
            seconds[language] += length
    shards = [note["shard"] for note in notes if note["utterances"]]
    if not shards:
        raise PrepareError(f"{out}: all {total} utterances were rejected; see {out / 'rejected.jsonl'}")
    summary = PrepareSummary(
        kind=listing.kind,
        utterances=sum(note["utterances"] for note in notes),
        seconds=round(sum(seconds.values()), 3),
        rejected=len(rejected),
        sample_rate=sample_rate,
        shards=shards,
        languages={lang: round(seconds[lang], 3) for lang in sorted(seconds)},
    )
    write_json(out / "corpus.json", asdict(summary))
    list_shards(out)
    return summary


# --- the output folder: one run at a time, one plan for ever


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    (out / ".prepare").mkdir(exist_ok=True)
    with open(out / ".prepare" / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"{out}: another `seedling prepare` is writing here; wait for it or stop it") from None
        for part in [*out.glob(f".*{PART}"), *(out / ".prepare").glob(f".*{PART}")]:
            part.unlink(missing_ok=True)
        yield


def _claim(out: Path, source: str | Path, listing: Source, settings: dict) -> str:
    """Return the plan's hash, having made sure that `out` holds nothing, or shards of this very plan."""
    digest = sha256(json.dumps([FORMAT, listing.kind, listing.fingerprint, settings]).encode())
    for u in listing.utterances:
        row = [u.id, u.text, u.lang, u.speaker, u.keywords, u.size, u.offset_s, u.duration_s, u.extra, u.problem]
        digest.update(json.dumps(row, sort_keys=True).encode())
    found = {"kind": listing.kind, "utterances": len(listing.utterances), **settings}
    wanted = {"plan": digest.hexdigest(), "source": str(source), **found}
    path = out / "prepare.json"
    if not path.exists():
        if strangers := sorted(out.glob("*.tar")):
            raise PrepareError(f"{out}: holds {strangers[0].name}, which was not prepared here; choose an empty folder")
        write_json(path, wanted)
        return wanted["plan"]
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["plan"] != wanted["plan"]:
        changed = [f"{key} was {stored.get(key)!r}, is {now!r}" for key, now in found.items() if stored.get(key) != now]
        what = "; ".join(changed) or "the texts or files of the source changed"
        raise PrepareError(f"{out}: was prepared from something else ({what}); delete the folder or choose another")
    return wanted["plan"]


def _finished(task: ShardTask) -> dict | None:
    """Return the note of a shard that is complete and of this plan."""
    try:
        note = json.loads(_note_path(task).read_text(encoding="utf-8"))
        tar = shard_path(task.out, task.number)
        whole = not note["utterances"] or (tar.stat().st_size == note["bytes"] and index_path(tar).exists())
    except (OSError, ValueError, KeyError):
        return None
    return note if whole and note["plan"] == task.plan else None


def _note_path(task: ShardTask) -> Path:
    return task.out / ".prepare" / f"{task.number:06d}.json"


# --- one shard, in a worker


def _write_shard(task: ShardTask) -> dict:
    """Write a shard and its index, then the note that says it is complete; return the note."""
    rejected: list[dict] = []
    seconds: dict[str, float] = defaultdict(float)
    good = _good(task, rejected)
    tar = shard_path(task.out, task.number)
    written = 0
    first = next(good, None)
    if first:  # a tar without utterances is no shard: if all are bad there is only the note
        with open_shard(tar, sample_rate=task.sample_rate) as shard:
            while first:
                key, waveform, meta = first
                seconds[meta["lang"]] += shard.add(key, waveform, meta)
                written += 1
                first = next(good, None)
    note = {
        "plan": task.plan,
        "shard": tar.name,
        "bytes": tar.stat().st_size if written else 0,
        "utterances": written,
        "seconds": seconds,
        "rejected": rejected,
    }
    write_json(_note_path(task), note)
    return note


def _good(task: ShardTask, rejected: list[dict]) -> Iterator[tuple]:
    """Yield (key, waveform, meta) of usable utterances and add the others to `rejected`."""
    for key, utterance in zip(task.keys, task.utterances):
        try:
            if utterance.problem:
                raise AudioError(utterance.problem)
            waveform = load(utterance, task.reader, sample_rate=task.sample_rate)
        except AudioError as error:
            rejected.append({"id": utterance.id, "reason": str(error)})
        else:
            meta = {
                **utterance.extra,
                "text": utterance.text,
                "lang": utterance.lang or task.lang,
                "speaker": utterance.speaker,
                "keywords": utterance.keywords,
                "id": utterance.id,
            }
            yield key, waveform, meta
        advance()


def load(utterance: SourceUtterance, reader: AudioReader, *, sample_rate: int):
    """Return float32 [N]. Raises AudioError, also where the file is not as long as the source says."""
    audio = reader(utterance)
    name = audio if isinstance(audio, str) else utterance.id
    if utterance.offset_s is not None:
        duration = utterance.duration_s or None
        return read_audio(audio, sample_rate=sample_rate, offset_s=utterance.offset_s, duration_s=duration, name=name)
    waveform = read_audio(audio, sample_rate=sample_rate, name=name)
    said, held = utterance.duration_s, len(waveform) / sample_rate
    if said is not None and abs(said - held) > max(DURATION_SLACK_S, DURATION_SLACK * said):
        raise AudioError(f"{name}: lasts {held:.2f} s, its source says {said:.2f} s (a segment needs an offset)")
    return waveform
