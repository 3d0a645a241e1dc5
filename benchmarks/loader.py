"""Loading audio: utterances and audio seconds per second and core, against webdataset, lhotse and bare FLAC decoding.

    python benchmarks/loader.py [--corpus DIR] [--only loader|plan]

The same audio for all, in one process and one run; CPU seconds, so that other work on the machine counts little; the
best of three rounds. Each pipeline ends in a zero-padded torch batch with its texts. Without --corpus an hour of speech
is taken from the folder that SEEDLING_SPEECH names, or made from noise. An hour is few batches, so padding is high for
all; the second table, the plan alone, has that of a large corpus.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch

from seedling.data.audio import read_audio
from seedling.data.index import Corpus
from seedling.data.loader import AudioDataset, pad_waveforms
from seedling.data.payload import PayloadReader
from seedling.data.plan import Plan, PlanConfig
from seedling.data.shards import open_shard, shard_path

SAMPLE_RATE = 16000
BATCH_SECONDS = 300.0
SPEECH_SETS = ("librispeech_250", "kathleen_en")
ROUNDS = 3


class Delivered(NamedTuple):
    """One batch: utterances, their seconds, and the seconds with padding."""

    utterances: int
    seconds: float
    padded_seconds: float


class Row(NamedTuple):
    """One pipeline's best round, per CPU second."""

    name: str
    utterances: float
    seconds: float
    padding: float


def delivered(waveforms_BN: torch.Tensor, lengths_B: torch.Tensor) -> Delivered:
    return Delivered(len(lengths_B), int(lengths_B.sum()) / SAMPLE_RATE, waveforms_BN.numel() / SAMPLE_RATE)


# --- the audio -------------------------------------------------------------------------------------------------------


def speech(folder: Path, *, hours: float) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield key, waveform and text of human speech, up to `hours`."""
    left = hours * 3600
    for name in SPEECH_SETS:
        for line in (folder / name / "train.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            waveform = read_audio(folder / name / entry["audio_filepath"], sample_rate=SAMPLE_RATE)
            yield f"{name}-{Path(entry['audio_filepath']).stem}", waveform, entry["text"]
            left -= len(waveform) / SAMPLE_RATE
            if left <= 0:
                return


def synthetic(*, hours: float) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield noise with the slope and the pauses of speech, so that FLAC has about as much to do."""
    random = np.random.default_rng(0)
    left = hours * 3600
    while left > 0:
        seconds = float(lengths_like_librispeech(random, 1)[0])
        envelope = np.repeat(random.uniform(0, 0.2, int(seconds * 5) + 1), SAMPLE_RATE // 5)[
            : int(seconds * SAMPLE_RATE)
        ]
        noise = np.convolve(random.standard_normal(len(envelope)), np.hanning(24) / 6, mode="same")
        yield (
            f"noise-{left:09.2f}".replace(".", "-"),
            (envelope * noise).astype(np.float32),
            "noise " * int(seconds * 2),
        )
        left -= seconds


def lengths_like_librispeech(random: np.random.Generator, count: int) -> np.ndarray:
    """Read audiobooks: most utterances 12 to 17 s, some short, mean 12.7 s."""
    common, rest = random.normal(14.2, 1.2, count), random.uniform(1.5, 17.0, count)
    return np.where(random.random(count) < 0.7, common, rest).clip(1.3, 35)


def write_corpus(folder: Path, *, hours: float) -> str:
    """Write four shards into `folder` and return what they hold."""
    source = os.environ.get("SEEDLING_SPEECH")
    human = bool(source) and (Path(source) / SPEECH_SETS[0]).is_dir()
    utterances = list(speech(Path(source), hours=hours) if human else synthetic(hours=hours))
    utterances = [utterances[i] for i in np.random.default_rng(0).permutation(len(utterances))]
    for number in range(4):
        with open_shard(shard_path(folder, number), sample_rate=SAMPLE_RATE) as writer:
            for key, waveform, text in utterances[number::4]:
                writer.add(key, waveform, {"text": text})
    return "human speech" if human else "synthetic noise"


# --- the pipelines: each yields the batches of one epoch -------------------------------------------------------------


def bare_flac(corpus: Corpus) -> Iterator[Delivered]:
    """The ceiling: payloads by offset, decoded by libsndfile, and nothing else. No batches, so no padding."""
    reader = PayloadReader()
    for shard, path in enumerate(corpus.shards):
        for row in corpus.index(shard):
            payload = reader.read(path, offset=int(row["audio_offset"]), size=int(row["audio_size"]))
            waveform, rate = soundfile.read(io.BytesIO(payload), dtype="float32")
            yield Delivered(1, len(waveform) / rate, len(waveform) / rate)


def ours(corpus: Corpus) -> Iterator[Delivered]:
    """The plan and the map-style loader."""
    plan = Plan(corpus, PlanConfig(max_seconds=BATCH_SECONDS), seed=0, micro_batches_per_step=1)
    dataset = AudioDataset(corpus)
    for step in plan.steps(epochs=1):
        batch = dataset[step.micro_batches[0]]
        assert not batch.bad
        yield delivered(batch.waveforms_BN, batch.lengths_B)


def plain_webdataset(corpus: Corpus) -> Iterator[Delivered]:
    """Read, shuffle in a buffer, decode, and batch a fixed number of utterances of 300 s in the mean."""
    import webdataset

    def decode(sample: dict) -> tuple[np.ndarray, str]:
        waveform, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        return waveform, json.loads(sample["json"])["text"]

    def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        return *pad_waveforms([waveform for waveform, _ in samples]), [text for _, text in samples]

    size = round(BATCH_SECONDS / (corpus.seconds / corpus.num_utterances))
    dataset = webdataset.WebDataset([str(path) for path in corpus.shards], shardshuffle=100, seed=0, empty_check=False)
    for waveforms_BN, lengths_B, _ in dataset.shuffle(1000, seed=0).map(decode).batched(size, collation_fn=collate):
        yield delivered(waveforms_BN, lengths_B)


def lhotse_shar(shar: Path) -> Iterator[Delivered]:
    """Shar, dynamic buckets of up to 300 s, audio collated by lhotse."""
    from lhotse import CutSet
    from lhotse.dataset import DynamicBucketingSampler
    from lhotse.dataset.collation import collate_audio

    cuts = CutSet.from_shar(in_dir=shar, shuffle_shards=True, seed=0)
    sampler = DynamicBucketingSampler(cuts, max_duration=BATCH_SECONDS, num_buckets=10, shuffle=True, seed=0)
    for batch in sampler:
        waveforms_BN, lengths_B = collate_audio(batch)
        assert all(cut.supervisions[0].text is not None for cut in batch)
        yield delivered(waveforms_BN, lengths_B)


def write_shar(corpus: Corpus, folder: Path) -> Path:
    """Write the same audio as lhotse Shar, FLAC as well."""
    from lhotse import CutSet, Recording, SupervisionSegment

    reader, cuts, files = PayloadReader(), [], folder / "files"
    files.mkdir()
    for shard, path in enumerate(corpus.shards):
        for row in corpus.index(shard):
            key = row["key"].decode().replace("/", "_")
            file = files / f"{key}.flac"
            file.write_bytes(reader.read(path, offset=int(row["audio_offset"]), size=int(row["audio_size"])))
            meta = json.loads(reader.read(path, offset=int(row["meta_offset"]), size=int(row["meta_size"])))
            cut = Recording.from_file(file, recording_id=key).to_cut()
            cut.supervisions = [SupervisionSegment(key, key, start=0, duration=cut.duration, text=meta["text"])]
            cuts.append(cut)
    shar = folder / "shar"
    shar.mkdir()
    CutSet.from_cuts(cuts).to_shar(shar, fields={"recording": "flac"}, shard_size=-(-len(cuts) // 4))
    return shar


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(pipelines: dict[str, Callable[[], Iterator[Delivered]]]) -> list[Row]:
    """Run the pipelines in turn, three rounds, and keep each one's best."""
    best: dict[str, Row] = {}
    for _ in range(ROUNDS):
        for name, pipeline in pipelines.items():
            started = time.process_time()
            batches = list(pipeline())
            took = time.process_time() - started
            utterances, seconds, padded = (sum(column) for column in zip(*batches))
            row = Row(name, utterances / took, seconds / took, 1 - seconds / padded)
            best[name] = max(row, best.get(name, row), key=lambda row: row.seconds)
    return list(best.values())


def loader_table(corpus: Corpus, folder: Path) -> str:
    pipelines = {
        "bare FLAC decoding (ceiling)": lambda: bare_flac(corpus),
        "seedling": lambda: ours(corpus),
        "webdataset, fixed size": lambda: plain_webdataset(corpus),
    }
    note = ""
    try:
        shar = write_shar(corpus, folder)
        pipelines["lhotse Shar, dynamic buckets"] = lambda: lhotse_shar(shar)
    except ImportError as error:
        note = f"\nlhotse is left out: {error}"
    rows = measure(pipelines)
    own = next(row for row in rows if row.name == "seedling")
    lines = [
        "| pipeline | utterances / s / core | audio s / s / core | of the ceiling | seedling is | padding |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        padding = "" if row is rows[0] else f"{row.padding:.1%}"
        lines.append(
            f"| {row.name} | {row.utterances:,.0f} | {row.seconds:,.0f} | {row.seconds / rows[0].seconds:.0%} | "
            f"{own.seconds / row.seconds:.2f}x | {padding} |"
        )
    return "\n".join(lines) + note


class SyntheticIndex:
    """An index of LibriSpeech-like lengths, made shard by shard, without audio."""

    fingerprint = "synthetic"

    def __init__(self, utterances: int, *, per_shard: int = 2500):
        self.shards = list(range(-(-utterances // per_shard)))
        self.rows_S = np.full(len(self.shards), per_shard)
        self.rows_S[-1] -= self.rows_S.sum() - utterances

    def expect(self, shards: Sequence[int]) -> None:
        pass

    def index(self, shard: int) -> np.ndarray:
        count = int(self.rows_S[shard])
        dtype = [("key", "S24"), ("samples", "<i8"), ("sample_rate", "<i4"), ("text_chars", "<i4")]
        rows = np.zeros(count, dtype=dtype)
        rows["samples"] = lengths_like_librispeech(np.random.default_rng(shard), count) * SAMPLE_RATE
        rows["sample_rate"], rows["text_chars"] = SAMPLE_RATE, rows["samples"] // 1100
        return rows


def fixed_size_padding(index: SyntheticIndex, size: int) -> float:
    """Padding of batches of `size` utterances as they come."""
    lengths = np.concatenate([index.index(shard)["samples"] for shard in range(min(40, len(index.shards)))])
    batches = lengths[: len(lengths) // size * size].reshape(-1, size)
    return 1 - batches.sum() / (batches.max(axis=1).sum() * size)


def lhotse_padding(index: SyntheticIndex) -> str:
    """Padding of 30 of lhotse's dynamic buckets on the first 28,000 utterances: as many as 100 h of LibriSpeech."""
    try:
        from lhotse import CutSet, MonoCut
        from lhotse.dataset import DynamicBucketingSampler
    except ImportError as error:
        return f"left out: {error}"
    lengths = np.concatenate([index.index(shard)["samples"] for shard in range(12)])[:28_000] / SAMPLE_RATE
    cuts = CutSet.from_cuts(MonoCut(str(i), 0.0, round(float(s), 3), channel=0) for i, s in enumerate(lengths))
    sampler = DynamicBucketingSampler(cuts, max_duration=BATCH_SECONDS, num_buckets=30, shuffle=True, seed=0)
    batches = [[cut.duration for cut in batch] for batch in sampler]
    return f"{1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches):.1%}"


def plan_table(*, utterances: int = 1_000_000) -> str:
    index, cfg = SyntheticIndex(utterances), PlanConfig(max_seconds=BATCH_SECONDS)
    started = time.process_time()
    plan = Plan(index, cfg, seed=0, micro_batches_per_step=8)
    summary = plan.summary()
    summed = time.process_time()
    last = None
    for step in plan.steps(epochs=1):
        last = step.cursor if step.cursor.epoch == 0 else last
    stepped = time.process_time()
    next(plan.steps(last))
    restored = time.process_time()
    tracemalloc.start()
    for step in Plan(index, cfg, seed=0, micro_batches_per_step=8).steps():
        if step.cursor.window == 2:
            break
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = round(BATCH_SECONDS / (summary.seconds / summary.utterances))
    return "\n".join(
        [
            f"| plan of {utterances:,} utterances ({summary.seconds / 3600:,.0f} h, {summary.steps:,} steps) | |",
            "|---|---|",
            f"| summary of an epoch (steps, padding, largest) | {summed - started:.1f} s |",
            f"| all steps of an epoch | {stepped - summed:.1f} s |",
            f"| restoring at the end of an epoch | {restored - stepped:.2f} s |",
            f"| peak memory, windows of {cfg.window_utterances:,} | {peak_bytes / 1e6:.0f} MB |",
            f"| padding, batches of {BATCH_SECONDS:.0f} s | {summary.padding_fraction:.1%} |",
            f"| padding, lhotse's 30 dynamic buckets, {BATCH_SECONDS:.0f} s | {lhotse_padding(index)} |",
            f"| padding, {size} utterances as they come | {fixed_size_padding(index, size):.1%} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", help="a folder of shards with index (default: made for the occasion)")
    parser.add_argument("--hours", type=float, default=1.0, help="audio to make without --corpus")
    parser.add_argument("--only", choices=["loader", "plan"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only != "plan":
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            what = args.corpus or write_corpus(folder, hours=args.hours)
            corpus = Corpus.open(args.corpus or temporary)
            print(f"{corpus.num_utterances:,} utterances, {corpus.seconds / 3600:.2f} h of {what}, FLAC 16 kHz\n")
            print(loader_table(corpus, folder), "\n")
    if args.only != "loader":
        print(plan_table())


if __name__ == "__main__":
    main()
