"""The demo's spoken corpus: requests to a voice assistant, synthesised in many voices, rooms and noises.

`generate` writes OUT/{train,dev,test}.jsonl (NeMo's keys audio_filepath, relative to OUT, duration and text; then
speaker, lang and keywords), 16 kHz FLAC below OUT/audio, OUT/lm_text.txt and OUT/homophones.json. A little Mandarin is
mixed into train.jsonl and lm_text.txt; held out it is OUT/{dev,test}_zh.jsonl, with OUT/homophones_zh.json. On request
OUT/rl.jsonl is more of what train.jsonl is: a recogniser makes few errors to learn from on what it was trained on.

- Dev and test share no voice with training: their espeak-ng variants (the shape of the throat) are theirs alone, in all
  accents. Nor any sentence: none sounds like one in train.jsonl or lm_text.txt. The grammar is shared, see `grammar`.
- What is English does not depend on how much Mandarin there is, down to the audio.
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
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from . import acoustics
from .demo_plan import LANGUAGES, Split, Utterance, plan
from .synthesis import Espeak, import_loader

VERSION = 5  # raise it with every change that alters what is written: older corpora are then generated anew
SAMPLE_RATE = 16_000
CHUNK_UTTERANCES = 300
STAMP = "demo_corpus.json"  # the settings, and whether all of it is there
MANIFESTS = ("train.jsonl", "rl.jsonl", "dev.jsonl", "test.jsonl", "dev_zh.jsonl", "test_zh.jsonl")
TRAINED = ("train", "rl")  # parts in which the languages are mixed
WRITTEN = ("audio", "parts", *MANIFESTS, "lm_text.txt", "homophones.json", "homophones_zh.json")
Splits = dict[Split, list[Utterance]]


class Statistics(NamedTuple):
    """Totals of one language in a manifest. A word is a character where there are no spaces."""

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
    mandarin_hours: float = 0.5,
    rl_hours: float = 0.0,
    heldout_utterances: int = 300,
    lm_sentences: int = 60_000,
    seed: int = 0,
    jobs: int = 2,
) -> Path:
    """Write the corpus below `out` and return it. `hours` is English training audio, met within a few percent.

    `mandarin_hours` come on top of it; 0 leaves the language out. `rl_hours` are kept apart in rl.jsonl, with as large
    a share of Mandarin: said by the training voices, no sentence of training among them. `heldout_utterances` are in
    dev and in test, and a third as many of Mandarin. `lm_sentences` are drawn for lm_text.txt beyond the training
    sentences, and of Mandarin as many to an hour of audio. `out` is absent, empty or a demo corpus; one of other
    settings is replaced. ValueError if the package that speaks is missing.
    """
    if hours <= 0 or min(mandarin_hours, rl_hours) < 0 or jobs < 1 or heldout_utterances < 1:
        raise ValueError(
            f"hours ({hours}) must be positive, mandarin_hours ({mandarin_hours}) and rl_hours ({rl_hours}) not "
            f"negative, jobs ({jobs}) and heldout_utterances ({heldout_utterances}) at least 1"
        )
    out = Path(out)
    settings = {
        "version": VERSION,
        "hours": hours,
        "mandarin_hours": mandarin_hours,
        "rl_hours": rl_hours,
        "heldout_utterances": heldout_utterances,
        "lm_sentences": lm_sentences,
        "seed": seed,
    }
    if _stamp(out) == {"settings": settings, "complete": True}:
        return out
    import_loader()  # one clear line here, before anything is removed, rather than one from every process
    _make_ready(out, settings)
    splits = plan(
        hours=hours,
        mandarin_hours=mandarin_hours,
        rl_hours=rl_hours,
        heldout_utterances=heldout_utterances,
        seed=seed,
    )
    _write_texts(out, splits, sentences=lm_sentences, mandarin_share=mandarin_hours / hours, seed=seed)
    _speak(out, splits, seed=seed, jobs=jobs)
    for manifest, lines in _manifests(out, splits).items():
        _write_atomically(manifest, "".join(lines))
    _write_stamp(out, settings, complete=True)
    shutil.rmtree(out / "parts")
    return out


def statistics(manifest: Path) -> dict[str, Statistics]:
    """Count what a manifest written by `generate` holds, by language."""
    rows_of: dict[str, list[dict]] = {}
    for line in Path(manifest).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows_of.setdefault(row["lang"], []).append(row)
    if not rows_of:
        raise ValueError(f"{manifest} holds no utterance; generate the corpus again")
    return {lang: _totals(lang, rows) for lang, rows in sorted(rows_of.items())}


def _totals(lang: str, rows: list[dict]) -> Statistics:
    seconds = sum(row["duration"] for row in rows)
    words = [word for row in rows for word in LANGUAGES[lang].grammar.words(row["text"])]
    return Statistics(
        utterances=len(rows),
        hours=seconds / 3600,
        mean_seconds=seconds / len(rows),
        words_per_second=len(words) / seconds,
        vocabulary=len(set(words)),
        voices=len({row["speaker"] for row in rows}),
    )


# ---------------------------------------------------------------- texts


def _write_texts(out: Path, splits: Splits, *, sentences: int, mandarin_share: float, seed: int) -> None:
    """Write the language model's corpus (training sentences, then more of the grammars) and the groups of names."""
    spoken, more = {}, {}
    for lang in {split.lang: None for split in splits}:
        spoken[lang] = [row.text for row in splits[Split("train", lang)]]
        count = sentences if lang == "en" else round(sentences * mandarin_share)
        more[lang] = list(itertools.islice(_fresh_sentences(splits, lang, seed=seed), count))
        groups = [list(group) for group in LANGUAGES[lang].names_alike]
        _write_atomically(
            out / ("homophones.json" if lang == "en" else f"homophones_{lang}.json"),
            json.dumps(groups, indent=1, ensure_ascii=False) + "\n",
        )
    lines = [*_evenly_mixed(spoken.values()), *_evenly_mixed(more.values())]
    _write_atomically(out / "lm_text.txt", "\n".join(lines) + "\n")


def _fresh_sentences(splits: Splits, lang: str, *, seed: int) -> Iterator[str]:
    """Yield sentences that sound like none held out, as often as the grammar draws them.

    Without repetition the long ones would crowd out the short.
    """
    grammar = LANGUAGES[lang].grammar
    held_out = {grammar.spoken_form(row.text) for part in ("dev", "test") for row in splits[Split(part, lang)]}
    rng = random.Random(f"lm-{seed}" if lang == "en" else f"lm-{lang}-{seed}")
    while True:
        text = grammar.draw(rng).text
        if grammar.spoken_form(text) not in held_out:
            yield text


def _evenly_mixed(lists: Iterable[list[str]]) -> list[str]:
    """Merge lists so that each is spread evenly over the whole and keeps its order: shards hold equal shares."""
    placed = [((i + 0.5) / len(items), item) for items in lists for i, item in enumerate(items)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def _manifests(out: Path, splits: Splits) -> dict[Path, list[str]]:
    """Return the lines of every manifest; the languages share those that are trained on."""
    lines = {
        split: [
            line
            for chunk in _chunks(rows)
            for line in _part(out, chunk).read_text(encoding="utf-8").splitlines(keepends=True)
        ]
        for split, rows in splits.items()
    }
    manifests: dict[str, list[list[str]]] = {}
    for split in splits:
        manifests.setdefault(split.part if split.part in TRAINED else split.name, []).append(lines[split])
    return {out / f"{name}.jsonl": _evenly_mixed(of_langs) for name, of_langs in manifests.items()}


# ---------------------------------------------------------------- speaking, in fresh processes


def _chunks(utterances: list[Utterance]) -> list[list[Utterance]]:
    return [utterances[start : start + CHUNK_UTTERANCES] for start in range(0, len(utterances), CHUNK_UTTERANCES)]


def _part(out: Path, chunk: list[Utterance]) -> Path:
    """Name the manifest lines of one chunk; the file exists when the chunk's audio does."""
    return out / "parts" / f"{chunk[0].key}.jsonl"


def _speak(out: Path, splits: Splits, *, seed: int, jobs: int) -> None:
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
    espeak, grammar = Espeak(), LANGUAGES[chunk[0].split.lang].grammar
    clean = []
    for row in chunk:
        wave = espeak.speak(
            grammar.spoken_form(row.text), voice=row.voice, words_per_minute=row.words_per_minute, pitch=row.pitch
        )
        clean.append(soxr.resample(_trim(wave.astype(np.float32) / 32768), espeak.sample_rate, SAMPLE_RATE))
    lines = []
    for number, row in enumerate(chunk):
        rng = np.random.default_rng(zlib.crc32(f"{seed} {row.key}".encode()))
        others = [clean[i] for i in rng.permutation(len(clean)) if chunk[i].voice != row.voice][:4]
        wave = _in_the_world(clean[number], others, rng=rng)
        path = Path("audio") / row.split.name / f"{row.key}.flac"
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
        "lang": row.split.lang,
        "keywords": list(row.keywords),
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"


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
    (out / "parts").mkdir(parents=True, exist_ok=True)
    _write_stamp(out, settings, complete=False)


def _write_stamp(out: Path, settings: dict, *, complete: bool) -> None:
    _write_atomically(out / STAMP, json.dumps({"settings": settings, "complete": complete}, indent=1) + "\n")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _write_flac(path: Path, wave: np.ndarray) -> None:
    encoded = io.BytesIO()  # not straight to the file: libsndfile would sync each one to the disk, 5 ms
    soundfile.write(encoded, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.getvalue())
