"""Which tokens go to which expert.

Sorted once for all experts, with one host synchronisation per call (the counts): E masks with one each would be what
a mixture of 128 experts spends its time on.
Shape letters: n tokens, k experts per token, E experts, S pairs of a token and an expert that it goes to.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Pairs sorted by expert: the first counts[0] of them are those of experts[0], and so on."""

    tokens_S: Tensor
    slots_S: Tensor  # which of a token's k choices it is
    experts: list[int]  # those that anything goes to, in order
    counts: list[int]


def route(index_nk: Tensor, *, experts: int, valid_n: Tensor | None = None) -> Routing:
    """Sort the pairs of all valid tokens; those of one expert stay in order.

    Indexes of `experts` and above choose none, as in transformers, where they are the experts of other processes.
    """
    k = index_nk.shape[1]
    if valid_n is not None:
        index_nk = index_nk.masked_fill(~valid_n[:, None], experts)
    chosen_S = index_nk.reshape(-1).clamp(max=experts)
    counts_E = torch.bincount(chosen_S, minlength=experts + 1)[:experts].tolist()
    order_S = chosen_S.argsort(stable=True)[: sum(counts_E)]
    hit = [expert for expert, count in enumerate(counts_E) if count]
    return Routing(order_S // k, order_S % k, hit, [counts_E[expert] for expert in hit])
