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
SINGULAR = 1e-6  # of a 2 x 2 determinant: the codes are all but equal


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
    """Return the state of every group's best grid, by its own error under its own block of H.

    Errors and refits are of what is off, with codes counted from the middle: sums over codes and weights themselves
    cancel to nothing in float32 where there are many codes, or inputs have a mean.
    """
    search, (low_GN, high_GN) = GroupSearch(problem), (ends.t() for ends in _ranges(problem))
    for factor in GROUP_FACTORS:
        scale_GN, middle_GN = factor * (high_GN - low_GN) / problem.top, (low_GN + high_GN) / 2
        for _ in range(REFITS + 1):
            scale_GN, middle_GN = search.refitted(scale_GN, middle_GN)
    scale_NG, middle_NG = search.scale_GN.t().contiguous(), search.middle_GN.t()
    zero_NG = middle_NG - problem.top / 2 * scale_NG
    return problem.judged(problem.nearest(scale_NG, zero_NG), scale_NG, zero_NG)


class GroupSearch:
    """The best scale and middle of each group so far, and what trying others takes."""

    def __init__(self, problem: Problem):
        self.half = problem.top / 2
        self.w_GNC, self.real_G1C = _grouped(problem)
        self.hessian_GCC = _diagonal_blocks(problem)
        self.pull_G1C = self.real_G1C @ self.hessian_GCC  # of an offset of all columns
        self.mm_G1 = (self.pull_G1C * self.real_G1C).sum(-1)
        self.error_GN = torch.full_like(self.w_GNC[..., 0], torch.inf)
        self.scale_GN, self.middle_GN = torch.zeros_like(self.error_GN), torch.zeros_like(self.error_GN)

    def refitted(self, scale_GN: Tensor, middle_GN: Tensor) -> tuple[Tensor, Tensor]:
        """Try a grid, and what is best for its codes; return the latter."""
        inverse_GN = torch.where(scale_GN == 0, 0.0, 1 / scale_GN)
        codes_GNC = ((self.w_GNC - middle_GN[..., None]) * inverse_GN[..., None] + (self.half + 0.5)).floor_()
        codes_GNC = codes_GNC.clamp_(0, 2 * self.half).sub_(self.half).mul_(self.real_G1C)
        off_GNC = torch.addcmul(middle_GN[..., None] * self.real_G1C, scale_GN[..., None], codes_GNC) - self.w_GNC
        pulled_GNC = off_GNC @ self.hessian_GCC
        error_GN = (pulled_GNC * off_GNC).sum(-1)
        self._keep(error_GN, scale_GN, middle_GN)
        # error + 2 (ds us + dm um) + ds^2 ss + 2 ds dm sm + dm^2 mm is least at the change (ds, dm).
        us, um = (pulled_GNC * codes_GNC).sum(-1), (pulled_GNC * self.real_G1C).sum(-1)
        ss, mm = ((codes_GNC @ self.hessian_GCC) * codes_GNC).sum(-1), self.mm_G1
        sm = (codes_GNC * self.pull_G1C).sum(-1)
        determinant = ss * mm - sm * sm
        usable = determinant > SINGULAR * ss * mm
        ds = torch.where(usable, (sm * um - mm * us) / torch.where(usable, determinant, 1.0), 0.0)
        dm = -(um + ds * sm) / torch.where(mm > 0, mm, 1.0)
        scale_GN, middle_GN = scale_GN + ds, middle_GN + dm
        self._keep(error_GN + ds * us + dm * um, scale_GN, middle_GN)
        return scale_GN, middle_GN

    def _keep(self, error_GN: Tensor, scale_GN: Tensor, middle_GN: Tensor) -> None:
        better_GN = error_GN < self.error_GN
        self.error_GN = torch.where(better_GN, error_GN, self.error_GN)
        self.scale_GN = torch.where(better_GN, scale_GN, self.scale_GN)
        self.middle_GN = torch.where(better_GN, middle_GN, self.middle_GN)


def _ranges(problem: Problem) -> tuple[Tensor, Tensor]:
    K, size = problem.weight_NK.shape[1], problem.group_size
    short = 0 if size < 0 else -K % size

    def grouped(fill: float) -> Tensor:
        padded = pad(problem.weight_NK, (0, short), value=fill)
        return padded if size < 0 else padded.unflatten(1, (-1, size))

    low, high = grouped(torch.inf).amin(-1), grouped(-torch.inf).amax(-1)
    return low.reshape(-1, problem.groups), high.reshape(-1, problem.groups)


def _grouped(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return w_GNC and real_G1C, 1 for columns and 0 for what fills up the last group."""
    N, K = problem.weight_NK.shape
    size = problem.group_columns
    w_GNC = pad(problem.weight_NK, (0, -K % size)).reshape(N, -1, size).transpose(0, 1).contiguous()
    real = pad(torch.ones_like(problem.weight_NK[0]), (0, -K % size)).reshape(-1, 1, size)
    return w_GNC, real


def _diagonal_blocks(problem: Problem) -> Tensor:
    K = problem.weight_NK.shape[1]
    size = problem.group_columns
    blocks = problem.weight_NK.new_zeros(problem.groups, size, size)
    for g in range(problem.groups):
        columns = slice(g * size, min((g + 1) * size, K))
        width = columns.stop - columns.start
        blocks[g, :width, :width] = problem.hessian_KK[columns, columns]
    return blocks
