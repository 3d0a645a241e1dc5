"""Sampling: independent transcripts drawn from a step scorer's distribution, several for each utterance.

All samples of the batch run side by side, and each leaves when it is over. The luck of a sample is its own: at every
step a number is drawn for each sample of the batch, those that are over among them, so that what one draws does not
depend on when the others end.
Shape letters: R samples of all utterances, A those still running, V vocabulary, t tokens so far.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .decoding import Hypothesis, StepScorer, roll_out


@torch.no_grad()
def sample(
    scorer: StepScorer,
    prefixes: list[Any],
    *,
    limits: list[int],
    end: int,
    num: int,
    temperature: float,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[Hypothesis]]:
    """Return `num` transcripts of every prefix, in the order drawn. `limits` are in tokens, the end token included.

    Tokens are drawn from the scores divided by `temperature`, among the likeliest ones that together have `top_p` of
    the probability. `Hypothesis.score` sums the scores as they are, at temperature 1, as a search does.
    """
    if num < 1:
        raise ValueError(f"num is {num}; draw at least 1 sample of an utterance")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (near 0 is greedy decoding, see decode)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1, where nothing is left out")
    if not prefixes:
        return []
    log_probs_BV = scorer.start(prefixes)
    utterance_R = torch.arange(len(prefixes), device=log_probs_BV.device).repeat_interleave(num)
    scorer.select(utterance_R)
    source = torch.device("cpu") if generator is None else generator.device

    def drawn(log_probs_AV: Tensor, tokens_At: Tensor, running: list[int]) -> Tensor:
        luck_R = torch.rand(len(utterance_R), generator=generator, device=source)
        luck_A = luck_R[running].to(log_probs_AV.device)
        return draw(log_probs_AV, luck_A, temperature=temperature, top_p=top_p)

    found = roll_out(
        scorer,
        log_probs_BV[utterance_R],
        limits=[limit for limit in limits for _ in range(num)],
        end=end,
        choose=drawn,
        length_penalty=0.0,
    )
    return [found[first : first + num] for first in range(0, len(found), num)]


def draw(scores_AV: Tensor, luck_A: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Return the token in whose share of the probability each row's luck, in [0, 1), lies.

    A token at -inf has no share. Where no token has one, the result is any.
    """
    share_AV = (scores_AV.double() / temperature).softmax(-1)
    token_AV = None
    if top_p < 1:
        share_AV, token_AV = share_AV.sort(-1, descending=True)
        share_AV = share_AV.masked_fill(share_AV.cumsum(-1) - share_AV >= top_p, 0.0)
    # float32 luck is at most 1 - 2^-24: in float64 it stays below the last token's end, whatever is rounded.
    end_AV = share_AV.cumsum(-1)
    reached_AV = (end_AV > luck_A.double()[:, None] * end_AV[:, -1:]) & (share_AV > 0)
    place_A = reached_AV.int().argmax(-1, keepdim=True)
    return (place_A if token_AV is None else token_AV.gather(1, place_A))[:, 0]
