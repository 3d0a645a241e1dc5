"""Weighted edit distance: an error on a keyword costs `weight`, any other costs 1 (WWER is its corpus rate).

To delete a reference token, or to put another in its place, costs the reference token's weight; to insert a token costs
that token's own; a match costs nothing. With a weight of 1 this is the number of errors, exactly. What is put in the
place of a plain token costs 1 whatever it is, so a false keyword costs its weight only where no plain token is near:
else to insert the plain token, and to put the keyword in its place, costs 2.

A reference token has the keywords' weight if a keyword stands there whole. An inserted token has it if it is of a
keyword that stands whole in the hypothesis, or of a piece of one (phrases.py: "of" alone is no piece of "lord of the
rings"). Overlapping keywords count all. In characters the spaces within a keyword are of it, and a keyword that is
spoilt by a letter more ("ann", "anne") costs 1: no letter of the reference is missing, and "anne" is no keyword.

Ties. Only the cost is used, and that is the same for all of the cheapest alignments; which of them is never asked.

Shape letters: N hypotheses, I reference tokens, J tokens of the longest hypothesis.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from .errors import as_strings, tokenizer_of
from .phrases import Inventory, Phrase, Tokens, pieces_of


class WeightedErrors(NamedTuple):
    """Of one hypothesis; texts of a corpus are compared by sums of `cost` over sums of `of`, as error rates are."""

    cost: float
    errors: int  # each counted as 1, the tokens' weights apart
    of: float  # the weights of all reference tokens

    @property
    def rate(self) -> float:
        """Cost per weight of the reference; of an empty reference the cost itself, as if one token had been said."""
        return self.cost / (self.of or 1)


class Keywords:
    """Phrases whose errors cost more; `base` adds those of another, so that a long list is prepared once."""

    def __init__(self, phrases: Iterable[Phrase], *, base: "Keywords | None" = None):
        phrases = frozenset(phrases)
        self.whole = Inventory(phrases, base=base and base.whole)
        self.parts = Inventory(chain(phrases, *map(pieces_of, phrases)), base=base and base.parts)

    def weights(self, text: str, *, unit: str, weight: float, parts: bool = False) -> list[float]:
        """Return `weight` for each token of `unit` that lies in a keyword, or with `parts` in a piece of one, else 1.

        `text` is normalised and has single spaces.
        """
        tokens = Tokens(text)
        places = tokens.places(self.parts if parts else self.whole) if weight > 1 else []
        if not places:
            return [1.0] * len(tokenizer_of(unit)(text))
        return [weight if inside else 1.0 for inside in tokens.in_unit(text, unit, places)]


def keyword_errors(
    reference: str, hypotheses: Sequence[str], *, keywords: Keywords, unit: str, weight: float
) -> list[WeightedErrors]:
    """Compare an utterance's normalised hypotheses with its reference; `unit` as in errors.py."""
    reference, *hypotheses = (" ".join(text.split()) for text in (reference, *hypotheses))
    tokens = tokenizer_of(unit)
    return compare_weighted(
        tokens(reference),
        [tokens(hypothesis) for hypothesis in hypotheses],
        reference_weights=keywords.weights(reference, unit=unit, weight=weight),
        insertion_weights=[keywords.weights(h, unit=unit, weight=weight, parts=True) for h in hypotheses],
    )


def weighted_errors(
    reference: Sequence[str],
    hypothesis: Sequence[str],
    *,
    reference_weights: Sequence[float],
    insertion_weights: Sequence[float],
) -> float:
    """Return the least cost of turning one token sequence into the other; a weight for each token, at least 1."""
    (only,) = compare_weighted(
        reference, [hypothesis], reference_weights=reference_weights, insertion_weights=[insertion_weights]
    )
    return only.cost


def compare_weighted(
    reference: Sequence[str],
    hypotheses: Sequence[Sequence[str]],
    *,
    reference_weights: Sequence[float],
    insertion_weights: Sequence[Sequence[float]],
) -> list[WeightedErrors]:
    """As `weighted_errors`, of all hypotheses of an utterance at once.

    No alignment has fewer errors than the plain one, and no error costs less than 1. So where the plain alignment
    costs as much as it has errors, nothing is cheaper; where it costs more, its cost bounds how far a cheaper one can
    leave the diagonal.
    """
    _require_weights(reference, reference_weights)
    for hypothesis, weights in zip(hypotheses, insertion_weights, strict=True):
        _require_weights(hypothesis, weights)
    said, *heard = as_strings(reference, *hypotheses)
    edits = [Levenshtein.editops(said, tokens) for tokens in heard]
    costs = [
        float(sum(weights[edit.dest_pos] if edit.tag == "insert" else reference_weights[edit.src_pos] for edit in path))
        for path, weights in zip(edits, insertion_weights)
    ]
    open_ = [n for n, path in enumerate(edits) if costs[n] > len(path)]
    if open_:
        lowest = _least_costs(
            said,
            [heard[n] for n in open_],
            reference_weights=reference_weights,
            insertion_weights=[insertion_weights[n] for n in open_],
            bounds=[costs[n] for n in open_],
        )
        for n, cost in zip(open_, lowest):
            costs[n] = cost
    total = float(sum(reference_weights))
    # Rounded, so that equal costs are equal numbers in whatever order 1.1 and the like were added up.
    return [WeightedErrors(round(cost, 9), len(path), total) for cost, path in zip(costs, edits)]


def _least_costs(
    said: str,
    heard: Sequence[str],
    *,
    reference_weights: Sequence[float],
    insertion_weights: Sequence[Sequence[float]],
    bounds: Sequence[float],
) -> list[float]:
    """Return the cost of each hypothesis by dynamic programming over rows, all hypotheses together.

    All tokens deleted and all inserted cost the sum of all weights. A match saves both tokens' weights of it, a
    substitution that of the inserted token: `saved_NJ` is the most that can be saved by the reference so far and each
    beginning of a hypothesis. Cells that no alignment within `bounds` reaches keep what a shorter reference saves.
    """
    I, J = len(said), max(map(len, heard))  # noqa: E741
    codes_NJ, inserted_NJ = np.full((len(heard), J), -1), np.zeros((len(heard), J))
    for n, (tokens, weights) in enumerate(zip(heard, insertion_weights)):
        codes_NJ[n, : len(tokens)], inserted_NJ[n, : len(tokens)] = [ord(c) for c in tokens], weights
    # Insertions and deletions cost at least 1 each, and they differ by the difference in length.
    insertions = max(int(bound + len(tokens) - I) // 2 for tokens, bound in zip(heard, bounds))
    deletions = max(int(bound - len(tokens) + I) // 2 for tokens, bound in zip(heard, bounds))
    saved_NJ = np.zeros((len(heard), J + 1))
    for i, (code, weight) in enumerate(zip(map(ord, said), reference_weights)):
        first, last = max(0, i - deletions), min(J, i + 1 + insertions)
        aligned_NJ = inserted_NJ[:, first:last] + weight * (codes_NJ[:, first:last] == code)
        aligned_NJ += saved_NJ[:, first:last]
        row_NJ = saved_NJ[:, first : last + 1]
        np.maximum(row_NJ[:, 1:], aligned_NJ, out=row_NJ[:, 1:])
        np.maximum.accumulate(row_NJ, axis=1, out=row_NJ)
    everything = sum(reference_weights)
    return [
        float(everything + sum(weights) - saved_NJ[n, len(tokens)])
        for n, (tokens, weights) in enumerate(zip(heard, insertion_weights))
    ]


def _require_weights(tokens: Sequence[str], weights: Sequence[float]) -> None:
    if len(tokens) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(tokens)} tokens; give one for each")
    wrong = [weight for weight in weights if not 1 <= weight < math.inf]
    if wrong:
        raise ValueError(f"a token's weight is {wrong[0]}; it must be at least 1 and finite")
