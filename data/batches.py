"""Planned batches: what a stage's `batches` returns, for audio and for text, and the torch DataLoader that reads them.

The plan says what is in a micro-batch, the dataset reads it: `dataset[micro_batch] -> batch`, a pure function, so the
number of workers changes the speed and nothing else.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from .plan import MicroBatch, Plan

# The key of what stands in where a micro-batch has no usable utterance: a second of silence, or an empty sentence.
STAND_IN_KEY = ""


class BadUtterance(NamedTuple):
    """An utterance that could not be used, and why; `shard` is the path of its tar or text file."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


class WithTexts:
    """What a batch with texts says of their size: in characters, as what a token is only the stage knows."""

    texts: list[str]

    @property
    def utterances(self) -> int:
        return len(self.texts)

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))

    @property
    def padded_characters(self) -> int:
        """Characters when each text is as long as the longest."""
        return len(self.texts) * max(map(len, self.texts), default=0)


@dataclass
class PlannedBatches:
    """A plan and the dataset that reads its micro-batches.

    `targets` is the fingerprint of what is learnt from them, where that is not in the corpus itself.
    """

    plan: Plan
    dataset: Dataset
    targets: str = ""

    @property
    def fingerprint(self) -> str:
        """Equal exactly if the sequence of micro-batches and their targets are: a run resumes on equal ones only."""
        if not self.targets:
            return self.plan.fingerprint
        return hashlib.sha256(f"{self.plan.fingerprint}/{self.targets}".encode()).hexdigest()

    def first(self, count: int) -> Iterator[Any]:
        """Yield the first `count` planned micro-batches of an epoch, or all of it: the same on every rank."""
        planned = (micro_batch for step in self.plan.steps(epochs=1) for micro_batch in step.micro_batches)
        yield from (self.dataset[micro_batch] for micro_batch in islice(planned, count))

    def first_seconds(self, seconds: float) -> list[MicroBatch]:
        """Return the first micro-batches of an epoch that hold so much audio, or all: the same on every rank."""
        found: list[MicroBatch] = []
        planned, corpus = 0.0, self.plan.corpus
        for step in self.plan.steps(epochs=1):
            if planned >= seconds:
                break
            found += step.micro_batches
            rows = [corpus.index(shard)[row] for m in step.micro_batches for shard, row in m.utterances]
            planned += sum(int(at["samples"]) / int(at["sample_rate"]) for at in rows)
        return found


def make_loader(
    batches: PlannedBatches,
    micro_batch_iterator: Iterable[MicroBatch],
    *,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> DataLoader:
    """Read the micro-batches in the order given; each worker prepares up to `prefetch` of them ahead.

    The iterator runs in this process, num_workers x prefetch micro-batches ahead of what was delivered: the cursor to
    save is that of the last step trained on, not of the last one that the iterator gave out.
    """
    dataset, sampler = batches.dataset, micro_batch_iterator
    if ahead := getattr(dataset, "read_ahead", 0):
        # Whole rounds of the workers, so that a worker that begins to fetch a micro-batch is the one that loads it.
        workers = max(1, num_workers)
        sampler = _WithLater(micro_batch_iterator, -(-ahead // workers) * workers)
        dataset = _FetchingLater(dataset)
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # an element of the sampler is a whole micro-batch
        collate_fn=_as_is,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_trainer,
    )


class _WithLater:
    """Pairs each micro-batch with the one that comes `ahead` places later; None past the end."""

    def __init__(self, micro_batches: Iterable[MicroBatch], ahead: int):
        self.micro_batches, self.ahead = micro_batches, ahead

    def __iter__(self) -> Iterator[tuple[MicroBatch, MicroBatch | None]]:
        rest = iter(self.micro_batches)
        coming = deque(islice(rest, self.ahead))
        for later in rest:
            coming.append(later)
            yield coming.popleft(), later
        yield from ((now, None) for now in coming)


class _FetchingLater(Dataset):
    """Begins to fetch the later micro-batch of a pair, then loads the first."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, pair: tuple[MicroBatch, MicroBatch | None]) -> Any:
        now, later = pair
        if later is not None:
            self.dataset.fetch(later)
        return self.dataset[now]


def _as_is(batch: Any) -> Any:
    return batch


@atexit.register
def _end_workers() -> None:
    """End the workers of loaders that are still referred to at exit, as they are by the traceback of an error.

    multiprocessing would send them SIGTERM, which they outlive, and wait for them for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for a failure
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def leave_signals_to_the_trainer(worker: int = 0) -> None:
    """Let a process that works for the trainer outlive a signal to stop."""
    # A launcher signals the whole process tree; the trainer still needs batches to finish its step and save.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
