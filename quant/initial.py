"""First scales and zeros: which part of a group's range the codes should cover.

Outliers stretch the range that minimum and maximum span, and at few bits everything else then shares a level or two.
Two searches. `row_clip` is the published one: one shrinking factor for all groups of a row, range with zero in it, and
the row's whole error decides. `group_clip` is ours: each group by itself under its own diagonal block of H; from each
of several ranges it alternates rounding and refitting (scale, zero), which moves both ends freely.
Shape letters: N rows, K columns, G groups in a row, C columns of a group.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from .closed_form import refitted
from .problem import Problem, Quantised

ROW_FACTORS = 160  # 1, 0.995, ... 0.205
LOOKS = (4, 1)  # every 4th factor, then each around the best: errors within 0.2 % of those of all 160
GROUP_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
REFITS = 3


def min_max(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return scale_NG and zero_NG of each group's range, zero in it; a group of zeros has a scale of 0."""
    low_NG, high_NG = _ranges(problem)
    low_NG, high_NG = low_NG.clamp_max(0), high_NG.clamp_min(0)
    return (high_NG - low_NG) / problem.top, low_NG


def row_clip(problem: Problem) -> Quantised:
    """Return the state of the factor whose codes by rounding to nearest have the lowest row error, refitted.

    160 factors are published; 46 of them are looked at.
    """
    scale_NG, zero_NG = min_max(problem)
    best_N = torch.full_like(scale_NG[:, 0], torch.inf)
    index_N = torch.zeros_like(best_N)

    def look(factors_N: Tensor) -> None:
        nonlocal best_N, index_N
        shrunk_N1 = (1 - factors_N / 200)[:, None]
        scale, zero = scale_NG * shrunk_N1, zero_NG * shrunk_N1
        errors_N = problem.errors_N(problem.nearest(scale, zero), scale, zero)
        better_N = errors_N < best_N
        best_N, index_N = torch.where(better_N, errors_N, best_N), torch.where(better_N, factors_N, index_N)

    for factor in range(0, ROW_FACTORS, LOOKS[0]):
        look(torch.full_like(best_N, factor))
    for wide, step in pairwise(LOOKS):
        around_N = index_N.clone()
        for off in range(step, wide, step):
            look((around_N - off).clamp_min(0))
            look((around_N + off).clamp_max(ROW_FACTORS - 1))
    shrunk_N1 = (1 - index_N / 200)[:, None]
    scale_NG, zero_NG = scale_NG * shrunk_N1, zero_NG * shrunk_N1
    return refitted(problem, problem.judged(problem.nearest(scale_NG, zero_NG), scale_NG, zero_NG))


def group_clip(problem: Problem) -> Quantised:
    """Return the state of every group's best grid, by its own error under its own block of H."""
    w_GNC, real_GC = _grouped(problem)
    hessian_GCC = _diagonal_blocks(problem)
    low_NG, high_NG = _ranges(problem)
    low_GN, high_GN = low_NG.t(), high_NG.t()
    ones_HG1C = torch.einsum("gcd,gd->gc", hessian_GCC, real_GC)
    best_GN = torch.full_like(low_GN, torch.inf)
    kept_GN = [torch.zeros_like(low_GN), torch.zeros_like(low_GN)]
    hw_GNC = w_GNC @ hessian_GCC
    for factor in GROUP_FACTORS:
        middle_GN, half_GN = (low_GN + high_GN) / 2, (high_GN - low_GN) / 2 * factor
        scale_GN, zero_GN = 2 * half_GN / problem.top, middle_GN - half_GN
        for _ in range(REFITS + 1):
            inverse_GN = torch.where(scale_GN == 0, 0.0, 1 / scale_GN)
            codes_GNC = ((w_GNC - zero_GN[..., None]) * inverse_GN[..., None] + 0.5).floor_().clamp_(0, problem.top)
            codes_GNC *= real_GC[:, None]
            hc_GNC = codes_GNC @ hessian_GCC
            # Everything that the error and the 2 x 2 system of (scale, zero) are made of.
            cc, c1 = (hc_GNC * codes_GNC).sum(-1), (codes_GNC * ones_HG1C[:, None]).sum(-1)
            cw, w1 = (hc_GNC * w_GNC).sum(-1), (w_GNC * ones_HG1C[:, None]).sum(-1)
            ww, one = (hw_GNC * w_GNC).sum(-1), (ones_HG1C * real_GC).sum(-1)[:, None]
            for s, z in ((scale_GN, zero_GN), _two_by_two(cc, c1, one, cw, w1)):
                errors_GN = s * s * cc + z * z * one + ww + 2 * (s * z * c1 - s * cw - z * w1)
                better_GN = errors_GN < best_GN
                best_GN = torch.where(better_GN, errors_GN, best_GN)
                kept_GN = [torch.where(better_GN, new, old) for new, old in zip((s, z), kept_GN)]
            scale_GN, zero_GN = _two_by_two(cc, c1, one, cw, w1)
    scale_NG, zero_NG = kept_GN[0].t().contiguous(), kept_GN[1].t().contiguous()
    return problem.judged(problem.nearest(scale_NG, zero_NG), scale_NG, zero_NG)


def _two_by_two(cc: Tensor, c1: Tensor, one: Tensor, cw: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best scale and zero; of equal codes the best zero, with a scale of 0."""
    determinant = cc * one - c1 * c1
    usable = determinant > 1e-6 * cc * one
    divisor = torch.where(usable, determinant, 1.0)
    scale = torch.where(usable, (cw * one - c1 * w1) / divisor, 0.0)
    return scale, (w1 - scale * c1) / torch.where(one > 0, one, 1.0)


def _ranges(problem: Problem) -> tuple[Tensor, Tensor]:
    K, size = problem.weight_NK.shape[1], problem.group_size
    short = 0 if size < 0 else -K % size

    def grouped(fill: float) -> Tensor:
        padded = pad(problem.weight_NK, (0, short), value=fill)
        return padded if size < 0 else padded.unflatten(1, (-1, size))

    low, high = grouped(torch.inf).amin(-1), grouped(-torch.inf).amax(-1)
    return low.reshape(-1, problem.groups), high.reshape(-1, problem.groups)


def _grouped(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return w_GNC and real_GC, 1 for columns and 0 for what fills up the last group."""
    N, K = problem.weight_NK.shape
    size = K if problem.group_size < 0 else problem.group_size
    w_GNC = pad(problem.weight_NK, (0, -K % size)).reshape(N, -1, size).transpose(0, 1).contiguous()
    real = pad(torch.ones(K, device=w_GNC.device), (0, -K % size)).reshape(-1, size)
    return w_GNC, real


def _diagonal_blocks(problem: Problem) -> Tensor:
    K = problem.weight_NK.shape[1]
    size = K if problem.group_size < 0 else problem.group_size
    blocks = torch.zeros(problem.groups, size, size, device=problem.weight_NK.device)
    for g in range(problem.groups):
        columns = slice(g * size, min((g + 1) * size, K))
        width = columns.stop - columns.start
        blocks[g, :width, :width] = problem.hessian_KK[columns, columns]
    return blocks
