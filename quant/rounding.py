"""GPTQ's rounding: column by column, each error made up for by the columns that are not yet rounded.

Frantar et al. 2022 (https://arxiv.org/abs/2210.17323). With H^-1 = U^T U, U upper triangular, rounding column k with
error e moves every later column l by -e S[k, l], S[k, l] = U[k, l] / U[k, k], called spread here: that is where later
columns cost least. Columns are rows in memory ([K, N]), so that a step reads and writes what lies together, and what a
block of columns does to all later ones is one product.
Shape letters: N rows (output channels), K columns (input channels), G groups in a row, C columns of a block.
"""

import torch
from torch import Tensor

COLUMNS = 64  # of a block
EXTRA_DAMPING = 0.01  # of H's mean diagonal, in the spread alone, as decoupleQ has it; more where H is too singular


def spread_of(hessian_KK: Tensor, order_K: Tensor) -> Tensor:
    """Return S_KK in float32, upper triangular with a diagonal of 1, of H with its columns in the given order."""
    backwards_K = order_K.flip(0)
    for more in (1, 10, 100, 1000, 10000):
        # Turned around, the factor L of H = L L^T is an upper triangular A with H = A A^T, and U is A's inverse.
        lower_KK = hessian_KK[backwards_K[:, None], backwards_K].double()
        lower_KK.diagonal().add_(EXTRA_DAMPING * more * lower_KK.diagonal().mean())
        lower_KK, info = torch.linalg.cholesky_ex(lower_KK)
        if not info.item():
            lower_KK /= lower_KK.diagonal().clone()
            # In place, as each of these is 1 GB at K = 11008; by columns in memory, as LAPACK wants it.
            inverse_KK = torch.eye(len(lower_KK), dtype=lower_KK.dtype, device=lower_KK.device).t()
            torch.linalg.solve_triangular(lower_KK, inverse_KK, upper=False, unitriangular=True, out=inverse_KK)
            del lower_KK
            return inverse_KK.float().flip(0, 1).contiguous()
    raise ValueError(f"hessian_KK ({len(hessian_KK)} x {len(hessian_KK)}) is far from positive definite")


class ColumnGrid:
    """Scales and zeros of all groups, and each column's group: what rounding looks up. Groups are rows in memory."""

    def __init__(self, scale_GN: Tensor, zero_GN: Tensor, group_K: Tensor, *, top: int):
        self.scale_GN, self.zero_GN, self.group_K, self.top = scale_GN, zero_GN, group_K, top

    def box(self) -> tuple[Tensor, Tensor]:
        """Return the lowest_KN and the highest_KN value that there is a code for; a scale may be negative."""
        end_GN = torch.add(self.zero_GN, self.scale_GN, alpha=self.top)
        low_GN, high_GN = torch.minimum(self.zero_GN, end_GN), torch.maximum(self.zero_GN, end_GN)
        return low_GN[self.group_K], high_GN[self.group_K]

    def round_block(self, weight_CN: Tensor, spread_CC: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Round a block's columns in turn, in place. Return codes_CN (uint8) and the errors_CN to be made up for.

        Columns of `weight_CN` that are still to be rounded take on what those before them leave; at the end it holds
        the values that were rounded. Columns behind the block are the caller's.
        """
        group_C = self.group_K[columns]
        scale_CN, zero_CN = self.scale_GN[group_C], self.zero_GN[group_C]
        inverse_CN = torch.where(scale_CN == 0, 0.0, 1 / scale_CN)
        codes_CN, errors_CN = torch.empty_like(weight_CN), torch.empty_like(weight_CN)
        for c in range(len(weight_CN)):
            code_N = torch.sub(weight_CN[c], zero_CN[c], out=codes_CN[c])
            code_N.mul_(inverse_CN[c]).add_(0.5).floor_().clamp_(0, self.top)
            error_N = torch.sub(weight_CN[c], torch.addcmul(zero_CN[c], scale_CN[c], code_N), out=errors_CN[c])
            weight_CN[c + 1 :].addr_(spread_CC[c, c + 1 :], error_N, alpha=-1)
        return codes_CN.to(torch.uint8), errors_CN


def gptq_codes(weight_KN: Tensor, grid: ColumnGrid, spread_KK: Tensor) -> Tensor:
    """Return codes_KN (uint8). Columns are rounded in the order in which they stand."""
    K = len(weight_KN)
    weight_KN, codes_KN = weight_KN.clone(), torch.empty_like(weight_KN, dtype=torch.uint8)
    for start in range(0, K, COLUMNS):
        here, later = slice(start, min(start + COLUMNS, K)), slice(start + COLUMNS, None)
        codes_KN[here], errors_CN = grid.round_block(weight_KN[here], spread_KK[here, here], here)
        weight_KN[later].addmm_(spread_KK[here, later].t(), errors_CN, alpha=-1)
    return codes_KN
