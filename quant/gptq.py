"""GPTQ with act-order on the range of each group: the baseline that decoupleQ starts from.

A row keeps what rounding to nearest gives where that is better.
"""

from .act_order import ActOrder
from .problem import Problem, Quantised
from .rounding import gptq_codes
from .rtn import rtn


class GPTQRounding:
    """Rounds a layer for any scales and zeros."""

    def __init__(self, ordered: ActOrder):
        self.ordered = ordered

    def __call__(self, found: Quantised) -> Quantised:
        """Return codes for the scales and zeros of a state, judged."""
        grid = self.ordered.grid(found.scale_NG, found.zero_NG)
        codes_KN = gptq_codes(self.ordered.weight_KN, grid, self.ordered.spread_KK)
        return self.ordered.problem.judged(self.ordered.restored(codes_KN), found.scale_NG, found.zero_NG)


def gptq(problem: Problem) -> Quantised:
    found = rtn(problem)
    return found.or_better(GPTQRounding(ActOrder(problem))(found))
