"""The plan of ten million hours: 2.4 billion utterances in 1.2 million shards, opened, begun and resumed by one rank.

The list of the shards (shards.npy, 102 MB) is a real file that the corpus is opened by. Their indexes would be 250 GB:
each is made when the plan asks for it, as long as it would be read, from the number of its shard, so it is the same
each time. What is timed is therefore the plan, the list and the making of an index (which is slower than reading one).
Every measurement runs in a process of its own, which has imported torch as a training rank has.

    python benchmarks/plan_scale.py                     # 2.4e9 utterances
    python benchmarks/plan_scale.py --utterances 1e6    # ten million utterances and less are counted, not estimated
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seedling.data.index import Corpus, index_dtype
from seedling.data.plan import Cursor, Plan, PlanConfig
from seedling.data.shard_list import entries_dtype, write_shard_list

PER_SHARD = 2000  # utterances, 15 s each: 8.3 hours and 0.5 GB
SAMPLE_RATE = 16000
STEP = 2048  # micro-batches: 1024 ranks x 2
KEY_BYTES = 24


class Measured(NamedTuple):
    """What one process took: seconds (wall, CPU) by name, peak memory of the process in MB, and what was found."""

    seconds: dict[str, tuple[float, float]]
    peak_mb: float
    before_mb: float  # with torch imported, before the corpus
    found: dict


class MadeCorpus(Corpus):
    """A corpus that is listed on disk and whose indexes are made on demand. `read` counts them."""

    read = 0

    def index(self, shard: int) -> np.ndarray:
        self.read += 1
        return made_index(shard, int(self.rows_S[shard]))


def made_index(shard: int, count: int) -> np.ndarray:
    """Lengths of a shard of one of many sources: means of 6 s to 24 s; some utterances are refused."""
    random = np.random.default_rng(shard)
    rows = np.zeros(count, dtype=index_dtype(KEY_BYTES))
    mean = 6.0 + 18.0 * np.random.default_rng((shard // 1000, 1)).random()
    rows["samples"] = (random.gamma(4.0, mean / 4, count) * SAMPLE_RATE).astype(np.int64)
    rows["sample_rate"], rows["text_chars"] = SAMPLE_RATE, rows["samples"] // 1100
    return rows


def write_list(folder: Path, *, utterances: int) -> None:
    shards = -(-utterances // PER_SHARD)
    rows = np.zeros(shards, dtype=entries_dtype(len("000/shard-0000000.tar")))
    rows["name"] = [f"{number % 1000:03d}/shard-{number:07d}.tar" for number in range(shards)]
    rows["utterances"] = PER_SHARD
    rows["utterances"][-1] -= shards * PER_SHARD - utterances
    rows["seconds"], rows["tar_bytes"] = rows["utterances"] * 15.0, 500_000_000
    rows["index_bytes"] = rows["utterances"] * index_dtype(KEY_BYTES).itemsize
    rows["digest"] = np.frombuffer(np.random.default_rng(0).bytes(32 * shards), dtype="V32")
    for number in range(min(1000, shards)):
        (folder / f"{number:03d}").mkdir()
    write_shard_list(folder, rows)


def open_plan(folder: Path, window: int) -> Plan:
    corpus = MadeCorpus.open(folder)
    cfg = PlanConfig(max_seconds=300, max_utterance_seconds=60, quadratic_seconds=60, window_utterances=window)
    return Plan(corpus, cfg, seed=0, micro_batches_per_step=STEP)


def start(folder: Path, window: int) -> tuple[dict, dict]:
    """What a rank does before its first batch: open, fingerprint, summary, and the first step of the plan."""
    clock = Clock()
    plan = open_plan(folder, window)
    clock("open the corpus and the plan")
    fingerprint = plan.fingerprint
    clock("fingerprint")
    summary = plan.summary()
    clock("summary (steps, padding, largest)")
    steps = plan.steps()
    first = next(steps)
    clock("first step")
    more = list(islice(steps, 20))
    clock("20 more steps")
    found = {
        "windows": plan.num_windows,
        "shards": len(plan.corpus.shards),
        "utterances": plan.num_utterances,
        "hours": summary.seconds / 3600,
        "steps": summary.steps,
        "sampled windows": summary.sampled_windows,
        "padding": summary.padding_fraction,
        "fingerprint": fingerprint[:16],
        "indexes read": plan.corpus.read,
        "digest": digest_of([first, *more]),
    }
    return clock.seconds, found


def resume(folder: Path, window: int) -> tuple[dict, dict]:
    """Go on in the middle of an epoch from a cursor as a checkpoint holds it, and compare with not having stopped."""
    plan = open_plan(folder, window)
    middle = plan.num_windows // 2
    steps = plan.steps(Cursor(window=middle))
    at = next(step.cursor for step in steps if step.cursor.window > middle)  # with utterances carried over
    saved, expected = json.dumps(at.to_dict()), [digest_of([step]) for step in islice(steps, 30)]
    del plan, steps
    clock = Clock()
    steps = open_plan(folder, window).steps(Cursor.from_dict(json.loads(saved)))
    clock("open the corpus and the plan")
    found = [digest_of([next(steps)])]
    clock("first step from the cursor")
    found += [digest_of([step]) for step in islice(steps, 29)]
    assert found == expected, "resuming gave other batches"
    return clock.seconds, {
        "steps compared": len(found),
        "utterances carried": len(at.carried),
        "cursor KB": len(saved) / 1e3,
    }


def digest_of(steps: list) -> str:
    return hashlib.sha256(repr([step.micro_batches for step in steps]).encode()).hexdigest()[:16]


class Clock:
    """Seconds between calls, by name: of the wall and of this process's CPU."""

    def __init__(self):
        self.seconds: dict[str, tuple[float, float]] = {}
        self.before = time.perf_counter(), time.process_time()

    def __call__(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds[name], self.before = (now[0] - self.before[0], now[1] - self.before[1]), now


def measured(work: Callable, folder: Path, window: int) -> Measured:
    """Run `work` in a fresh process, which has torch in memory as a rank has."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_in_process, (work, folder, window))


def _in_process(work: Callable, folder: Path, window: int) -> Measured:
    import torch  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    seconds, found = work(folder, window)
    return Measured(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, before, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=float, default=2.4e9)
    parser.add_argument("--window", type=float, default=1e6, help="data.limits.window_utterances (1e6)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_list(folder, utterances=int(args.utterances))
        size = os.path.getsize(folder / "shards.npy") / 1e6
        print(f"{args.utterances:.3g} utterances, shards.npy {size:.0f} MB, windows of {args.window:.3g}\n")
        for work in (start, resume):
            result = measured(work, folder, int(args.window))
            print(f"| {work.__name__} | |\n|---|---|")
            for name, (wall, cpu) in result.seconds.items():
                print(f"| {name} | {wall:.2f} s, CPU {cpu:.2f} s |")
            print(f"| peak memory of the rank | {result.peak_mb:.0f} MB, {result.before_mb:.0f} of them before |")
            for name, value in result.found.items():
                print(f"| {name} | {value:,} |" if isinstance(value, int | float) else f"| {name} | {value} |")
            print()


if __name__ == "__main__":
    main()
