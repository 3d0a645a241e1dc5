"""Rewards: what is good about a hypothesis, for GRPO. Plain functions of normalised texts, added up with weights.

Each is at most 1, the best there is, or a penalty: at most 0. Per reference token means that of an empty reference, as
if it had one. Rewards of one utterance are compared with each other alone, so a constant that all of its hypotheses get
(the recall of no keywords) changes nothing.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from ...data.scoring import align, tokenize
from ...data.scoring.errors import INSERTION
from ...data.scoring.phrases import Inventory, Phrase, Tokens, phrase_of
from ...data.scoring.weighted import Keywords, keyword_errors

SHORTEST_RUN = 3  # inserted tokens in a row that are no slip of the ear


@dataclass
class RewardConfig:
    """A weight for each reward; 0 leaves it out. Penalties are negative already, so no weight is."""

    error_rate: float = 1.0
    keyword_recall: float = 0.0
    echo: float = 0.0
    hallucination: float = 0.0
    length: float = 0.0

    def __post_init__(self):
        for name, weight in vars(self).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"reward.{name} is {weight}; a weight must be 0 or more and finite")
        if not any(vars(self).values()):
            raise ValueError("all weights in reward are 0, so nothing would be learnt; set one, as reward.error_rate=1")


def reward_of(
    cfg: RewardConfig,
    reference: str,
    hypothesis: str,
    *,
    unit: str = "word",
    keywords: Sequence[str] = (),
    keyword_weight: float = 1.0,
    phrases: Sequence[str] = (),
) -> float:
    """Return the weighted sum of the rewards of one hypothesis.

    All texts are normalised; `keywords` are the utterance's, `phrases` its context's, `unit` as in data/scoring.
    """
    functions = {
        "error_rate": partial(error_rate, unit=unit, keywords=keywords, keyword_weight=keyword_weight),
        "keyword_recall": partial(keyword_recall, keywords=keywords),
        "echo": partial(echo, phrases=phrases),
        "hallucination": partial(hallucination, unit=unit),
        "length": partial(length, unit=unit),
    }
    return sum(weight * functions[name](reference, hypothesis) for name, weight in vars(cfg).items() if weight)


def error_rate(
    reference: str, hypothesis: str, *, unit: str = "word", keywords: Sequence[str] = (), keyword_weight: float = 1.0
) -> float:
    """Return minus the errors per reference token: 0 without an error, below -1 where much is inserted.

    With a keyword weight it is minus the weighted error rate (data/scoring/weighted.py).
    """
    weighed = Keywords(map(phrase_of, keywords))
    (found,) = keyword_errors(reference, [hypothesis], keywords=weighed, unit=unit, weight=keyword_weight)
    return -found.rate


def keyword_recall(reference: str, hypothesis: str, *, keywords: Sequence[str]) -> float:
    """Return the share of the reference's keyword occurrences that the hypothesis has too; 1 where none was said."""
    inventory = Inventory(map(phrase_of, keywords))
    said, heard = (_scanned(Tokens(text), inventory) for text in (reference, hypothesis))
    return (said & heard).total() / said.total() if said else 1.0


def echo(reference: str, hypothesis: str, *, phrases: Sequence[str]) -> float:
    """Return minus the number of context phrases in the hypothesis beyond those in the reference.

    In the hypothesis the longest phrase counts and none within it; whatever stands in the reference, also within
    another phrase, was said.
    """
    said = Tokens(reference)
    emitted = _scanned(Tokens(hypothesis), Inventory(map(phrase_of, phrases)))
    return -float(sum(max(0, count - len(said.occurrences(phrase))) for phrase, count in emitted.items()))


def hallucination(reference: str, hypothesis: str, *, unit: str = "word") -> float:
    """Return minus the inserted tokens per reference token, of those in runs of three or more with nothing between.

    Runs are those of `align`, ties broken by its rule; a loop, or text from silence, is one, a slip is not.
    """
    said, heard = tokenize(reference, unit), tokenize(hypothesis, unit)
    runs = [len(list(run)) for kind, run in groupby(pair.kind for pair in align(said, heard)) if kind == INSERTION]
    return -sum(run for run in runs if run >= SHORTEST_RUN) / max(1, len(said))


def length(reference: str, hypothesis: str, *, unit: str = "word") -> float:
    """Return minus the tokens that the hypothesis has too many or too few, per reference token."""
    said, heard = tokenize(reference, unit), tokenize(hypothesis, unit)
    return -abs(len(heard) - len(said)) / max(1, len(said))


def _scanned(tokens: Tokens, inventory: Inventory) -> Counter[Phrase]:
    return Counter(tokens.words[start:end] for start, end in tokens.scan(inventory))
