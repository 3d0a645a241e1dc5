"""Triples: which utterance is trained with which of its contexts in which epoch.

A function of (seed, epoch, key) alone, as augmentation is: the same on any rank and worker, and after a resume. The
plan has to know the size of a batch before anything is drawn, so it counts every utterance with its longest context
(`WithContexts`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ..augment import KeyedRandom
from ..index import Corpus, find_tars, read_index
from ..remote import RemoteConfig
from .sidecar import Contexts, UtteranceContext


@dataclass
class ContextConfig:
    """How many utterances become triples of context, speech and text, and how long a context may be."""

    share: float = 0.3  # of the utterances that have contexts; the others are ordinary pairs
    dropout: float = 0.0  # of the triples, trained without their context in this epoch
    max_tokens: int = 512  # of a context in the prompt; the end of a longer one is cut off
    keep_relevant: bool = False  # cutting passes over the phrases that the utterance itself says

    def __post_init__(self):
        for name in ("share", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"context.{name} is {getattr(self, name)}; it must be in 0 to 1")
        if self.max_tokens < 1:
            raise ValueError(f"context.max_tokens is {self.max_tokens}; it must be at least 1")


@dataclass(frozen=True)
class DrawnContexts:
    """The context of an utterance in an epoch, from a sidecar for each corpus (None: its utterances are pairs).

    With `first` nothing is drawn: everyone gets the first of its contexts, as in validation.
    """

    sidecars: dict[Path, Contexts | None] = field(repr=False)  # by audio shard
    cfg: ContextConfig
    seed: int = 0
    first: bool = False

    @classmethod
    def open(
        cls,
        folders: Sequence[str | Path],
        *,
        corpora: Sequence[str | Path],
        cfg: ContextConfig,
        seed: int = 0,
        first: bool = False,
        remote: RemoteConfig | None = None,
    ) -> DrawnContexts:
        """Open `folders[i]` ("": none) as the sidecar of the shards in `corpora[i]`; `remote` as for Corpus."""
        if len(folders) != len(corpora):
            raise ValueError(
                f"{len(corpora)} corpora ({', '.join(map(str, corpora))}) and {len(folders)} folders of contexts; give "
                'one for each, in the same order; "" is a corpus without'
            )
        sidecars = {}
        for folder, corpus in zip(folders, corpora):
            reader = Contexts(folder) if str(folder) else None
            sidecars |= dict.fromkeys(find_tars(corpus, remote=remote), reader)
        return cls(sidecars, cfg, seed, first)

    def of(self, shard: Path, row: int, *, key: str, epoch: int) -> UtteranceContext | None:
        """Return the context of the utterance in row `row` of a shard's index; None where it is a pair.

        Raises StaleContexts where the sidecar is that of other utterances.
        """
        sidecar = self.sidecars[shard]
        stored = sidecar.of(shard, row, key=key) if sidecar is not None else ()
        if not stored:
            return None
        if self.first:
            return stored[0]
        random = KeyedRandom(self.seed, epoch=epoch, key=f"context\n{key}")
        if random.uniform() >= self.cfg.share or random.uniform() < self.cfg.dropout:
            return None
        return stored[random.below(len(stored))]

    def most_tokens(self, shard: Path) -> np.ndarray:
        """Return how many tokens the context of each row of a shard's index has at most, int64 [rows].

        No token is less than a byte: a character that the vocabulary lacks is a token for each of its bytes.
        """
        sidecar = self.sidecars[shard]
        if sidecar is None:
            return np.zeros(len(read_index(shard)), np.int64)
        return np.minimum(sidecar.text_bytes(shard), self.cfg.max_tokens)

    @property
    def fingerprint(self) -> str:
        """Equal exactly if every context that could be drawn and its size are."""
        parts = [sidecar.fingerprint if sidecar is not None else "" for sidecar in self.sidecars.values()]
        parts.append(f"{self.cfg.max_tokens} bytes")
        return hashlib.sha256("/".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class WithContexts:
    """A corpus as the plan shall see it: to the text of every utterance the most tokens of a context are added."""

    corpus: Corpus
    contexts: DrawnContexts

    @property
    def shards(self) -> Sequence[Path]:
        return self.corpus.shards

    @cached_property
    def rows_S(self) -> np.ndarray:
        """Utterances of each shard; contexts of other utterances show here, before the first step."""
        return np.array([len(self.index(shard)) for shard in range(len(self.shards))], dtype=np.int64)

    def expect(self, shards: Sequence[int]) -> None:
        self.corpus.expect(shards)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.corpus.fingerprint}/{self.contexts.fingerprint}".encode()).hexdigest()

    def index(self, shard: int) -> np.ndarray:
        rows = self.corpus.index(shard).copy()
        rows["text_chars"] += self.contexts.most_tokens(self.corpus.shards[shard]).astype(rows["text_chars"].dtype)
        return rows
