"""The demo's spoken corpus: requests to a voice assistant, synthesised in many voices, rooms and noises.

`generate` writes OUT/{train,dev,test}.jsonl (NeMo's keys audio_filepath, relative to OUT, duration and text; then
speaker, lang and keywords), 16 kHz FLAC below OUT/audio, OUT/lm_text.txt and OUT/homophones.json.

- Dev and test share no voice with training: their espeak-ng variants (the shape of the throat) are theirs alone, in all
  accents. Nor any sentence: none sounds like one in train.jsonl or lm_text.txt. The grammar is shared, see `demo_text`.
- Texts, splits and voices depend on the seed alone. Audio does too on one machine with one version of the libraries,
  for any number of jobs: chunks of fixed size are spoken each by a fresh process, because espeak-ng's noise keeps its
  state from one utterance to the next. On another machine the bits may differ, so nothing should rely on them.
- A run that was interrupted goes on with the chunks that are missing; one that is complete returns at once.
"""

import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import zlib
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from . import acoustics, demo_text
from .synthesis import VARIANTS, Espeak, import_loader

VERSION = 4  # raise it with every change that alters what is written: older corpora are then generated anew
SAMPLE_RATE = 16_000
CHUNK_UTTERANCES = 300
# None of these has a near twin among the others, as f2 has in f5 or adam in benjamin.
HELD_OUT_VARIANTS = {"dev": ("f1", "m5", "edward", "linda"), "test": ("f4", "m4", "m7", "Annie")}
# Four of espeak's accents: what a small model can learn in minutes.
DEMO_ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029")
STAMP = "demo_corpus.json"  # the settings, and whether all of it is there
WRITTEN = ("audio", "parts", "train.jsonl", "dev.jsonl", "test.jsonl", "lm_text.txt", "homophones.json")


class Utterance(NamedTuple):
    """What is to be said and how; `key` also seeds the acoustics."""

    key: str
    split: str
    text: str
    keywords: tuple[str, ...]
    voice: str
    words_per_minute: int
    pitch: int


class Statistics(NamedTuple):
    """Totals of one manifest."""

    utterances: int
    hours: float
    mean_seconds: float
    words_per_second: float
    vocabulary: int
    voices: int


def generate(
    out: Path,
    *,
    hours: float = 2.0,
    heldout_utterances: int = 300,
    lm_sentences: int = 60_000,
    seed: int = 0,
    jobs: int = 2,
) -> Path:
    """Write the corpus below `out` and return it. `hours` is training audio, met within a few percent.

    `lm_sentences` are drawn for lm_text.txt beyond the training sentences. `out` is absent, empty or a demo corpus; one
    of other settings is replaced. ValueError if the package that speaks is missing.
    """
    if hours <= 0 or jobs < 1 or heldout_utterances < 1:
        raise ValueError(
            f"hours ({hours}) must be positive, jobs ({jobs}) and heldout_utterances ({heldout_utterances}) at least 1"
        )
    out = Path(out)
    settings = {
        "version": VERSION,
        "hours": hours,
        "heldout_utterances": heldout_utterances,
        "lm_sentences": lm_sentences,
        "seed": seed,
    }
    if _stamp(out) == {"settings": settings, "complete": True}:
        return out
    import_loader()  # one clear line here, before anything is removed, rather than one from every process
    _make_ready(out, settings)
    splits = plan(hours=hours, heldout_utterances=heldout_utterances, seed=seed)
    _write_texts(out, splits, sentences=lm_sentences, seed=seed)
    _speak(out, splits, seed=seed, jobs=jobs)
    for split, utterances in splits.items():
        lines = "".join(_part(out, chunk).read_text() for chunk in _chunks(utterances))
        _write_atomically(out / f"{split}.jsonl", lines)
    _write_stamp(out, settings, complete=True)
    shutil.rmtree(out / "parts")
    return out


def statistics(manifest: Path) -> Statistics:
    """Count what a manifest written by `generate` holds."""
    rows = [json.loads(line) for line in Path(manifest).read_text().splitlines()]
    if not rows:
        raise ValueError(f"{manifest} holds no utterance; generate the corpus again")
    seconds = sum(row["duration"] for row in rows)
    words = [word for row in rows for word in row["text"].split()]
    return Statistics(
        utterances=len(rows),
        hours=seconds / 3600,
        mean_seconds=seconds / len(rows),
        words_per_second=len(words) / seconds,
        vocabulary=len(set(words)),
        voices=len({row["speaker"] for row in rows}),
    )


# ---------------------------------------------------------------- what is said, and by whom


def plan(*, hours: float, heldout_utterances: int, seed: int) -> dict[str, list[Utterance]]:
    """Return every utterance of every split. Held-out sentences are drawn first, so they do not depend on `hours`."""
    sentences = demo_text.distinct_sentences(random.Random(f"sentences-{seed}"))
    splits = {
        split: list(itertools.islice(_utterances(split, sentences, seed=seed), heldout_utterances))
        for split in ("test", "dev")
    }
    train, seconds = [], 0.0
    for utterance in _utterances("train", sentences, seed=seed):
        if seconds >= hours * 3600:
            break
        train.append(utterance)
        seconds += _expected_seconds(utterance)
    return {"train": train, "dev": splits["dev"], "test": splits["test"]}


def voices(split: str) -> list[str]:
    """Return the split's voices, every accent with every variant of the split; no variant is in two splits."""
    held_out = {variant for variants in HELD_OUT_VARIANTS.values() for variant in variants}
    variants = HELD_OUT_VARIANTS.get(split) or [variant for variant in VARIANTS if variant not in held_out]
    return [f"{accent}+{variant}" for accent in DEMO_ACCENTS for variant in variants]


def _utterances(split: str, sentences: Iterator[demo_text.Sentence], *, seed: int) -> Iterator[Utterance]:
    """Give each sentence a voice, each equally often. A voice has its own pace and pitch; an utterance varies them."""
    rng = random.Random(f"{split}-{seed}")
    habits = {voice: (rng.uniform(130, 175), rng.uniform(30, 70)) for voice in voices(split)}
    turns = itertools.chain.from_iterable(sorted(habits, key=lambda _: rng.random()) for _ in itertools.count())
    for number, (sentence, voice) in enumerate(zip(sentences, turns)):
        pace, pitch = habits[voice]
        yield Utterance(
            key=f"{split}-{number:06d}",
            split=split,
            text=sentence.text,
            keywords=sentence.keywords,
            voice=voice,
            words_per_minute=round(pace * rng.uniform(0.9, 1.15)),
            pitch=round(pitch + rng.uniform(-8, 8)),
        )


def _expected_seconds(utterance: Utterance) -> float:
    """Estimate the duration from letters and pace; the constants are a least-squares fit, good to 2 % in the sum."""
    return 0.72 + 8.77 * len(utterance.text) / utterance.words_per_minute


def _write_texts(out: Path, splits: dict[str, list[Utterance]], *, sentences: int, seed: int) -> None:
    """Write the language model's corpus (training sentences, then more of the grammar) and the groups of names.

    Sentences repeat as often as the grammar draws them: without repetition the long ones would crowd out the short.
    """
    held_out = {demo_text.spoken_form(row.text) for split in ("dev", "test") for row in splits[split]}
    lines = [row.text for row in splits["train"]]
    rng = random.Random(f"lm-{seed}")
    more = (demo_text.draw(rng).text for _ in itertools.count())
    fresh = (text for text in more if demo_text.spoken_form(text) not in held_out)
    lines.extend(itertools.islice(fresh, sentences))
    _write_atomically(out / "lm_text.txt", "\n".join(lines) + "\n")
    _write_atomically(
        out / "homophones.json", json.dumps([list(group) for group in demo_text.HOMOPHONES], indent=1) + "\n"
    )


# ---------------------------------------------------------------- speaking, in fresh processes


def _chunks(utterances: list[Utterance]) -> list[list[Utterance]]:
    return [utterances[start : start + CHUNK_UTTERANCES] for start in range(0, len(utterances), CHUNK_UTTERANCES)]


def _part(out: Path, chunk: list[Utterance]) -> Path:
    """Name the manifest lines of one chunk; the file exists when the chunk's audio does."""
    return out / "parts" / f"{chunk[0].key}.jsonl"


def _speak(out: Path, splits: dict[str, list[Utterance]], *, seed: int, jobs: int) -> None:
    """Run the missing chunks, `jobs` at a time, each in its own process, and show how many utterances are done."""
    context = multiprocessing.get_context("spawn")
    said = context.Value("q", 0)
    chunks = [chunk for utterances in splits.values() for chunk in _chunks(utterances)]
    missing = [chunk for chunk in chunks if not _part(out, chunk).exists()]
    running: dict[object, BaseProcess] = {}  # by sentinel
    bar = tqdm(total=sum(map(len, chunks)), unit="utt", desc="speaking", disable=None)
    before = bar.total - sum(map(len, missing))
    try:
        while missing or running:
            while missing and len(running) < jobs:
                process = context.Process(target=_speak_chunk, args=(out, missing.pop(0), seed, said), daemon=True)
                process.start()
                running[process.sentinel] = process
            for sentinel in connection.wait([process.sentinel for process in running.values()], timeout=0.2):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    raise RuntimeError(f"a process that speaks the demo corpus ended with code {process.exitcode}")
            bar.update(before + said.value - bar.n)
    finally:
        for process in running.values():
            process.terminate()
        bar.close()


def _speak_chunk(out: Path, chunk: list[Utterance], seed: int, said) -> None:
    """Synthesise a chunk, put it in rooms and noise, write FLAC files and, last, the chunk's manifest lines."""
    espeak = Espeak()
    clean = []
    for row in chunk:
        wave = espeak.speak(
            demo_text.spoken_form(row.text), voice=row.voice, words_per_minute=row.words_per_minute, pitch=row.pitch
        )
        clean.append(soxr.resample(_trim(wave.astype(np.float32) / 32768), espeak.sample_rate, SAMPLE_RATE))
    lines = []
    for number, row in enumerate(chunk):
        rng = np.random.default_rng(zlib.crc32(f"{seed} {row.key}".encode()))
        others = [clean[i] for i in rng.permutation(len(clean)) if chunk[i].voice != row.voice][:4]
        wave = _in_the_world(clean[number], others, rng=rng)
        path = Path("audio") / row.split / f"{row.key}.flac"
        _write_flac(out / path, wave)
        lines.append(_manifest_line(row, path, len(wave)))
        with said.get_lock():
            said.value += 1
    _write_atomically(_part(out, chunk), "".join(lines))


def _trim(wave: np.ndarray, *, threshold: float = 0.003) -> np.ndarray:
    """Cut the silence before and after; the library ends every sentence with a pause of its own."""
    loud = np.flatnonzero(np.abs(wave) > threshold)
    return wave[loud[0] : loud[-1] + 1]


def _in_the_world(wave: np.ndarray, others: list[np.ndarray], *, rng: np.random.Generator) -> np.ndarray:
    """Add pauses, in 2 of 10 utterances a room, noise (loud in a third), and a level between -27 and -21 dB."""
    pauses = (rng.uniform(0.15, 0.45, size=2) * SAMPLE_RATE).astype(int)
    wave = np.pad(wave, pauses)
    if rng.random() < 0.2:
        impulse = acoustics.room_impulse(rng.uniform(0.15, 0.4), sample_rate=SAMPLE_RATE, rng=rng)
        wave = acoustics.reverberate(wave, impulse)
    # No recording is without noise. Digital silence would also treble the features' deviation, at which speech is flat.
    noisy = rng.random() < 0.35
    kind = rng.choice(["white", "pink", "babble"] if noisy and others else ["white", "pink"])
    sound = (
        acoustics.babble(others, len(wave), rng=rng) if kind == "babble" else acoustics.noise(kind, len(wave), rng=rng)
    )
    snr_db = rng.uniform(15, 30) if noisy else rng.uniform(35, 55)
    wave = acoustics.add_noise(wave, sound, snr_db=snr_db)
    return acoustics.limit(wave * (10 ** (rng.uniform(-27, -21) / 20) / acoustics.rms(wave)))


def _manifest_line(row: Utterance, path: Path, samples: int) -> str:
    fields = {
        "audio_filepath": path.as_posix(),
        "duration": samples / SAMPLE_RATE,
        "text": row.text,
        "speaker": row.voice,
        "lang": "en",
        "keywords": list(row.keywords),
    }
    return json.dumps(fields) + "\n"


# ---------------------------------------------------------------- files


def _stamp(out: Path) -> dict | None:
    return json.loads((out / STAMP).read_text()) if (out / STAMP).exists() else None


def _make_ready(out: Path, settings: dict) -> None:
    """Make the folders and stamp them; a corpus of other settings is removed, one of these settings is continued."""
    found = _stamp(out)
    if found is None and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no demo corpus; name another folder")
    if found is not None and found["settings"] != settings:
        for path in (out / name for name in WRITTEN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for folder in ("parts", *(f"audio/{split}" for split in ("train", "dev", "test"))):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _write_stamp(out, settings, complete=False)


def _write_stamp(out: Path, settings: dict, *, complete: bool) -> None:
    _write_atomically(out / STAMP, json.dumps({"settings": settings, "complete": complete}, indent=1) + "\n")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_flac(path: Path, wave: np.ndarray) -> None:
    encoded = io.BytesIO()  # not straight to the file: libsndfile would sync each one to the disk, 5 ms
    soundfile.write(encoded, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    path.write_bytes(encoded.getvalue())
