"""Long utterances by the plan: what one speaker says, or a session holds, joined to half a minute up to five.

`GroupedCorpus` is a corpus whose rows are groups of utterances, so a plan packs, shuffles and resumes groups as it does
utterances, and each utterance still comes exactly once an epoch. Groups are a pure function of a shard's index, the
settings and the seed: no audio is opened, none crosses a shard, and nothing but the shards in use is in memory. Within
a group utterances keep the order of the corpus.
Shape letters: U utterances of a shard, G groups of a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .index import Corpus, MissingIndex
from .plan import PlanConfig

VERSION = 1  # part of the fingerprint: raise it when the same inputs give other groups
BY = ("speaker", "session", "corpus")
MAX_SHARDS = 512  # whose groups are kept; an hour of audio is about 30 KB


@dataclass
class ConcatConfig:
    """Which utterances are joined, and to what length; the length of each group is drawn between the two bounds."""

    share: float = 0.0  # of the groups that are joined, drawn for each; the others stay single utterances
    min_seconds: float = 30.0  # less where a speaker has no more in a shard
    max_seconds: float = 300.0
    by: str = "speaker"  # or session (a recording, a conversation), or corpus: whoever comes next
    gap_seconds: float = 0.3  # of faint noise between two utterances

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"concat.share ({self.share}) is a share of the groups, 0 to 1")
        if not 0 < self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"concat.min_seconds ({self.min_seconds}) must be above 0 and at most concat.max_seconds "
                f"({self.max_seconds})"
            )
        if self.gap_seconds < 0:
            raise ValueError(f"concat.gap_seconds ({self.gap_seconds}) must be at least 0")
        if self.by not in BY:
            raise ValueError(f"concat.by is {self.by!r}; choose one of {', '.join(BY)}")

    def require_room(self, plan: PlanConfig) -> None:
        """Raise ValueError where the plan would refuse the groups, and with them all that is in them."""
        if plan.max_utterance_seconds and plan.max_utterance_seconds < self.max_seconds:
            raise ValueError(
                f"data.limits.max_utterance_seconds ({plan.max_utterance_seconds:g}) is below data.concat.max_seconds "
                f"({self.max_seconds:g}): joined utterances would be refused; lower the second or leave out the first"
            )
        if plan.cost(self.max_seconds) > plan.max_seconds * (1 + 1e-9):
            raise ValueError(
                f"data.concat.max_seconds ({self.max_seconds:g}) costs {plan.cost(self.max_seconds):.4g} s and does "
                f"not fit into a micro-batch of {plan.max_seconds:g} s; lower it or raise train.micro_batch_seconds"
            )


class Groups(NamedTuple):
    """The groups of a shard: group g holds rows `row_U[start_G[g] : start_G[g + 1]]`; `rows` are what a plan reads."""

    row_U: np.ndarray
    start_G: np.ndarray  # one more than there are groups
    rows: np.ndarray

    def members(self, group: int) -> np.ndarray:
        return self.row_U[self.start_G[group] : self.start_G[group + 1]]


class GroupedCorpus:
    """A corpus seen as groups of utterances (plan.UtteranceIndex)."""

    def __init__(self, corpus: Corpus, cfg: ConcatConfig, *, plan: PlanConfig, seed: int, require_text: bool = False):
        cfg.require_room(plan)
        self.corpus, self.cfg, self.plan, self.seed, self.require_text = corpus, cfg, plan, seed, require_text
        self._groups: OrderedDict[int, Groups] = OrderedDict()
        if cfg.by != "corpus" and not any(self._who(shard).any() for shard in range(len(corpus.shards))):
            raise ValueError(
                f"data.concat.by is {cfg.by} and no utterance of {corpus.shards[0].parent} names its {cfg.by}; give "
                f'the meta in the shards a "{cfg.by}" and run `seedling index`, or set data.concat.by=corpus'
            )

    @property
    def shards(self) -> list[Path]:
        return self.corpus.shards

    @property
    def places(self) -> list:
        return self.corpus.places

    @cached_property
    def rows_S(self) -> np.ndarray:
        """Groups of each shard: their indexes are all read once."""
        return np.array([len(self.index(shard)) for shard in range(len(self.shards))], dtype=np.int64)

    @property
    def num_utterances(self) -> int:
        return int(self.rows_S.sum())

    @cached_property
    def fingerprint(self) -> str:
        limits = [self.plan.min_seconds, self.plan.max_tokens, self.require_text]
        parts = [VERSION, self.corpus.fingerprint, asdict(self.cfg), self.seed, limits]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def expect(self, shards: Sequence[int]) -> None:
        self.corpus.expect([shard for shard in shards if shard not in self._groups])

    def index(self, shard: int) -> np.ndarray:
        """Return a row per group, with what a plan reads of an utterance: lengths and characters are sums."""
        return self._of(shard).rows

    def members(self, shard: int, row: int) -> np.ndarray:
        """Return the index rows of the utterances in a group, in their order."""
        return self.corpus.index(shard)[self._of(shard).members(row)]

    def _of(self, shard: int) -> Groups:
        if shard not in self._groups:
            self._groups[shard] = self._group(shard)
            if len(self._groups) > MAX_SHARDS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(shard)
        return self._groups[shard]

    def _who(self, shard: int) -> np.ndarray:
        """Return who_U: utterances with the same number may be joined, those with 0 stay alone."""
        rows = self.corpus.index(shard)
        if self.cfg.by == "corpus":
            return np.ones(len(rows), dtype=np.int64)
        if self.cfg.by not in (rows.dtype.names or ()):
            path = self.corpus.shards[shard]
            raise MissingIndex(
                f"{path}: its index is from before there were speakers and sessions in it; run `seedling index "
                f"{path.parent}`"
            )
        return rows[self.cfg.by]

    def _group(self, shard: int) -> Groups:
        rows = self.corpus.index(shard)
        who_U = np.where(self._may_be_joined(rows), self._who(shard), 0)
        order_U = np.lexsort((rows["sample_rate"], who_U))  # stable: the order of the corpus within
        changes_U = np.diff(who_U[order_U], prepend=0) != 0
        changes_U |= np.diff(rows["sample_rate"][order_U].astype(np.int64), prepend=0) != 0
        fresh_U = changes_U | (who_U[order_U] == 0)
        words = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(2, shard))).random_raw(2 * len(rows))
        draws_U2 = ((words >> np.uint64(11)) * 2.0**-53).reshape(-1, 2)
        starts = self._starts(rows[order_U], fresh_U, draws_U2)
        # In the order of their first utterances, so that a pass over held-out data is in the order of the corpus.
        groups = sorted((order_U[a:b] for a, b in zip(starts, [*starts[1:], len(rows)])), key=lambda group: group[0])
        row_U = np.concatenate([*groups, np.zeros(0, np.int64)])
        start_G = np.cumsum([0, *map(len, groups)])
        return Groups(row_U, start_G, self._summed(rows[row_U], start_G))

    def _may_be_joined(self, rows: np.ndarray) -> np.ndarray:
        """Leave alone what the plan or the loader will refuse, so that it is named and takes no other with it."""
        seconds_U = rows["samples"] / np.maximum(rows["sample_rate"], 1)
        joined_U = (rows["samples"] > 0) & (seconds_U >= self.plan.min_seconds)
        return joined_U & (rows["text_chars"] > 0) if self.require_text else joined_U

    def _starts(self, rows: np.ndarray, fresh_U: np.ndarray, draws_U2: np.ndarray) -> list[int]:
        """Return where groups start among rows in joining order; `fresh_U` says where one must."""
        seconds = (rows["samples"] / np.maximum(rows["sample_rate"], 1)).tolist()
        characters, draws = rows["text_chars"].tolist(), draws_U2[:, 0].tolist()
        most = self.plan.max_tokens or np.iinfo(np.int64).max
        runs, starts = np.flatnonzero(fresh_U).tolist(), []
        for a, b in zip(runs, [*runs[1:], len(rows)]):
            cuts = cut_run(seconds[a:b], characters[a:b], draws[a:b], cfg=self.cfg, most_characters=most)
            starts += [a + cut for cut in cuts]
        # The share of groups that is not to be joined falls apart again.
        return [
            start
            for a, b in zip(starts, [*starts[1:], len(rows)])
            for start in (range(a, b) if draws_U2[a, 1] >= self.cfg.share else [a])
        ]

    def _summed(self, members: np.ndarray, start_G: np.ndarray) -> np.ndarray:
        width = members.dtype["key"].itemsize
        dtype = [("key", f"S{width + 7}"), ("samples", "<i8"), ("sample_rate", "<i4"), ("text_chars", "<i4")]
        rows, first_G, more_G = np.zeros(len(start_G) - 1, dtype=dtype), members[start_G[:-1]], np.diff(start_G) - 1
        if not len(rows):
            return rows
        rows["key"] = [
            bytes(key) + (f"+{more}".encode() if more else b"") for key, more in zip(first_G["key"], more_G.tolist())
        ]
        rows["sample_rate"] = first_G["sample_rate"]
        gap_G = np.round(self.cfg.gap_seconds * rows["sample_rate"]).astype(np.int64)
        rows["samples"] = np.add.reduceat(members["samples"], start_G[:-1]) + more_G * gap_G
        rows["text_chars"] = np.add.reduceat(members["text_chars"], start_G[:-1]) + more_G
        return rows

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_groups": OrderedDict()}


def cut_run(
    seconds: list[float], characters: list[int], draws: list[float], *, cfg: ConcatConfig, most_characters: int
) -> list[int]:
    """Return where groups start in a run of utterances that may all be joined; the draws, 0 to 1, choose lengths."""
    starts, before = [0], None
    length, text, target = seconds[0], characters[0], cfg.min_seconds + (cfg.max_seconds - cfg.min_seconds) * draws[0]
    # Plain numbers in a plain loop, as in packing.py: 0.5 s per million utterances.
    for at in range(1, len(seconds)):
        longer, more = length + cfg.gap_seconds + seconds[at], text + 1 + characters[at]
        if length >= target or longer > cfg.max_seconds or more > most_characters:
            starts.append(at)
            before, longer, more = (length, text), seconds[at], characters[at]
            target = cfg.min_seconds + (cfg.max_seconds - cfg.min_seconds) * draws[at]
        length, text = longer, more
    if before and length < cfg.min_seconds:  # too short a rest goes with the group before it, where there is room
        fits = before[0] + cfg.gap_seconds + length <= cfg.max_seconds
        if fits and before[1] + 1 + text <= most_characters:
            starts.pop()
    return starts


def joined(corpus: Corpus, cfg: ConcatConfig, *, plan: PlanConfig, seed: int, require_text: bool, beside: Iterable):
    """Return the corpus with utterances joined as `cfg` says: itself where it says none.

    What is kept for each utterance `beside` the audio (frame labels, contexts) belongs to no group: ValueError.
    """
    if not cfg.share:
        return corpus
    for name, kept in beside:
        if kept is not None:
            raise ValueError(
                f"data.concat.share is {cfg.share} and there are {name}, which belong to single utterances; set "
                f"data.concat.share=0 or leave out the {name}"
            )
    return GroupedCorpus(corpus, cfg, plan=plan, seed=seed, require_text=require_text)
