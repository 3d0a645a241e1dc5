"""GPTQ's rounding: column by column, each error made up for by the columns that are not yet rounded.

Frantar et al. 2022 (https://arxiv.org/abs/2210.17323), without an inverse. With H = A A^T, A upper triangular, a row off
by e costs |e A|^2, and its k-th term is A[k, k] (e_k + sum over j < k of e_j F[j, k]), F[j, k] = A[j, k] / A[k, k]. So
column k is rounded at w_k + sum of (w_j - w~_j) F[j, k], which is where GPTQ's updates from H^-1 leave it. F is
called feedback here. Columns are rows in memory ([K, N]), so that a step reads and writes what lies together, and what
a block of columns does to all later ones is one product.
Shape letters: N rows (output channels), K columns (input channels), G groups in a row, C columns of a block.
"""

import torch
from torch import Tensor

COLUMNS = 64  # of a block
EXTRA_DAMPING = 0.01  # of H's mean diagonal, in the feedback alone, as decoupleQ has it; more where H is too singular


def feedback_of(hessian_KK: Tensor, order_K: Tensor) -> Tensor:
    """Return F_KK in float32, upper triangular, of H with its columns in the given order."""
    backwards_K = order_K.flip(0)
    for more in (1, 10, 100, 1000, 10000):
        # Turned around, the lower factor of the reversed H is A.
        damped_KK = hessian_KK[backwards_K[:, None], backwards_K].double()
        damped_KK.diagonal().add_(EXTRA_DAMPING * more * damped_KK.diagonal().mean())
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
        del damped_KK  # K x K in float64 is the largest there is: 1 GB at K = 11008
        if not info.item():
            return lower_KK.div_(lower_KK.diagonal().clone()).float().flip(0, 1)
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

    def round_block(
        self, weight_CN: Tensor, targets_CN: Tensor, feedback_CC: Tensor, columns: slice
    ) -> tuple[Tensor, Tensor]:
        """Round a block's columns in turn. Return codes_CN (uint8) and errors_CN, weight_CN minus what it became.

        `targets_CN`, changed in place, is what to round: the weight and what it has to make up for. Errors feed back to
        later columns of the block; those behind it are the caller's.
        """
        group_C = self.group_K[columns]
        scale_CN, zero_CN = self.scale_GN[group_C], self.zero_GN[group_C]
        inverse_CN = torch.where(scale_CN == 0, 0.0, 1 / scale_CN)
        codes_CN, errors_CN = torch.empty_like(weight_CN), torch.empty_like(weight_CN)
        for c in range(len(weight_CN)):
            code_N = torch.sub(targets_CN[c], zero_CN[c], out=codes_CN[c])
            code_N.mul_(inverse_CN[c]).add_(0.5).floor_().clamp_(0, self.top)
            error_N = torch.sub(weight_CN[c], torch.addcmul(zero_CN[c], scale_CN[c], code_N), out=errors_CN[c])
            targets_CN[c + 1 :].addr_(feedback_CC[c, c + 1 :], error_N)
        return codes_CN.to(torch.uint8), errors_CN


def gptq_codes(weight_KN: Tensor, grid: ColumnGrid, feedback_KK: Tensor) -> Tensor:
    """Return codes_KN (uint8). Columns are rounded in the order in which they stand."""
    K = len(weight_KN)
    targets_KN, codes_KN = weight_KN.clone(), torch.empty_like(weight_KN, dtype=torch.uint8)
    for start in range(0, K, COLUMNS):
        here, later = slice(start, min(start + COLUMNS, K)), slice(start + COLUMNS, None)
        codes_KN[here], errors_CN = grid.round_block(
            weight_KN[here], targets_KN[here], feedback_KK[here, here], here
        )
        targets_KN[later].addmm_(feedback_KK[here, later].t(), errors_CN)
    return codes_KN
