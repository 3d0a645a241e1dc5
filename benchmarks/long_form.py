"""Long audio: does the encoder's cost grow with the length alone, and is whole audio heard as well as windows of it?

    python benchmarks/long_form.py [--size demo] [--seconds 30 60 120 300]
    python benchmarks/long_form.py --acllm RUN --data SHARDS [SHARDS] [--joined 300] [--windows 30] [--utterances 4]

The first table is the encoder's: CPU seconds and memory (the rise of the process's peak, each row in a process of its
own) of full attention and of chunks, and the exponent with which each grows over the lengths of a minute and more; 1 is
linear, 2 is quadratic. With a recogniser there is a second one: utterances joined to long ones (data/concat.py),
decoded as a whole and in windows, scored on the same texts, with the ratio of the two error rates and its interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from seedling.data.audio_sets import heldout
from seedling.data.concat import ConcatConfig
from seedling.data.plan import PlanLimits
from seedling.data.scoring import ScoredUtterance, ScoreReport, score
from seedling.data.scoring.bootstrap import bootstrap_statistic
from seedling.model.audio_llm import AudioLLM
from seedling.model.conformer import PRESETS, ConformerEncoder
from seedling.stages.recogniser.listening import hear
from seedling.stages.runtime.meters import peak_memory_gb, reset_peak_memory

CHUNK = 200  # frames: 8 s
ATTENTION = {"full": (0, 0), "8 s chunks": (CHUNK, 0), "8 s chunks + 1 before": (CHUNK, 1)}
GROWING_FROM = 60  # seconds; below, what does not grow is most of the cost


class Cost(NamedTuple):
    """Of one utterance."""

    cpu_seconds: float
    memory_mb: float


def encoder_cost(size: str, seconds: int, chunk: int, left: int, training: bool) -> Cost:
    """Return what one utterance costs the encoder: forward, and backward where it is training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chunks = {"attention_chunk": chunk, "attention_left_chunks": left}
    encoder = ConformerEncoder(dataclasses.replace(PRESETS[size], dropout=0.0, **chunks)).train(training)

    def run(seconds: int) -> None:
        with torch.set_grad_enabled(training):
            h_BTD, _ = encoder(torch.randn(1, 100 * seconds, 80), torch.tensor([100 * seconds]))
            if training:
                h_BTD.sum().backward()

    run(2)
    reset_peak_memory()
    before, started = peak_memory_gb(), time.process_time()
    run(seconds)
    return Cost(time.process_time() - started, 1000 * (peak_memory_gb() - before))


def exponent(seconds: list[int], costs: list[float]) -> float:
    """Return the slope of log cost over log length, from GROWING_FROM on."""
    kept = [(np.log(s), np.log(c)) for s, c in zip(seconds, costs) if s >= GROWING_FROM]
    return float(np.polyfit(*zip(*kept), deg=1)[0]) if len(kept) > 1 else float("nan")


def show_encoder(size: str, lengths: list[int]) -> None:
    print(f"encoder {size}, one core: CPU seconds / MB for {' / '.join(map(str, lengths))} s of audio; growth")
    for training in (False, True):
        for name, (chunk, left) in ATTENTION.items():
            with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
                costs = [pool.apply(encoder_cost, (size, seconds, chunk, left, training)) for seconds in lengths]
            cells = "  ".join(f"{cost.cpu_seconds:6.2f} s {cost.memory_mb:5.0f} MB" for cost in costs)
            growth = [exponent(lengths, list(column)) for column in zip(*costs)]
            what = "forward, backward" if training else "forward"
            print(f"  {what:18} {name:22} {cells}  time ~ T^{growth[0]:.2f}, memory ~ T^{growth[1]:.2f}", flush=True)


def decode(model: AudioLLM, batches: list, *, window_seconds: float) -> ScoreReport:
    """Decode the utterances one by one, saying of each what it took."""
    how = f"windows of {window_seconds:g} s" if window_seconds else "whole"
    records = []
    for batch in batches:
        reset_peak_memory()
        before, started, on_cpu = peak_memory_gb(), time.perf_counter(), time.process_time()
        (heard,) = hear(
            model,
            batch.waveforms_BN,
            batch.lengths_B,
            contexts_ids=[None],
            languages=[None],
            config=model.decode_config,
            window_seconds=window_seconds,
        )
        took, on_cpu, memory_gb = time.perf_counter() - started, time.process_time() - on_cpu, peak_memory_gb()
        records.append(
            ScoredUtterance(
                id=batch.keys[0],
                reference=batch.texts[0],
                hypothesis=heard.texts[0][0],
                seconds=batch.seconds,
                rtf=took / batch.seconds,
                memory_gb=memory_gb,
            )
        )
        (counts,) = score(records[-1:], normalizer="whisper-basic").counts_NC[:, :3]
        print(
            f"  {how:18} {batch.keys[0]:20} {batch.seconds:4.0f} s of audio, {on_cpu:5.0f} CPU s, {memory_gb:.2f} GB "
            f"(+{1000 * (memory_gb - before):.0f} MB), errors: {counts[0]} substituted, {counts[1]} deleted, "
            f"{counts[2]} inserted{'' if heard.complete else ', CUT OFF'}",
            flush=True,
        )
    return score(records, normalizer="whisper-basic")


def show_decoding(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    folder = Path(args.acllm)
    folder = folder / "artifact" if (folder / "artifact").is_dir() else folder
    model = AudioLLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.decode = dataclasses.asdict(model.decode_config) | {
        "max_new_tokens": 8192,
        "beam_size": args.beam_size,
        "ctc_weight": args.ctc_weight,
    }
    joined = ConcatConfig(share=1, by=args.by, min_seconds=0.9 * args.joined, max_seconds=args.joined)
    planned = heldout(
        args.data,
        PlanLimits(),
        micro_batch_seconds=args.joined,
        micro_batches=1,
        sample_rate=model.fbank.cfg.sample_rate,
        concat=joined,
    )
    # The rest of a shard is short.
    long = (batch for batch in planned.first(1000) if batch.seconds >= 0.8 * args.joined)
    batches = list(itertools.islice(long, args.utterances))
    if not batches:
        raise SystemExit(f"{args.data}: nothing in a shard of it gives {args.joined:g} s; lower --joined")
    cfg = model.encoder.cfg
    print(f"{folder}: attention_chunk {cfg.attention_chunk}, {len(batches)} utterances of {args.data}")
    whole, windows = (decode(model, batches, window_seconds=seconds) for seconds in (0.0, args.windows))
    for name, report in (("whole", whole), (f"windows of {args.windows:g} s", windows)):
        interval = report.headline.interval
        between = f" ({interval.low:.2%} to {interval.high:.2%})" if interval else ""
        print(f"{name:18} WER {report.headline.fraction:.2%}{between}, {report.memory_gb:.2f} GB at most")
    errors_N2 = np.stack([report.counts_NC[:, :3].sum(axis=1) for report in (whole, windows)], axis=1)
    ratio = bootstrap_statistic(errors_N2, lambda sums_R2: sums_R2[:, 0] / np.maximum(sums_R2[:, 1], 1), seed=0)
    total = errors_N2.sum(axis=0)
    between = f" ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
    print(f"WER whole / WER windows {total[0] / max(1, total[1]):.2f}{between}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="demo", choices=PRESETS)
    parser.add_argument("--seconds", type=int, nargs="+", default=[30, 60, 120, 300])
    parser.add_argument("--acllm", help="a recogniser, to decode with")
    parser.add_argument("--data", nargs="+", help="folders of shards")
    parser.add_argument("--by", default="corpus", help="speaker, session or corpus: what is joined")
    parser.add_argument("--joined", type=float, default=300.0, help="seconds that utterances are joined to")
    parser.add_argument("--windows", type=float, default=30.0, help="seconds of a window")
    parser.add_argument("--utterances", type=int, default=4, help="joined utterances to decode")
    parser.add_argument("--beam-size", type=int, default=4)
    parser.add_argument("--ctc-weight", type=float, default=0.3)
    args = parser.parse_args()
    if args.acllm:
        show_decoding(args)
    else:
        show_encoder(args.size, args.seconds)


if __name__ == "__main__":
    main()
