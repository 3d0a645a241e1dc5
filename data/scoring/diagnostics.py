"""What an error rate hides in a recogniser built on a language model: loops, refusals, text from nothing, silence.

All are rates over utterances unless they say tokens, and all are cheap: only utterances with errors are looked at.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import corpus_counts

# A language model answering instead of transcribing. Counted only where the reference does not say it too.
REFUSAL = re.compile(
    r"\bas an ai\b|\bai model\b|\blanguage model\b"
    r"|\bi (can ?not|can t|can't|am unable to) (help|assist|transcribe)\b"
    r"|语言模型|人工智能助手|无法(识别|转写|提供)",
    re.IGNORECASE,
)
LONGEST_PERIOD = 16


@dataclass(frozen=True)
class Diagnostics:
    """Rates as fractions; `looping` and `refusing` list utterance ids."""

    sentence_error_rate: float
    insertion_rate: float  # per reference token
    deletion_rate: float
    substitution_rate: float
    length_ratio: float  # hypothesis tokens per reference token
    repetition_rate: float
    refusal_rate: float
    empty_hypotheses: int  # of references that are not empty
    text_for_empty_references: int
    looping: tuple[str, ...]
    refusing: tuple[str, ...]


def looped_tokens(tokens: Sequence[str]) -> int:
    """Return how many tokens stand in a loop: a phrase of 1 to 16 tokens said three times or more in a row."""
    if len(tokens) - len(set(tokens)) < 2:
        return 0
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 3) + 1):
        run = 0
        for token, before in zip(tokens[period:], tokens):
            run = run + 1 if token == before else 0
            if run >= 2 * period:
                longest = max(longest, run + period)
    return longest


def diagnose(
    ids: Sequence[str], references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]], counts_NC: np.ndarray
) -> Diagnostics:
    """Look through token sequences and their counts_NC for signs of a language model that has stopped listening."""
    counts = corpus_counts(counts_NC)
    wrong = [int(i) for i in np.flatnonzero(counts_NC[:, :3].any(axis=1))]
    looping = tuple(ids[i] for i in wrong if looped_tokens(hypotheses[i]) > looped_tokens(references[i]))
    refusing = tuple(ids[i] for i in wrong if _refuses(hypotheses[i]) and not _refuses(references[i]))
    utterances, tokens = max(1, len(ids)), max(1, counts.reference_tokens)
    return Diagnostics(
        sentence_error_rate=len(wrong) / utterances,
        insertion_rate=counts.insertions / tokens,
        deletion_rate=counts.deletions / tokens,
        substitution_rate=counts.substitutions / tokens,
        length_ratio=counts.hypothesis_tokens / tokens,
        repetition_rate=len(looping) / utterances,
        refusal_rate=len(refusing) / utterances,
        empty_hypotheses=sum(not hypotheses[i] for i in wrong),
        text_for_empty_references=sum(not references[i] for i in wrong),
        looping=looping,
        refusing=refusing,
    )


def _refuses(tokens: Sequence[str]) -> bool:
    text = tokens if isinstance(tokens, str) else " ".join(tokens)
    return bool(REFUSAL.search(text) or REFUSAL.search(text.replace(" ", "")))
