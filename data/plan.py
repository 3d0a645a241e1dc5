"""The plan: a pure function (index, seed, epoch, limits) -> micro-batches. It knows nothing of ranks and workers.

An epoch is a seeded permutation of the shards, cut into windows of about `window_utterances`. Inside a window the
utterances are shuffled, sorted by jittered length, packed into micro-batches, and these are shuffled. An optimizer step
takes the next M micro-batches; what does not fill a step is carried into the next window, and the last window of an
epoch is re-split into whole steps. So an epoch holds each utterance exactly once and every rank has as many steps.

Without `shuffle` it is a pass over held-out data. Of these there may be less than a step takes: empty micro-batches
fill it up, where training refuses so small a corpus.

Only one window is in memory, and a `Cursor` holds all that is needed to go on: restoring costs one window, however
much was consumed. One million utterances: 1.3 s for all steps of an epoch, 16 MB (benchmarks/loader.py).
Shape letters: S shards, P pieces of shards, U utterances of a window, N micro-batches of a window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from .packing import into_whole_steps, pack
from .plan_summary import MAX_REFUSED_LISTED, PlanSummary, Refused, Tally

PLAN_VERSION = 1  # part of the fingerprint: raise it when the same inputs give other micro-batches
# An epoch of so many is counted, 13 s; a larger one is estimated from windows that hold SAMPLED_UTTERANCES.
EXACT_UTTERANCES = 10_000_000
SAMPLED_UTTERANCES = 2_000_000


class UtteranceIndex(Protocol):
    """What a plan needs of a corpus: rows_S, how many utterances each shard has, known without opening it; and their
    index, whose rows have key, samples, sample_rate and text_chars. `expect` says which will be asked for next."""

    @property
    def shards(self) -> Sequence: ...
    @property
    def rows_S(self) -> np.ndarray: ...
    @property
    def fingerprint(self) -> str: ...
    def index(self, shard: int) -> np.ndarray: ...
    def expect(self, shards: Sequence[int]) -> None: ...


@dataclass
class PlanLimits:
    """What a user sets about the plan, beside the size of a micro-batch. A limit of 0 is off."""

    # An utterance of s seconds costs s + s^2 / quadratic_seconds: attention grows with the square.
    quadratic_seconds: float = 0.0
    # Padded characters of text, one token per character is an upper bound for scripts with spaces; where there are
    # contexts, each with the bytes of its longest one.
    max_tokens: int = 0
    min_seconds: float = 0.1
    max_utterance_seconds: float = 0.0
    window_utterances: int = 100_000
    # Lengths count as up to this fraction longer or shorter for sorting, so that an utterance meets other neighbours
    # each epoch; costs about as much padding.
    length_jitter: float = 0.01


@dataclass
class PlanConfig(PlanLimits):
    """Limits, and what a stage knows: the size of a micro-batch, the stretch of its augmentation, the order."""

    # Padded cost of a micro-batch: count x the cost of the longest.
    max_seconds: float = 60.0
    # Lengths are multiplied by this before they meet max_seconds: speed perturbation at 0.9 lengthens by 1 / 0.9.
    stretch: float = 1.0
    shuffle: bool = True

    def __post_init__(self):
        for name, low in (("max_seconds", 1e-9), ("window_utterances", 1), ("stretch", 1e-9), ("quadratic_seconds", 0)):
            if not getattr(self, name) >= low:
                shown = "train.micro_batch_seconds" if name == "max_seconds" else f"data.limits.{name}"
                raise ValueError(f"{shown} is {getattr(self, name)}; it must be {'above' if low else 'at least'} 0")
        if not 0 <= self.length_jitter < 1:
            raise ValueError(
                f"data.limits.length_jitter is {self.length_jitter}; it is a fraction of the length, 0 to below 1"
            )
        if self.max_utterance_seconds and self.cost(self.max_utterance_seconds) > self.max_seconds * (1 + 1e-9):
            raise ValueError(
                f"data.limits.max_utterance_seconds ({self.max_utterance_seconds}) costs "
                f"{self.cost(self.max_utterance_seconds):.4g} s and does not fit into train.micro_batch_seconds "
                f"({self.max_seconds}); lower the first or raise the second"
            )

    def cost(self, seconds):
        """What one utterance of this length costs, in seconds; a number or an array."""
        seconds = seconds * self.stretch
        return seconds + seconds**2 / self.quadratic_seconds if self.quadratic_seconds else seconds


class MicroBatch(NamedTuple):
    """What one rank runs through the model at once: `utterances` are (shard, row) pairs.

    `index` counts micro-batches since the start of the run and seeds the forward pass. `utterances` is empty only where
    an epoch has too few utterances left to give each micro-batch of its last step one.
    """

    index: int
    epoch: int
    utterances: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: the next step is number `offset` of window `window`, planned with `carried` in it."""

    epoch: int = 0
    window: int = 0
    offset: int = 0
    step: int = 0  # steps taken in this epoch
    micro_batches: int = 0  # micro-batches taken since the start of the run
    carried: tuple[tuple[int, int], ...] = ()  # utterances left over from the window before

    def to_dict(self) -> dict:
        return asdict(self) | {"carried": [list(utterance) for utterance in self.carried]}

    @classmethod
    def from_dict(cls, state: dict) -> Cursor:
        return cls(**{**state, "carried": tuple((int(shard), int(row)) for shard, row in state["carried"])})


class PlannedStep(NamedTuple):
    """One optimizer step: exactly M micro-batches, the cursor after it, and its number in the epoch."""

    micro_batches: list[MicroBatch]
    cursor: Cursor
    step: int

    def share(self, rank: int, *, world_size: int) -> list[MicroBatch]:
        """Return what this rank runs: every world_size-th micro-batch, as many on each rank."""
        if len(self.micro_batches) % world_size:
            raise ValueError(
                f"{len(self.micro_batches)} micro-batches per step cannot be shared by {world_size} ranks; "
                f"make global_batch_seconds / micro_batch_seconds a multiple of {world_size}"
            )
        return self.micro_batches[rank::world_size]


class _Window(NamedTuple):
    """A planned window: utterances in packing order, micro-batches as slices of it, and what is left over."""

    shard_U: np.ndarray
    row_U: np.ndarray
    seconds_U: np.ndarray
    cost_U: np.ndarray
    tokens_U: np.ndarray
    slices_N2: np.ndarray  # once planned, a whole number of steps
    after: Cursor

    def micro_batch(self, position: int, *, index: int, epoch: int) -> MicroBatch:
        start, stop = self.slices_N2[position]
        return MicroBatch(index, epoch, _pairs(self.shard_U[start:stop], self.row_U[start:stop]))


class _Order(NamedTuple):
    """The pieces of an epoch in their order, and where in it each one's utterances end."""

    epoch: int
    order_P: np.ndarray
    end_P: np.ndarray


class Plan:
    """Micro-batches of a corpus, step by step. See the head of this file."""

    size_setting = "train.micro_batch_seconds"  # says how large a micro-batch is: cfg.max_seconds

    def __init__(self, corpus: UtteranceIndex, cfg: PlanConfig, *, seed: int, micro_batches_per_step: int):
        if micro_batches_per_step < 1 or seed < 0:
            raise ValueError(
                f"micro_batches_per_step ({micro_batches_per_step}) must be at least 1 and seed ({seed}) at least 0"
            )
        self.corpus, self.cfg, self.seed, self.micro_batches_per_step = corpus, cfg, seed, micro_batches_per_step
        rows_S = corpus.rows_S
        self.num_utterances = int(rows_S.sum())
        if self.num_utterances < self._fewest:
            raise ValueError(self._too_few(self.num_utterances))
        # Equal windows, so that the last one of an epoch is never a stub; four steps at least, so that most of a window
        # is used and not carried.
        window_rows = max(cfg.window_utterances, 4 * micro_batches_per_step)
        self.num_windows = max(1, self.num_utterances // window_rows)
        # A shard larger than an eighth of a window is cut into pieces, so that a window draws on several places.
        pieces_S = -(-rows_S // max(1, window_rows // 8))
        self._shard_P = np.repeat(np.arange(len(rows_S)), pieces_S)
        nth_P = np.arange(len(self._shard_P)) - np.repeat(np.cumsum(pieces_S) - pieces_S, pieces_S)
        self._start_P = rows_S[self._shard_P] * nth_P // pieces_S[self._shard_P]
        self._stop_P = rows_S[self._shard_P] * (nth_P + 1) // pieces_S[self._shard_P]
        self._order: _Order | None = None

    @property
    def fingerprint(self) -> str:
        """Equal exactly if the sequence of micro-batches is: a cursor fits a plan with the same fingerprint."""
        parts = [PLAN_VERSION, self.corpus.fingerprint, asdict(self.cfg), self.seed, self.micro_batches_per_step]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def steps(self, cursor: Cursor | None = None, *, epochs: int | None = None) -> Iterator[PlannedStep]:
        """Yield the steps from `cursor` (None: the start) to the end of `epochs` epochs, counted from the first one.

        `epochs` None goes on for ever. Raises ValueError if an epoch has too few utterances for one step.
        """
        at = cursor or Cursor()
        while epochs is None or at.epoch < epochs:
            window = self._plan_window(at)
            num_steps = len(window.slices_N2) // self.micro_batches_per_step
            for offset in range(at.offset, num_steps):
                first = offset * self.micro_batches_per_step
                micro_batches = [
                    window.micro_batch(first + m, index=at.micro_batches + m, epoch=at.epoch)
                    for m in range(self.micro_batches_per_step)
                ]
                step, at = at.step, self._advance(at, window, last=offset + 1 == num_steps)
                yield PlannedStep(micro_batches, at, step)
            if not num_steps:
                at = window.after

    def summary(self, epoch: int = 0) -> PlanSummary:
        """Count an epoch without building it, 1.1 s per million utterances; estimate it where it is long.

        An epoch of more than EXACT_UTTERANCES is judged by some of its windows, evenly spread.
        """
        if self.num_utterances > EXACT_UTTERANCES:
            return self._estimate(epoch)
        tally, at = Tally(), Cursor(epoch=epoch)
        while at.epoch == epoch:
            window = self._plan_window(at)
            tally.add(window, epoch=epoch)
            at = window.after
        refused = list(islice(self.refused(), MAX_REFUSED_LISTED))
        return tally.summary(self.micro_batches_per_step, of=self.num_utterances, refused=refused)

    def _estimate(self, epoch: int) -> PlanSummary:
        tally, shards, read = Tally(), set[int](), 0
        sampled = min(self.num_windows, max(3, SAMPLED_UTTERANCES * self.num_windows // self.num_utterances))
        for nth in range(sampled):
            at = Cursor(epoch=epoch, window=(2 * nth + 1) * self.num_windows // (2 * sampled))
            low, high = self._bounds(at.window)
            tally.add(self._pack_window(at), epoch=epoch)
            shards.update(shard for shard, _, _ in self._pieces(at))
            read += high - low
        some = self.refused(sorted(shards)) if tally.utterances < read else iter(())
        refused, M = list(islice(some, MAX_REFUSED_LISTED)), self.micro_batches_per_step
        estimate = tally.summary(M, of=self.num_utterances, refused=refused, scale=self.num_utterances / read)
        return estimate._replace(sampled_windows=sampled)

    def amount(self, summary: PlanSummary) -> str:
        """Say in words what an epoch holds."""
        hours, windows = summary.seconds / 3600, summary.sampled_windows
        about = f" (estimated from {windows} of {self.num_windows:,} windows)" if windows else ""
        return f"{summary.utterances:,} utterances, {hours:.3g} h, padding {summary.padding_fraction:.1%}{about}"

    def refused(self, shards: Iterable[int] | None = None) -> Iterator[Refused]:
        """Yield every utterance outside the limits, in the order of the shards; of some shards only if given."""
        for shard in range(len(self.corpus.shards)) if shards is None else shards:
            name, rows = self.corpus.shards[shard], self.corpus.index(shard)
            seconds, tokens = _measure(rows)
            for row in np.flatnonzero(~self._fits(seconds, tokens)).tolist():
                reason = self._reason(float(seconds[row]), int(tokens[row]))
                yield Refused(str(name), row, bytes(rows["key"][row]).decode(errors="replace"), reason)

    def _fits(self, seconds: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        cfg = self.cfg
        fits = (seconds > 0) & (seconds >= cfg.min_seconds) & (cfg.cost(seconds) <= cfg.max_seconds * (1 + 1e-9))
        if cfg.max_utterance_seconds:
            fits &= seconds <= cfg.max_utterance_seconds
        return fits & (tokens <= cfg.max_tokens) if cfg.max_tokens else fits

    def _reason(self, seconds: float, tokens: int) -> str:
        cfg = self.cfg
        if seconds <= 0:
            return "the index found no audio in it"
        if seconds < cfg.min_seconds:
            return f"{seconds:.3f} s is below min_seconds ({cfg.min_seconds})"
        if cfg.max_utterance_seconds and seconds > cfg.max_utterance_seconds:
            return f"{seconds:.2f} s is above max_utterance_seconds ({cfg.max_utterance_seconds})"
        if cfg.max_tokens and tokens > cfg.max_tokens:
            return f"{tokens} characters are above max_tokens ({cfg.max_tokens})"
        return f"{seconds:.2f} s cost {cfg.cost(seconds):.2f} s, above max_seconds ({cfg.max_seconds})"

    @property
    def _fewest(self) -> int:
        """Utterances that an epoch must have: a step to train wants none of its micro-batches empty."""
        return self.micro_batches_per_step if self.cfg.shuffle else 1

    def _too_few(self, found: int) -> str:
        there = f"the corpus has {found} utterances within the limits ({self.num_utterances} in all)"
        if not self.cfg.shuffle:
            return f"{there}; widen the limits or leave it out"
        return (
            f"{there}, and a step takes {self.micro_batches_per_step} micro-batches with at least one each; lower "
            "global_batch_seconds, add data or widen the limits"
        )

    def _random_words(self, count: int, *purpose: int) -> np.ndarray:
        # Raw Philox words: numpy promises them for ever, which it does not for Generator.permutation, and a cursor must
        # mean the same after an upgrade. spawn_key, as SeedSequence([1, 2]) and ([1, 2, 0]) are the same.
        return np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=purpose)).random_raw(count)

    def _permutation(self, count: int, *purpose: int) -> np.ndarray:
        return np.argsort(self._random_words(count, *purpose), kind="stable")

    def _pieces_in_order(self, epoch: int) -> _Order:
        """Return the order of an epoch's pieces: made once an epoch, as a million of them take a tenth of a second."""
        if self._order is None or self._order.epoch != epoch:
            order_P = np.arange(len(self._shard_P))
            if self.cfg.shuffle:
                order_P = self._permutation(len(order_P), 0, epoch)
            self._order = _Order(epoch, order_P, np.cumsum((self._stop_P - self._start_P)[order_P]))
        return self._order

    def _bounds(self, window: int) -> tuple[int, int]:
        """The places in an epoch's order of utterances where a window begins and ends."""
        low, high = (self.num_utterances * (window + i) // self.num_windows for i in (0, 1))
        return low, high

    def _pieces(self, at: Cursor) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first row, row to stop at) of what is new in a window."""
        _, order_P, end_P = self._pieces_in_order(at.epoch)
        low, high = self._bounds(at.window)
        for position in range(np.searchsorted(end_P, low, side="right"), np.searchsorted(end_P, high) + 1):
            piece = order_P[position]
            begin = int(self._stop_P[piece] - end_P[position])  # row = begin + place in the epoch
            start, stop = max(int(self._start_P[piece]), begin + low), min(int(self._stop_P[piece]), begin + high)
            yield int(self._shard_P[piece]), start, stop

    def _read_window(self, at: Cursor) -> tuple[np.ndarray, ...]:
        """Return shard, row, seconds and tokens [U] of the carried utterances and of this window's that fit."""
        carried, pieces = np.array(at.carried, dtype=np.int64).reshape(-1, 2), list(self._pieces(at))
        carried_from = np.unique(carried[:, 0]).tolist()
        self.corpus.expect([*carried_from, *(shard for shard, _, _ in pieces)])
        parts = [self._read_rows(shard, carried[carried[:, 0] == shard, 1]) for shard in carried_from]
        parts += [self._read_rows(shard, np.arange(start, stop)) for shard, start, stop in pieces]
        return tuple(np.concatenate(column) for column in zip(*parts))

    def _read_rows(self, shard: int, row_U: np.ndarray) -> tuple[np.ndarray, ...]:
        seconds_U, tokens_U = _measure(self.corpus.index(shard)[row_U])
        fits_U = self._fits(seconds_U, tokens_U)
        return np.full(fits_U.sum(), shard, dtype=np.int64), row_U[fits_U], seconds_U[fits_U], tokens_U[fits_U]

    def _in_packing_order(self, at: Cursor) -> tuple[np.ndarray, ...]:
        """Return shard, row, seconds and tokens [U] of a window, sorted by jittered length."""
        columns = self._read_window(at)
        length_U = columns[2]
        if self.cfg.shuffle:
            shuffled = self._permutation(len(length_U), 1, at.epoch, at.window, 0)
            columns = tuple(column[shuffled] for column in columns)
            words_U = self._random_words(len(length_U), 1, at.epoch, at.window, 1)
            noise_U = (words_U >> np.uint64(11)) * 2.0**-52 - 1  # in [-1, 1)
            length_U = columns[2] * (1 + self.cfg.length_jitter * noise_U)
        order = np.lexsort((columns[3], length_U))  # stable: what is equal stays shuffled
        return tuple(column[order] for column in columns)

    def _pack_window(self, at: Cursor) -> _Window:
        """Return all micro-batches of a window in their order, those too that do not fill a step."""
        if not 0 <= at.window < self.num_windows:
            raise ValueError(f"the cursor is in window {at.window} of {self.num_windows}; it belongs to another plan")
        shard_U, row_U, seconds_U, tokens_U = self._in_packing_order(at)
        cost_U = self.cfg.cost(seconds_U)
        slices_N2 = pack(cost_U, tokens_U, max_cost=self.cfg.max_seconds, max_tokens=self.cfg.max_tokens)
        if self.cfg.shuffle:
            slices_N2 = slices_N2[self._permutation(len(slices_N2), 1, at.epoch, at.window, 2)]
        return _Window(shard_U, row_U, seconds_U, cost_U, tokens_U, slices_N2, at)

    def _plan_window(self, at: Cursor) -> _Window:
        """Return the micro-batches of a window's steps, and the cursor after them."""
        window = self._pack_window(at)
        slices_N2, utterances = window.slices_N2, len(window.row_U)
        M, last = self.micro_batches_per_step, at.window + 1 == self.num_windows
        if last:
            if at.step == at.offset and utterances < self._fewest:  # no window before this one gave a step
                raise ValueError(self._too_few(utterances))
            head, tail = into_whole_steps(slices_N2, window.cost_U, step=M)
            if self.cfg.shuffle:
                tail = tail[self._permutation(len(tail), 1, at.epoch, at.window, 3)]
            slices_N2 = np.concatenate([head, tail])
        num_steps = len(slices_N2) // M
        if at.offset and at.offset >= num_steps:
            raise ValueError(f"the cursor is at step {at.offset} of a shorter window; it belongs to another plan")
        left = np.concatenate([np.arange(*pair) for pair in slices_N2[num_steps * M :]] or [np.arange(0)])
        after = Cursor(
            epoch=at.epoch + last,
            window=0 if last else at.window + 1,
            step=0 if last else at.step + num_steps - at.offset,
            micro_batches=at.micro_batches + (num_steps - at.offset) * M,
            carried=_pairs(window.shard_U[left], window.row_U[left]),
        )
        return window._replace(slices_N2=slices_N2[: num_steps * M], after=after)

    def _advance(self, at: Cursor, window: _Window, *, last: bool) -> Cursor:
        if last:
            return window.after
        taken = self.micro_batches_per_step
        return replace(at, offset=at.offset + 1, step=at.step + 1, micro_batches=at.micro_batches + taken)


def _measure(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds (float64) and characters (int64) of index rows."""
    return rows["samples"] / np.maximum(rows["sample_rate"], 1), rows["text_chars"].astype(np.int64)


def _pairs(shard_U: np.ndarray, row_U: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple(zip(shard_U.tolist(), row_U.tolist()))
