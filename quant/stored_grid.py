"""Scales and zeros in the 16 bits that files hold, and the codes that are nearest to a solution on that grid.

At 8 bits, rounding a scale to bfloat16 moves the far end of its group by up to half a step, and rounding the zero moves
all of it by as much. Of the values that the type has on both sides of scale and zero, the pair is taken that brings a
group nearest to the solution's weights when each code is the nearest for that pair. What is stored then has these times
the squared error (w~ - w) H (w~ - w)^T of what was solved, where rounding to the nearest had those in brackets, for
weights of mean zero and for a mean of 25 standard deviations, 48 x 256 in groups of 64:

    bits           2              3              4              8
    bfloat16, 0    1.000 (1.000)  1.001 (1.002)  1.005 (1.008)  1.655 (3.151)
    float16,  0    1.000 (1.000)  1.000 (1.000)  1.000 (1.000)  1.019 (1.036)
    bfloat16, 25   1.012 (1.020)  1.033 (1.064)  1.124 (1.255)  2.981 (73.15)
    float16,  25   1.000 (1.000)  1.001 (1.001)  1.002 (1.004)  1.272 (1.980)

What is left at 8 bits is the price of codes that are rounded without H; float16 hardly has to.

Shape letters: N output channels, K input channels, G groups per row.
"""

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ..kernels.w2a16.groups import columns_of_groups, group_sums
from .solution import LayerSolution

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NEIGHBOURS = (0, -1, 1)  # of a rounded value among those of its type; the first stays where none is better


def check_scale_dtype(scale_dtype: torch.dtype) -> None:
    """Raise ValueError for a type that scales and zeros are not stored in."""
    if scale_dtype not in SCALE_DTYPES.values():
        raise ValueError(f"scale_dtype is {scale_dtype}; scales and zeros are stored in bfloat16 or float16")


def stored_scale_zero(exact_GN2: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Return scales and zeros in 16 bits.

    ValueError where a value overflows, or underflows so far that weights move by more than bfloat16 would move them.
    """
    check_scale_dtype(scale_dtype)
    stored_GN2 = exact_GN2.to(scale_dtype)
    lost_GN2 = ~stored_GN2.isfinite()
    if scale_dtype != torch.bfloat16:
        # A zero of 1e-9 beside a scale of 1e-2 may well become 0, and so may a scale beside such a zero.
        lost_GN2 |= (stored_GN2.float() - exact_GN2).abs() > 2**-8 * exact_GN2.abs().amax(-1, keepdim=True)
    if bool(lost_GN2.any()):
        scale, zero = exact_GN2[lost_GN2.any(-1)][0].tolist()
        way_out = "the layer's weights or their calibration have gone wrong"
        if scale_dtype != torch.bfloat16 and math.isfinite(scale) and math.isfinite(zero):
            way_out = "use scale_dtype bfloat16, which has float32's range"
        raise ValueError(
            f"a group has scale {scale:.4g} and zero {zero:.4g}, which {scale_dtype} cannot hold: {way_out}"
        )
    return stored_GN2 + 0.0  # no minus zero: what is added to it when nothing has been trained would change its bits


@torch.no_grad()
def on_stored_grid(solution: LayerSolution, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes_NK (uint8) and scale_zero [G, N, 2] in 16 bits, as near to the solution's weights as they come.

    A solution whose scales and zeros have 16 bits is returned as it is. Raises ValueError as stored_scale_zero does.
    """
    rounded_GN2 = stored_scale_zero(solution.scale_zero_GN2(), scale_dtype)
    best_GN2, best_NK, least_NG = rounded_GN2, *_nearest(solution, rounded_GN2)
    for scale_zero in _beside(rounded_GN2):
        codes_NK, distance_NG = _nearest(solution, scale_zero)
        better_NG = distance_NG < least_NG  # never where it is NaN: the value beside the largest is infinite
        best_GN2 = torch.where(better_NG.T[..., None], scale_zero, best_GN2)
        best_NK = torch.where(_columns(better_NG, solution), codes_NK, best_NK)
        least_NG = torch.where(better_NG, distance_NG, least_NG)
    return best_NK, best_GN2


def _beside(rounded_GN2: Tensor) -> Iterator[Tensor]:
    """Yield the pairs of values beside those given. A zero stays one: a group of scale 0 is a constant."""
    bits_GN2, moves_GN2 = rounded_GN2.view(torch.int16), (rounded_GN2 != 0).to(torch.int16)
    for steps in list(product(NEIGHBOURS, repeat=2))[1:]:
        steps_2 = torch.tensor(steps, dtype=torch.int16, device=rounded_GN2.device)
        yield (bits_GN2 + steps_2 * moves_GN2).view(rounded_GN2.dtype) + 0.0  # no minus zero here either


def _nearest(solution: LayerSolution, scale_zero: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes that come nearest to the solution's weights, uint8, and the squared distance left, [N, G]."""
    stored_NG, stored_zero_NG = scale_zero.float().permute(2, 1, 0)
    scale_NK, stored_NK, shift_NK = (
        # The difference of the zeros, and not of weights, which have lost digits where zeros are large beside scales.
        _columns(values_NG, solution)
        for values_NG in (solution.scale_NG, stored_NG, solution.zero_NG - stored_zero_NG)
    )
    own_NK = solution.codes_NK.float()
    wanted_NK = scale_NK * own_NK + shift_NK
    steps_NK = wanted_NK / stored_NK
    codes_NK = torch.where(steps_NK.isfinite(), steps_NK.round().clamp(0, 2**solution.bits - 1), own_NK)
    distance_NG = group_sums((stored_NK * codes_NK - wanted_NK).square_(), solution.group_size)
    return codes_NK.to(torch.uint8), distance_NG


def _columns(values_NG: Tensor, solution: LayerSolution) -> Tensor:
    return columns_of_groups(values_NG, solution.codes_NK.shape[1], solution.group_size)
