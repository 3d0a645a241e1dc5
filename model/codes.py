"""What the counts of codes say about their use. Shape letters: N codebooks, V codes each."""

from typing import NamedTuple

import torch
from torch import Tensor


class CodeUse(NamedTuple):
    """Per codebook, float64. Of few frames all are biased low: N frames show at most N codes."""

    entropy_N: Tensor  # nats
    perplexity_N: Tensor  # exp(entropy): as many codes, used equally, would have the same entropy
    usage_N: Tensor  # the share of codes that occur at all
    most_frequent_N: Tensor  # the share of the most frequent code: the accuracy of always guessing it
    frames: int
    num_codes: int


def code_use(counts_NV: Tensor) -> CodeUse:
    counts_NV = counts_NV.double()
    total_N1 = counts_NV.sum(1, keepdim=True)
    share_NV = counts_NV / total_N1.clamp_min(1)
    entropy_N = torch.special.entr(share_NV).sum(1)
    return CodeUse(
        entropy_N=entropy_N,
        perplexity_N=entropy_N.exp(),
        usage_N=(counts_NV > 0).double().mean(1),
        most_frequent_N=share_NV.amax(1),
        frames=int(total_N1[0]),
        num_codes=counts_NV.shape[1],
    )


# Of the codes that could have occurred. Healthy codes of speech are at 20 % and more, codes of features that are not
# normalised below 1 %.
COLLAPSED_BELOW = 0.03


def collapsed(use: CodeUse) -> list[int]:
    """Return the codebooks whose perplexity is below COLLAPSED_BELOW of what that many frames could show."""
    possible = min(use.num_codes, use.frames)
    return [n for n, perplexity in enumerate(use.perplexity_N.tolist()) if perplexity < COLLAPSED_BELOW * possible]
