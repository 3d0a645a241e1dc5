"""GPTQ with act-order on the range of each group: the baseline that decoupleQ starts from.

Columns are rounded by falling diagonal of H; groups stay those of the columns as they stand, so no permutation is left
behind. A row keeps what rounding to nearest gives where that is better.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Problem, Quantised
from .rounding import ColumnGrid, gptq_codes, inverse_factor
from .rtn import rtn


def gptq(problem: Problem) -> Quantised:
    found = rtn(problem)
    codes_NK = gptq_rounding(problem)(found.scale_NG, found.zero_NG)
    return found.or_better(problem.judged(codes_NK, found.scale_NG, found.zero_NG))


def gptq_rounding(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what rounds the problem's weight on a grid: (scale_NG, zero_NG) -> codes_NK."""
    order_K = problem.order_K
    factor_KK = inverse_factor(problem.hessian_KK[order_K][:, order_K]).float()
    weight_KN = problem.weight_NK.t()[order_K].contiguous()

    def rounding(scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
        codes_KN = gptq_codes(weight_KN, column_grid(problem, scale_NG, zero_NG), factor_KK)
        codes_NK = torch.empty_like(problem.weight_NK)
        codes_NK[:, order_K] = codes_KN.t()
        return codes_NK

    return rounding


def column_grid(problem: Problem, scale_NG: Tensor, zero_NG: Tensor) -> ColumnGrid:
    """Return the grid of every weight, columns in the order of rounding."""
    scale_KN, zero_KN = (problem.expand(values).t()[problem.order_K].contiguous() for values in (scale_NG, zero_NG))
    return ColumnGrid(scale_KN, zero_KN, top=problem.top)
