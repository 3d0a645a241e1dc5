"""GPTQ's rounding: column by column, each error made up for by the columns that are not yet rounded.

Frantar et al. 2022 (https://arxiv.org/abs/2210.17323). With H^-1 = U^T U, U upper triangular, rounding column k with
error e moves every later column l by -e U[k, l] / U[k, k]. Columns are rows in memory here ([K, N]), so that a step
reads and writes what lies together, and what a block of columns does to all later ones is one product.
Shape letters: N rows (output channels), K columns (input channels), C columns of a block.
"""

import torch
from torch import Tensor

COLUMNS = 64  # of a block
EXTRA_DAMPING = 0.01  # of H's mean diagonal, in the factor alone, as decoupleQ has it; more where H is too singular


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """Return U_KK of H^-1 = U^T U, upper triangular, in float64. H is positive definite but for rounding."""
    mean = hessian_KK.diagonal().mean()
    for more in (1, 10, 100, 1000, 10000):
        # Turned around, the factor L of H = L L^T is an upper triangular A with H = A A^T, and U is A's inverse.
        damped_KK = hessian_KK.flip(0, 1)
        damped_KK.diagonal().add_(EXTRA_DAMPING * more * mean)
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
        if not info.item():
            identity_KK = torch.eye(len(damped_KK), dtype=damped_KK.dtype, device=damped_KK.device)
            return torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False).flip(0, 1)
    raise ValueError(f"hessian_KK ({len(hessian_KK)} x {len(hessian_KK)}) is far from positive definite")


class ColumnGrid:
    """Scale and zero of every weight, columns as rows: what rounding looks up."""

    def __init__(self, scale_KN: Tensor, zero_KN: Tensor, *, top: int):
        self.scale_KN, self.zero_KN, self.top = scale_KN, zero_KN, top
        self.inverse_KN = torch.where(scale_KN == 0, 0.0, 1 / scale_KN)

    def box(self) -> tuple[Tensor, Tensor]:
        """Return the lowest_KN and the highest_KN value that there is a code for; a scale may be negative."""
        end_KN = torch.add(self.zero_KN, self.scale_KN, alpha=self.top)
        return torch.minimum(self.zero_KN, end_KN), torch.maximum(self.zero_KN, end_KN)

    def round_block(self, weight_CN: Tensor, factor_CC: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Round a block's columns in turn, in place. Return codes_CN and the errors_CN that later columns make up for.

        Columns of `weight_CN` that are still to be rounded take on what those before them leave; at the end it holds
        the values that were rounded.
        """
        scale_CN, zero_CN, inverse_CN = self.scale_KN[columns], self.zero_KN[columns], self.inverse_KN[columns]
        codes_CN, errors_CN = torch.empty_like(weight_CN), torch.empty_like(weight_CN)
        step_C = 1 / factor_CC.diagonal()
        for c in range(len(weight_CN)):
            code_N = torch.sub(weight_CN[c], zero_CN[c]).mul_(inverse_CN[c]).add_(0.5).floor_().clamp_(0, self.top)
            codes_CN[c] = code_N
            error_N = torch.sub(weight_CN[c], torch.addcmul(zero_CN[c], scale_CN[c], code_N), out=errors_CN[c])
            error_N.mul_(step_C[c])
            weight_CN[c + 1 :].addr_(factor_CC[c, c + 1 :], error_N, alpha=-1)
        return codes_CN, errors_CN


def gptq_codes(weight_KN: Tensor, grid: ColumnGrid, factor_KK: Tensor) -> Tensor:
    """Return codes_KN. Columns are rounded in the order in which they stand."""
    weight_KN, codes_KN = weight_KN.clone(), torch.empty_like(weight_KN)
    for start in range(0, len(weight_KN), COLUMNS):
        columns = slice(start, min(start + COLUMNS, len(weight_KN)))
        codes_KN[columns], errors_CN = grid.round_block(weight_KN[columns], factor_KK[columns, columns], columns)
        weight_KN[columns.stop :].addmm_(factor_KK[columns, columns.stop :].t(), errors_CN, alpha=-1)
    return codes_KN
