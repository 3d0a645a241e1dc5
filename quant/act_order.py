"""A layer in the order of rounding: columns by falling diagonal of H, each a row in memory.

Columns that matter most are rounded first, while the most others are left to make up for them (GPTQ's act-order).
Groups stay those of the columns as they stand, so no permutation is left behind.
Shape letters: N rows, K columns (rows in memory), G groups in a row.
"""

from functools import cached_property

import torch
from torch import Tensor

from .problem import Problem
from .rounding import ColumnGrid, spread_of


class ActOrder:
    def __init__(self, problem: Problem):
        self.problem = problem
        diagonal_K = problem.hessian_KK.diagonal()
        self.order_K = torch.argsort(diagonal_K, descending=True, stable=True)
        self.weight_KN = problem.weight_NK.t()[self.order_K]

    @cached_property
    def spread_KK(self) -> Tensor:
        """How far a column's error moves each later one."""
        return spread_of(self.problem.hessian_KK, self.order_K)

    @cached_property
    def hessian_KK(self) -> Tensor:
        return self.problem.hessian_KK[self.order_K[:, None], self.order_K]

    def grid(self, scale_NG: Tensor, zero_NG: Tensor) -> ColumnGrid:
        group_K = self.problem.group_of_column_K[self.order_K]
        return ColumnGrid(scale_NG.t().contiguous(), zero_NG.t().contiguous(), group_K, top=self.problem.top)

    def restored(self, codes_KN: Tensor) -> Tensor:
        """Return codes_NK, columns as they stand."""
        return codes_KN[torch.argsort(self.order_K)].t().contiguous()
