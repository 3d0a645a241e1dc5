"""From generated hypotheses to the lists that a loss sees: merged, judged, with the reference where it is wanted.

Two hypotheses whose normalised texts are equal are one mistake or none: they would share their text's probability, and
the spread of a list would depend on how often the search spelt the same thing. The first of them, the one with the
higher score, stays. Samples of a policy gradient are not merged: there a repeated sample is what it is, likely.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ...model.decoding import DecodeConfig, Hypothesis
from ..runtime.schema import all_optional, given_values
from ..runtime.train_config import require_choice
from .risks import Judgement

DRAWS = ("beam", "sample")
DecodeOverrides = all_optional(DecodeConfig, name="DecodeOverrides")


@dataclass
class NBestConfig:
    """How the hypotheses of an utterance are found."""

    size: int = 4  # N: hypotheses of an utterance; beam search has at least as many beams
    draw: str = "beam"  # or sample: independently, from the distribution at `temperature`, cut to `top_p`
    temperature: float = 1.0
    top_p: float = 1.0
    add_reference: bool = False  # to every list (mwer: where nothing in it reads the same), as one more than N
    # Beam search: what is set here changes the recogniser's own settings, such as context_search=plain or ctc_weight=0.
    decode: DecodeOverrides = field(default_factory=DecodeOverrides)

    def __post_init__(self):
        require_choice("nbest.draw", self.draw, DRAWS)
        if self.size < 1:
            raise ValueError(f"nbest.size is {self.size}; it must be at least 1, and 2 for anything to be learnt")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"nbest.temperature is {self.temperature}; it must be above 0, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"nbest.top_p is {self.top_p}; it must be above 0 and at most 1")
        given = given_values(self.decode)
        if self.draw == "beam" and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError(
                f"nbest.temperature is {self.temperature} and nbest.top_p {self.top_p}, which beam search has no use "
                "for; leave them out, or set nbest.draw=sample"
            )
        if self.draw == "sample" and given:
            raise ValueError(
                f"nbest.decode.{next(iter(given))} is set and nbest.draw is sample, which does not search; leave it "
                "out, or set nbest.draw=beam"
            )
        if given.get("beam_size", self.size) < self.size:
            raise ValueError(
                f"nbest.size is {self.size} and nbest.decode.beam_size {given['beam_size']}; set "
                f"nbest.decode.beam_size={self.size}"
            )

    def search(self, own: DecodeConfig) -> DecodeConfig:
        """Return the settings of the search for N hypotheses; `own` are the recogniser's."""
        beams = {"beam_size": max(own.beam_size, self.size)}
        return replace(own, **beams | given_values(self.decode) | {"nbest": self.size})


class NBest(NamedTuple):
    """What a loss sees of one utterance: hypotheses in the order found, how wrong they are, and the transcript.

    Where the reference was added to the list it is the last one in it.
    """

    hypotheses: list[Hypothesis]
    texts: list[str]
    judgements: list[Judgement]
    own: int  # how many of them were found, the others were added
    found: int  # how many that were before merging
    reference: Hypothesis
    reference_tokens: int  # in the risk's unit

    @property
    def spread(self) -> float:
        """The largest risk less the smallest: at 0 there is nothing to learn from."""
        risks = [one.risk for one in self.judgements]
        return max(risks) - min(risks) if risks else 0.0


def distinct(texts: Sequence[str], *, normalize: Callable[[str], str]) -> list[int]:
    """Return the places of the texts that do not read as one before them."""
    seen: dict[str, int] = {}
    for i, text in enumerate(texts):
        seen.setdefault(" ".join(normalize(text).split()), i)
    return list(seen.values())
