"""Box-aware rounding: before each block of columns, what is left is solved again within the range of its codes.

At two bits many weights lie beyond the lowest or the highest code. GPTQ moves the error of a rounded column onto later
ones whether they can take it or not, and what pushes a weight further out is lost when it is clipped. So the columns that
are not yet rounded are kept at the minimum of

    (a - w) H (a - w)^T,   a = [rounded columns | x],   x within the box,

by accelerated projected gradient, each column's step as its diagonal of H says, momentum dropped in rows where it points
uphill; no constant in it depends on a unit. Within the block GPTQ's rounding follows.
Shape letters: N rows, K columns (rows in memory), C columns of a block, L columns that are left.
"""

import torch
from torch import Tensor

from .rounding import ColumnGrid

POWER_ITERATIONS = 50


def largest_eigenvalue(hessian_KK: Tensor) -> Tensor:
    """Return that of D^-1/2 H D^-1/2, D the diagonal of H; by power iteration, so from below."""
    unit_K = hessian_KK.diagonal().rsqrt()
    vector_K = unit_K.new_ones(len(unit_K))
    for _ in range(POWER_ITERATIONS):
        vector_K = unit_K * (hessian_KK @ (unit_K * vector_K))
        vector_K = vector_K / vector_K.norm()
    return (vector_K * unit_K) @ (hessian_KK @ (unit_K * vector_K))


class BoxRounding:
    """Rounds a weight on any grid. Everything stands in the order of rounding."""

    def __init__(self, weight_KN: Tensor, hessian_KK: Tensor, factor_KK: Tensor, *, columns: int, steps: int, first: int):
        self.weight_KN, self.hessian_KK, self.factor_KK = weight_KN, hessian_KK, factor_KK
        self.columns, self.steps, self.first = columns, steps, first
        self.step_K1 = (1 / (1.05 * largest_eigenvalue(hessian_KK) * hessian_KK.diagonal()))[:, None]

    def codes(self, grid: ColumnGrid) -> Tensor:
        """Return codes_KN."""
        low_KN, high_KN = grid.box()
        x_KN = torch.clamp(self.weight_KN, low_KN, high_KN)
        codes_KN, pull_KN = torch.empty_like(x_KN), torch.zeros_like(x_KN)
        K = len(x_KN)
        for start in range(0, K, self.columns):
            here, left = slice(start, min(start + self.columns, K)), slice(start, None)
            self._settle(x_KN[left], low_KN[left], high_KN[left], pull_KN[left], left, first=start == 0)
            rounded_CN = x_KN[here].clone()
            codes_KN[here], _ = grid.round_block(rounded_CN, self.factor_KK[here, here], here)
            off_CN = torch.addcmul(grid.zero_KN[here], grid.scale_KN[here], codes_KN[here]) - self.weight_KN[here]
            later = slice(here.stop, None)
            pull_KN[later].addmm_(self.hessian_KK[later, here], off_CN)
        return codes_KN

    def _settle(
        self, x_LN: Tensor, low_LN: Tensor, high_LN: Tensor, pull_LN: Tensor, left: slice, *, first: bool
    ) -> None:
        """Move x_LN, in place, towards the minimum within the box, given the pull H[left, rounded] @ error."""
        hessian_LL, weight_LN, step_L1 = self.hessian_KK[left, left], self.weight_KN[left], self.step_K1[left]
        ahead_LN, momentum_N = x_LN.clone(), x_LN.new_ones(x_LN.shape[1])
        for _ in range(self.first if first else self.steps):
            uphill_LN = torch.addmm(pull_LN, hessian_LL, ahead_LN - weight_LN)
            new_LN = torch.addcmul(ahead_LN, uphill_LN, step_L1, value=-1)
            torch.clamp(new_LN, low_LN, high_LN, out=new_LN)
            moved_LN = new_LN - x_LN
            momentum_N = torch.where((uphill_LN.mul_(moved_LN)).sum(0) > 0, 1.0, momentum_N)
            after_N = (1 + (1 + 4 * momentum_N * momentum_N).sqrt()) / 2
            torch.addcmul(new_LN, moved_LN, (momentum_N - 1) / after_N, out=ahead_LN)
            momentum_N = after_N
            x_LN.copy_(new_LN)
