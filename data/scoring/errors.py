"""Alignment of token sequences and error counts; rates are sums over the corpus, never means of utterance rates.

Units: "word" splits at white space (WER); "char" counts every character, one space between words included, as jiwer
does (CER); "mixed" takes CJK characters and the words between them (MER, for code-switching).

Ties. The number of errors is the Levenshtein distance and unique. The split into substitutions, deletions and
insertions is not: "a b" against "b c" is two substitutions, or a deletion and an insertion. The rule here is
rapidfuzz's, hence also jiwer's: common beginnings and endings are matched first; then, from the end backwards, the
first optimal step of deletion, substitution, insertion, match is taken. A test holds it fixed.

Shape letters: N utterances, C = 4 counts (substitutions, deletions, insertions, hits).
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from .bootstrap import Interval
from .normalize import CJK

METRICS = {"word": "wer", "char": "cer", "mixed": "mer"}
SUBSTITUTION, DELETION, INSERTION, HIT = "sub", "del", "ins", "hit"
MIXED_TOKEN = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
_ANY_CJK = re.compile(f"[{CJK}]")


class AlignedPair(NamedTuple):
    """One step of an alignment; `reference` is None for an insertion, `hypothesis` for a deletion."""

    kind: str
    reference: str | None
    hypothesis: str | None


class ErrorCounts(NamedTuple):
    """Errors and hits of one utterance or of a corpus."""

    substitutions: int
    deletions: int
    insertions: int
    hits: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_tokens(self) -> int:
        return self.substitutions + self.deletions + self.hits

    @property
    def hypothesis_tokens(self) -> int:
        return self.substitutions + self.insertions + self.hits

    @property
    def fraction(self) -> float:
        """Errors per reference token; with an empty reference 0 if nothing was inserted, else infinity."""
        if self.reference_tokens:
            return self.errors / self.reference_tokens
        return math.inf if self.errors else 0.0


@dataclass(frozen=True)
class ErrorRate:
    """A corpus rate: `metric` is wer, cer or mer; the interval is a fraction too, None where it cannot be estimated."""

    metric: str
    counts: ErrorCounts
    interval: Interval | None = None

    @property
    def fraction(self) -> float:
        return self.counts.fraction

    @property
    def percent(self) -> float:
        return 100 * self.fraction

    def __str__(self) -> str:
        """The line that Kaldi's and icefall's scripts look for: `%WER 3.71 [ 1949 / 52576, 2 ins, 3 del, 4 sub ]`."""
        c = self.counts
        head = f"%{self.metric.upper()} {self.percent:.2f} [ {c.errors} / {c.reference_tokens}"
        return f"{head}, {c.insertions} ins, {c.deletions} del, {c.substitutions} sub ]"


def tokenizer_of(unit: str) -> Callable[[str], Sequence[str]]:
    """Return the function text -> tokens of `unit`; for characters it is one string with single spaces."""
    if unit not in METRICS:
        raise ValueError(f"unit {unit!r} is unknown: choose one of {', '.join(METRICS)}")
    return {"word": str.split, "char": lambda text: " ".join(text.split()), "mixed": MIXED_TOKEN.findall}[unit]


def tokenize(text: str, unit: str) -> list[str]:
    """Split `text` into tokens of `unit`: "word", "char" or "mixed"."""
    return list(tokenizer_of(unit)(text))


def has_cjk(texts: Iterable[str]) -> bool:
    """Say whether any text holds a CJK character; without one, mixed tokens are words."""
    return any(not text.isascii() and _ANY_CJK.search(text) for text in texts)


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[AlignedPair]:
    """Align two token sequences with the fewest errors; ties as this file's head says."""
    if reference == hypothesis:
        return [AlignedPair(HIT, token, token) for token in reference]
    pairs = []
    for block in Levenshtein.opcodes(*as_strings(reference, hypothesis)):
        refs = reference[block.src_start : block.src_end]
        hyps = hypothesis[block.dest_start : block.dest_end]
        if block.tag == "delete":
            pairs += [AlignedPair(DELETION, ref, None) for ref in refs]
        elif block.tag == "insert":
            pairs += [AlignedPair(INSERTION, None, hyp) for hyp in hyps]
        else:
            kind = HIT if block.tag == "equal" else SUBSTITUTION
            pairs += [AlignedPair(kind, ref, hyp) for ref, hyp in zip(refs, hyps)]
    return pairs


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    """Return the counts of `align` without building it."""
    if reference == hypothesis:
        return ErrorCounts(0, 0, 0, len(reference))
    edits = Levenshtein.editops(*as_strings(reference, hypothesis))
    substitutions = sum(edit.tag == "replace" for edit in edits)
    # errors = S + D + I and D - I = len(reference) - len(hypothesis) give the other two.
    deletions = (len(edits) - substitutions + len(reference) - len(hypothesis)) // 2
    insertions = len(edits) - substitutions - deletions
    return ErrorCounts(substitutions, deletions, insertions, len(reference) - substitutions - deletions)


def count_corpus(references: Sequence[str], hypotheses: Sequence[str], *, unit: str) -> np.ndarray:
    """Return counts_NC, int64, of texts that are already normalised."""
    tokens = tokenizer_of(unit)
    rows = [count_errors(tokens(ref), tokens(hyp)) for ref, hyp in zip(references, hypotheses, strict=True)]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def corpus_counts(counts_NC: np.ndarray) -> ErrorCounts:
    """Sum the utterances."""
    return ErrorCounts(*(int(total) for total in counts_NC.sum(axis=0)))


def as_strings(*sequences: Sequence[str]) -> tuple[str, ...]:
    """Stand one character for each distinct token: rapidfuzz is fastest, and exact, on strings."""
    texts = tuple(tokens for tokens in sequences if isinstance(tokens, str))
    if len(texts) == len(sequences):
        return texts
    code: dict[str, int] = {}
    return tuple("".join([chr(code.setdefault(token, len(code))) for token in tokens]) for tokens in sequences)
