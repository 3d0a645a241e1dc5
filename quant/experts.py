"""Quantises a layer of fused experts: gate_up of all experts first, then down on what the quantised gate_up gives it.

The router stays as it is: it is E x K weights, and one token sent elsewhere costs more than they would save.
"""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from .expert_inputs import ExpertCall
from .expert_layout import GATE_UP, PROJECTIONS, expert_layout
from .expert_problems import MEMORY_BYTES, OWN_TOKENS, ExpertProblem, expert_problems
from .packed_experts import PackedExperts, PackedMatrices
from .ranks import Ranks
from .solution import LayerSolution

log = logging.getLogger(__name__)


class QuantisedExperts(NamedTuple):
    """What takes the module's place, and which projections were not calibrated on tokens of their own, and why."""

    packed: PackedExperts
    fallbacks: dict[str, str]  # name of an expert's projection -> what it was calibrated on


def quantise_experts(
    module: nn.Module,
    calls: Iterable[ExpertCall],
    solve: Callable[[ExpertProblem], LayerSolution],
    *,
    name: str,
    scale_dtype: torch.dtype = torch.bfloat16,
    min_tokens: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    arithmetic: str = "float64",
    ranks: Ranks | None = None,
) -> QuantisedExperts:
    """Return packed experts for `module`, whose weights are not changed.

    `solve` is called for each projection of each expert and decides on its bits; where the problem has no moments,
    round to nearest is left. Experts that fell back are logged. The other arguments are those of `expert_problems`.
    """
    layout, packed, fallbacks = expert_layout(module, name=name), {}, {}
    for projection in PROJECTIONS:
        problems = expert_problems(
            module,
            calls,
            name=name,
            projection=projection,
            gate_up=packed.get(GATE_UP),
            min_tokens=min_tokens,
            memory_bytes=memory_bytes,
            arithmetic=arithmetic,
            ranks=ranks,
        )
        solutions, starved = [], []
        for problem in problems:
            solutions.append(solve(problem))
            if problem.calibrated_on != OWN_TOKENS:
                starved.append(f"{problem.expert} ({problem.tokens} tokens, calibrated on {problem.calibrated_on})")
                fallbacks[problem.name] = problem.calibrated_on
        if starved:
            log.warning(
                "%s.%s: too few tokens for %d of %d experts: %s; more calibration data cures that",
                *(name, projection, len(starved), layout.experts, ", ".join(starved)),
            )
        packed[projection] = PackedMatrices.from_solutions(
            solutions, bias=layout.bias_EN(module, projection), scale_dtype=scale_dtype
        )
    return QuantisedExperts(PackedExperts.in_place_of(module, packed), fallbacks)
