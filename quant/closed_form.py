"""The best scales and zeros for given codes: linear least squares under H, in closed form.

H couples the groups of a row, so a row has one system of 2G unknowns. Its matrix is made of sums of H over pairs of
groups, weighted by the codes on no, one or both sides. Made group by group, it takes the memory of a few weights (the
published form holds three tensors [N, G, K]), and only so many rows are solved at a time.

Solved for is the change that the error as it is asks for, and codes count from the middle of their range. So float32
is enough for products with H: what it rounds away is a part of the change, not of the weight.
Shape letters: N rows, K columns, G groups in a row, R rows at a time, L columns of group j and all after it.
"""

import torch
from torch import Tensor

from .problem import Problem, Quantised

RIDGE = 1e-7  # beside the unit diagonal: a group of equal codes has a singular system, which then changes nothing
SYSTEM_BYTES = 1 << 27  # of the systems that are solved at a time; with factors and copies, four times that is held
PASSES = 2  # the second removes what ridge and float32 left of the gradient


def refitted(problem: Problem, found: Quantised) -> Quantised:
    """Return the state with the best scales and zeros for its codes; rows that would get worse stay as they are."""
    N, G = found.scale_NG.shape
    middle = problem.top / 2
    rows = max(1, SYSTEM_BYTES // (8 * (2 * G) ** 2))
    centre_NG, scale_NG = found.zero_NG + middle * found.scale_NG, found.scale_NG.clone()
    column_sums_KG = problem.group_sums(problem.hessian_KK)
    for start in range(0, N, rows):
        these = slice(start, start + rows)
        codes_RK, weight_RK = found.codes_NK[these].float() - middle, problem.weight_NK[these]
        system, unit_R2G = _system(problem, codes_RK, column_sums_KG)
        for _ in range(PASSES):
            off_RK = torch.addcmul(problem.expand(centre_NG[these]), problem.expand(scale_NG[these]), codes_RK)
            uphill_RK = off_RK.sub_(weight_RK) @ problem.hessian_KK
            uphill_R2G = torch.cat([problem.group_sums(uphill_RK * codes_RK), problem.group_sums(uphill_RK)], dim=1)
            change_R2G = torch.cholesky_solve((uphill_R2G / unit_R2G)[..., None], system)[..., 0] / unit_R2G
            scale_NG[these] -= change_R2G[:, :G]
            centre_NG[these] -= change_R2G[:, G:]
    return found.or_better(problem.judged(found.codes_NK, scale_NG, centre_NG - middle * scale_NG))


def _system(problem: Problem, codes_RK: Tensor, column_sums_KG: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factors, [R, 2G, 2G], of the systems with a diagonal of 1, and their units_R2G; float64.

    A system that has none is NaN: it never wins.
    """
    R, K = codes_RK.shape
    G, size = problem.groups, problem.group_columns
    system = torch.empty(R, 2 * G, 2 * G, dtype=torch.float64, device=codes_RK.device)
    system[:, G:, G:] = problem.group_sums(column_sums_KG.t())
    for j in range(G):
        here, left = slice(j * size, min((j + 1) * size, K)), slice(j * size, None)
        product_RL = codes_RK[:, here] @ problem.hessian_KK[here, left]
        system[:, j:G, j] = problem.group_sums(product_RL.mul_(codes_RK[:, left]))  # Cholesky reads this half alone
        system[:, G:, j] = codes_RK[:, here] @ column_sums_KG[here]
    unit_R2G = system.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    unit_R2G = torch.where(unit_R2G > 0, unit_R2G, 1.0)
    system /= unit_R2G[:, :, None]
    system /= unit_R2G[:, None, :]
    system.diagonal(dim1=1, dim2=2).add_(RIDGE)
    lower, failed_R = torch.linalg.cholesky_ex(system)
    return lower.masked_fill_((failed_R > 0)[:, None, None], torch.nan), unit_R2G
