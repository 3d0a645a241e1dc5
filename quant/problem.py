"""One layer's quantisation problem, checked and free of units.

    minimise over codes, scale, zero   (w~ - w) H (w~ - w)^T   for each row w,   w~ = scale * code + zero

H is damped by a hundredth of its mean diagonal, as decoupleQ does it, and all errors that solvers compare are those of
the damped H. Weight and H are divided by their sizes first, so that no solver can depend on the units of weights or
activations; `solution` multiplies them back.
Shape letters: N rows (output channels), K columns (input channels), G groups in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.w2a16.groups import check_bits, columns_of_groups, group_columns, group_count, group_sums
from .solution import LayerSolution

DAMPING = 0.01
FORM_BLOCKS = 6
LARGEST = torch.finfo(torch.float32).max / 256  # a weight that scales and zeros of float32 can say
ASYMMETRY = 1e-3  # relative to the largest diagonal entry; a second moment has none but rounding
CHUNK_ELEMENTS = 1 << 24  # of H that are checked and scaled at a time: 128 MB in float64


class Quantised(NamedTuple):
    """A state of the search: codes_NK (uint8), scale_NG, zero_NG and the damped errors_N."""

    codes_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor
    errors_N: Tensor

    def or_better(self, other: Quantised) -> Quantised:
        """Return, row by row, whichever has the lower error; NaN never wins."""
        better_N1 = (other.errors_N < self.errors_N)[:, None]
        values = (torch.where(better_N1, b, a) for a, b in zip(self[:3], other[:3]))
        return Quantised(*values, torch.where(better_N1[:, 0], other.errors_N, self.errors_N))


@dataclass(frozen=True)
class Problem:
    weight_NK: Tensor  # float32, each row of root mean square 1
    hessian_KK: Tensor  # float32, symmetric, damped, of mean diagonal 1.01
    bits: int
    group_size: int
    unit_N: Tensor  # float64, root mean square of each row
    hessian_unit: Tensor
    dead_K: Tensor  # columns that have had no input but zeros

    @classmethod
    def of(cls, weight_NK: Tensor, hessian_KK: Tensor | None, *, bits: int, group_size: int) -> Problem:
        """Check and scale. Without a Hessian all columns count alike. ValueError names what is wrong."""
        check_bits(bits)
        if weight_NK.dim() != 2 or not weight_NK.numel():
            raise ValueError(f"weight_NK has shape {tuple(weight_NK.shape)}; a linear layer's is [N, K]")
        N, K = weight_NK.shape
        group_count(K, group_size)  # refuses sizes that are none
        weight_NK = weight_NK.detach()
        if not weight_NK.is_floating_point():
            raise ValueError(f"weight_NK is {weight_NK.dtype}; give floating-point weights, not yet quantised")
        if not weight_NK.isfinite().all() or weight_NK.abs().max() > LARGEST:
            raise ValueError(f"weight_NK ({N} x {K}, {weight_NK.dtype}) has values that are no finite float32 numbers")
        unit_N = torch.linalg.vector_norm(weight_NK, dim=1, dtype=torch.float64) / K**0.5
        unit_N = torch.where(unit_N > 0, unit_N, 1.0)
        hessian_KK, hessian_unit = _scaled_hessian(hessian_KK, weight_NK)
        dead_K = hessian_KK.diagonal() == 0
        hessian_KK.diagonal().add_(DAMPING)
        scaled_NK = torch.empty(N, K, device=weight_NK.device, dtype=torch.float32)
        torch.div(weight_NK, unit_N[:, None], out=scaled_NK)
        return cls(scaled_NK, hessian_KK, bits, group_size, unit_N, hessian_unit, dead_K)

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def groups(self) -> int:
        return group_count(self.weight_NK.shape[1], self.group_size)

    @property
    def group_columns(self) -> int:
        """The columns of a group; the last one may have fewer."""
        return group_columns(self.weight_NK.shape[1], self.group_size)

    @cached_property
    def group_of_column_K(self) -> Tensor:
        columns_K = torch.arange(self.weight_NK.shape[1], device=self.weight_NK.device)
        return columns_K // self.group_size if self.group_size > 0 else torch.zeros_like(columns_K)

    def expand(self, values_NG: Tensor) -> Tensor:
        """Return values_NK: each column has the value of its group."""
        return columns_of_groups(values_NG, self.weight_NK.shape[1], self.group_size)

    def group_sums(self, values_NK: Tensor) -> Tensor:
        """Return the sums over each group, [..., G]."""
        return group_sums(values_NK, self.group_size)

    def off_NK(self, codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
        """Return w~ - w."""
        return torch.addcmul(self.expand(zero_NG), self.expand(scale_NG), codes_NK.float()).sub_(self.weight_NK)

    def errors_N(self, codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
        """Return each row's error under the damped H."""
        return quadratic_form_N(self.off_NK(codes_NK, scale_NG, zero_NG), self.hessian_KK)

    def judged(self, codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> Quantised:
        return Quantised(codes_NK, scale_NG, zero_NG, self.errors_N(codes_NK, scale_NG, zero_NG))

    def nearest(self, scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
        """Return codes_NK by rounding to nearest, ties up."""
        inverse_NK = self.expand(torch.where(scale_NG == 0, 0.0, 1 / scale_NG))
        return (self.weight_NK - self.expand(zero_NG)).mul_(inverse_NK).add_(0.5).clamp_(0, self.top).to(torch.uint8)

    def solution(self, found: Quantised) -> LayerSolution:
        """Return the answer in the units of weight and H, with the nearest codes where a column has no inputs."""
        errors_N = self._undamped_errors_N(found) * (self.unit_N**2 * self.hessian_unit)
        nearest_NK = self.nearest(found.scale_NG, found.zero_NG)
        return LayerSolution(
            codes_NK=torch.where(self.dead_K, nearest_NK, found.codes_NK),
            scale_NG=(found.scale_NG * self.unit_N[:, None]).float(),
            zero_NG=(found.zero_NG * self.unit_N[:, None]).float(),
            bits=self.bits,
            group_size=self.group_size,
            row_errors_N=errors_N,
        )

    def _undamped_errors_N(self, found: Quantised) -> Tensor:
        off_NK = self.off_NK(*found[:3])
        return (found.errors_N.double() - DAMPING * off_NK.double().square().sum(1)).clamp_min(0)


def quadratic_form_N(x_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    """Return x H x^T of each row, for a symmetric H: every pair of column blocks is multiplied once, not twice."""
    K = len(hessian_KK)
    total_N = torch.zeros_like(x_NK[:, 0])
    for start in range(0, K, max(1, -(-K // FORM_BLOCKS))):
        block = slice(start, min(start + -(-K // FORM_BLOCKS), K))
        product_NC = x_NK[:, block] @ hessian_KK[block, block]
        if start:
            product_NC.addmm_(x_NK[:, :start], hessian_KK[:start, block], alpha=2)
        total_N += product_NC.mul_(x_NK[:, block]).sum(1)
    return total_N


def _scaled_hessian(hessian_KK: Tensor | None, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the checked Hessian, symmetric, divided by its mean diagonal, in float32; and that mean."""
    K, device = weight_NK.shape[1], weight_NK.device
    if hessian_KK is None:
        identity_KK = torch.eye(K, device=device, dtype=torch.float32)
        return identity_KK, torch.ones((), dtype=torch.float64, device=device)
    if hessian_KK.shape != (K, K):
        raise ValueError(f"hessian_KK has shape {tuple(hessian_KK.shape)}, and a weight of {K} columns needs {(K, K)}")
    hessian_KK = hessian_KK.detach().to(device)
    diagonal_K = hessian_KK.diagonal().double()
    largest = diagonal_K.max()
    mean = torch.where(largest > 0, diagonal_K.mean(), 1.0)
    scaled_KK = torch.empty(K, K, device=device, dtype=torch.float32)
    finite, asymmetry = True, 0.0
    step = max(1, CHUNK_ELEMENTS // K)
    for rows in (slice(start, start + step) for start in range(0, K, step)):
        there, across = hessian_KK[rows].double(), hessian_KK[:, rows].t().double()
        finite = finite and bool(there.isfinite().all())
        asymmetry = max(asymmetry, (there - across).abs().max().item())
        scaled_KK[rows] = (there + across) / (2 * mean)
    if not finite:
        raise ValueError(
            f"hessian_KK ({K} x {K}) has NaN or infinite values: an activation was none; leave out the batch it is from"
        )
    if (lowest := diagonal_K.min().item()) < 0:
        raise ValueError(f"hessian_KK has {lowest:g} on its diagonal; a second moment X^T X / n has no negative values")
    if asymmetry > ASYMMETRY * largest.item():
        raise ValueError(f"hessian_KK is not symmetric (by {asymmetry:g}); a second moment X^T X / n is")
    return scaled_KK, mean
