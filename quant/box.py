"""Box-aware rounding: before each block of columns, what is left is solved again within the range of its codes.

At two bits many weights lie beyond the lowest or the highest code. GPTQ moves the error of a rounded column onto later
ones whether they can take it or not, and what pushes a weight further out is lost when it is clipped. So the columns
that are not yet rounded are kept near the minimum of

    (a - w) H (a - w)^T,   a = [rounded columns | x],   x within the box,

by accelerated projected gradient: each column's step as its diagonal of H says, momentum dropped in rows where it
points uphill, no constant that depends on a unit. The block is then rounded as GPTQ does, and GPTQ's compensation,
clipped to the box, is where the next solve starts. That start is worth more than steps: from where the last solve had
ended, eight steps left the error 4 % above what thirty did (docs/log.md).
Shape letters: N rows, K columns (rows in memory), C columns of a block, L columns that are left.
"""

import torch
from torch import Tensor

from .act_order import ActOrder
from .problem import Quantised
from .rounding import ColumnGrid

POWER_ITERATIONS = 50
MARGIN = 1.05  # of the step: power iteration finds the largest eigenvalue from below
FIRST_STEPS, STEPS = 30, 12  # before the first block, and before each other one


def block_columns(K: int) -> int:
    """Return the columns of a block: 16 in small layers, 64 in most, K / 64 in very wide ones."""
    return max(16, min(64, K // 16), K // 64)


class BoxRounding:
    """Rounds a layer for any scales and zeros; `columns` of 1 solves anew before every column."""

    def __init__(self, ordered: ActOrder, *, columns: int):
        self.ordered, self.columns = ordered, columns
        hessian_KK = ordered.hessian_KK
        self.step_K1 = (1 / (MARGIN * largest_eigenvalue(hessian_KK) * hessian_KK.diagonal()))[:, None]

    def __call__(self, found: Quantised) -> Quantised:
        """Return codes for the scales and zeros of a state, judged."""
        codes_KN = self.codes(self.ordered.grid(found.scale_NG, found.zero_NG))
        return self.ordered.problem.judged(self.ordered.restored(codes_KN), found.scale_NG, found.zero_NG)

    def codes(self, grid: ColumnGrid) -> Tensor:
        """Return codes_KN (uint8)."""
        weight_KN, hessian_KK, spread_KK = self.ordered.weight_KN, self.ordered.hessian_KK, self.ordered.spread_KK
        low_KN, high_KN = grid.box()  # from here on all is seen from the weight: x, the box
        low_KN -= weight_KN
        high_KN -= weight_KN
        x_KN = torch.clamp(torch.zeros_like(weight_KN), low_KN, high_KN)
        codes_KN, pull_KN = torch.empty_like(x_KN, dtype=torch.uint8), torch.zeros_like(x_KN)
        K = len(x_KN)
        for start in range(0, K, self.columns):
            here, left = slice(start, min(start + self.columns, K)), slice(start, None)
            later = slice(start + self.columns, None)
            self._settle(
                x_KN[left], low_KN[left], high_KN[left], pull_KN[left], left, steps=STEPS if start else FIRST_STEPS
            )
            rounded_CN = weight_KN[here] + x_KN[here]
            codes_KN[here], errors_CN = grid.round_block(rounded_CN, spread_KK[here, here], here)
            x_KN[later].addmm_(spread_KK[here, later].t(), errors_CN, alpha=-1)
            torch.clamp(x_KN[later], low_KN[later], high_KN[later], out=x_KN[later])
            pull_KN[later].addmm_(hessian_KK[later, here], rounded_CN.sub_(errors_CN).sub_(weight_KN[here]))
        return codes_KN

    def _settle(
        self, x_LN: Tensor, low_LN: Tensor, high_LN: Tensor, pull_LN: Tensor, left: slice, *, steps: int
    ) -> None:
        """Move x_LN, in place, towards the minimum within the box, given the pull H[left, rounded] @ error."""
        hessian_LL, step_L1 = self.ordered.hessian_KK[left, left], self.step_K1[left]
        ahead_LN, momentum_N = x_LN.clone(), x_LN.new_ones(x_LN.shape[1])
        for _ in range(steps):
            uphill_LN = torch.addmm(pull_LN, hessian_LL, ahead_LN)
            new_LN = ahead_LN.addcmul_(uphill_LN, step_L1, value=-1)
            torch.clamp(new_LN, low_LN, high_LN, out=new_LN)
            moved_LN = torch.sub(new_LN, x_LN)
            x_LN.copy_(new_LN)
            momentum_N = torch.where(uphill_LN.mul_(moved_LN).sum(0) > 0, 1.0, momentum_N)
            after_N = (1 + (1 + 4 * momentum_N * momentum_N).sqrt()) / 2
            ahead_LN = new_LN.addcmul_(moved_LN, (momentum_N - 1) / after_N)
            momentum_N = after_N


def largest_eigenvalue(hessian_KK: Tensor) -> Tensor:
    """Return that of D^-1/2 H D^-1/2, D the diagonal of H."""
    unit_K = hessian_KK.diagonal().rsqrt()
    # Not of ones: inputs in pairs x, -x have none of them.
    vector_K = torch.arange(len(unit_K), dtype=unit_K.dtype, device=unit_K.device).cos()
    for _ in range(POWER_ITERATIONS):
        vector_K = unit_K * (hessian_KK @ (unit_K * vector_K))
        vector_K = vector_K / vector_K.norm()
    return (vector_K * unit_K) @ (hessian_KK @ (unit_K * vector_K))
