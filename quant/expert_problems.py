"""One layer problem per expert: its weight, and the moments of the inputs that it is to be right for.

A router spreads n tokens over E experts k at a time, so that an expert sees n k / E of them on average and some see
hardly any. One with fewer than `min_tokens` is calibrated on all tokens of its layer instead, which it would have to
work on if the router changed its mind, and is reported: an H of a few tokens would have it fit those and forget the
rest. For down that means to send all tokens through the expert, whose intermediate channels are no other expert's.

Memory: a float64 H of K x K for every expert, 34 MB at K = 2048, so 4.3 GB for 128 experts. Experts are taken in
chunks of as many as fit into `memory_bytes`, with one pass over the calls for each chunk, plus one that counts tokens.
Shape letters: E experts, N output channels, K input channels, n tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .expert_inputs import ExpertCall, expert_inputs
from .expert_layout import GATE_UP, ExpertLayout, expert_layout
from .expert_routing import route
from .moments import InputMoments
from .packed_experts import PackedMatrices
from .ranks import Alone, Ranks

OWN_TOKENS, ALL_TOKENS, NO_TOKENS = "own tokens", "all tokens of the layer", "no tokens"
MEMORY_BYTES = 4 << 30
COLUMNS_PER_TOKEN = 8  # min_tokens is K / 8 where it is not given: with fewer, damping says more than the tokens


@dataclass(frozen=True)
class ExpertProblem:
    """What a solver needs for one projection of one expert. `moments` is None where there was no token at all."""

    name: str  # such as model.layers.0.mlp.experts.down.7
    projection: str
    expert: int
    weight_NK: Tensor
    moments: InputMoments | None
    tokens: int  # those routed to the expert, on all ranks
    calibrated_on: str  # OWN_TOKENS, ALL_TOKENS or NO_TOKENS


@torch.no_grad()
def expert_problems(
    module: nn.Module,
    calls: Iterable[ExpertCall],
    *,
    name: str,
    projection: str,
    gate_up: PackedMatrices | None = None,
    min_tokens: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    arithmetic: str = "float64",
    ranks: Ranks | None = None,
) -> Iterator[ExpertProblem]:
    """Yield the problems of one projection ("gate_up", then "down"), expert by expert.

    `calls` are those of `module`, called `name` in its model, and are iterated over several times. `gate_up` holds the
    quantised matrices through which tokens reach down. `min_tokens` is K / 8 by default; 0 keeps every expert that saw
    a token on its own. With `ranks`, each of which has calls of its own, all get the same problems. Raises ValueError
    for a module that is no fused experts module that can be quantised, and for inputs that are not finite.
    """
    layout, ranks = expert_layout(module, name=name), ranks or Alone()
    K = layout.shapes[projection][1]
    tokens, total = _count_tokens(calls, layout, ranks)
    least = -(-K // COLUMNS_PER_TOKEN) if min_tokens is None else min_tokens
    starved = {expert for expert in range(layout.experts) if tokens[expert] < max(least, 1)}
    settings = {"arithmetic": arithmetic, "device": getattr(module, layout.parameters[projection]).device}
    shared = None
    if total and starved and projection == GATE_UP:
        shared = InputMoments(K, name=f"{name}.{projection} (all tokens)", **settings)
        for call in calls:
            shared.add(call.everyone(), batch=call.batch)
        shared.merge(ranks)
    chunk = max(1, memory_bytes // (8 * K * K))
    for first in range(0, layout.experts, chunk):
        experts = range(first, min(first + chunk, layout.experts))
        names = {expert: f"{name}.{projection}.{expert}" for expert in experts}
        moments = {expert: shared for expert in experts if expert in starved and shared}
        own = [expert for expert in experts if expert not in moments and total]
        moments |= {expert: InputMoments(K, name=names[expert], **settings) for expert in own}
        for call in calls if own else ():
            inputs = expert_inputs(
                module, call, layout=layout, projection=projection, experts=own, starved=starved, gate_up=gate_up
            )
            for expert, x_nK in inputs:
                moments[expert].add(x_nK, batch=call.batch)
        for expert in own:
            moments[expert].merge(ranks)
        for expert in experts:
            calibrated_on = NO_TOKENS if not total else ALL_TOKENS if expert in starved else OWN_TOKENS
            weight_NK = layout.weight_NK(module, projection, expert)
            yield ExpertProblem(
                names[expert], projection, expert, weight_NK, moments.get(expert), tokens[expert], calibrated_on
            )


def _count_tokens(calls: Iterable[ExpertCall], layout: ExpertLayout, ranks: Ranks) -> tuple[list[int], int]:
    """Return how many valid tokens each expert sees, and how many there are, over all ranks."""
    counts_E, total = torch.zeros(layout.experts + 1, dtype=torch.float64), 0
    for call in calls:
        routing = route(call.index_nk, experts=layout.experts, valid_n=call.valid_n)
        counts_E[routing.experts] += torch.tensor(routing.counts, dtype=torch.float64)
        total += len(call.everyone())
    counts_E[-1] = total
    *tokens, total = ranks.sum_floats(counts_E).long().tolist()
    return tokens, total
