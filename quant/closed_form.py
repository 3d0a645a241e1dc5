"""The best scales and zeros for given codes: linear least squares under H, in closed form.

H couples the groups of a row, so a row has one system of 2G unknowns. Its matrix is made of sums of H over pairs of
groups, weighted by the codes on no, one or both sides. Made group by group, it takes the memory of a few weights (the
published form holds three tensors [N, G, K]), and only so many rows are solved at a time.
Shape letters: N rows, K columns, G groups in a row, R rows at a time.
"""

import torch
from torch import Tensor

from .problem import Problem, Quantised

RIDGE = 1e-8  # beside the unit diagonal: a row of equal codes has a singular system
SYSTEM_BYTES = 1 << 29  # of the systems that are solved at a time


def refitted(problem: Problem, found: Quantised) -> Quantised:
    """Return the state with the best scales and zeros for its codes; rows that would get worse stay as they are."""
    G = problem.groups
    rows = max(1, min(len(found.codes_NK), SYSTEM_BYTES // (8 * (2 * G) ** 2)))
    plain_GG = _plain_sums(problem)
    solved = [
        _solved(problem, found.codes_NK[start : start + rows], problem.weight_NK[start : start + rows], plain_GG)
        for start in range(0, len(found.codes_NK), rows)
    ]
    fitted_N2G = torch.cat(solved).float()
    return found.or_better(problem.judged(found.codes_NK, fitted_N2G[:, :G], fitted_N2G[:, G:]))


def _plain_sums(problem: Problem) -> Tensor:
    """Return the sums of H over every pair of groups, [G, G]."""
    return problem.group_sums(problem.group_sums(problem.hessian_KK).t().contiguous())


def _solved(problem: Problem, codes_RK: Tensor, weight_RK: Tensor, plain_GG: Tensor) -> Tensor:
    """Return scales and zeros, [R, 2G], float64."""
    H, G, K = problem.hessian_KK, problem.groups, codes_RK.shape[1]
    size = K if problem.group_size < 0 else problem.group_size
    codes_RK = codes_RK.double()
    system = torch.empty(len(codes_RK), 2 * G, 2 * G, dtype=torch.float64, device=codes_RK.device)
    system[:, G:, G:] = plain_GG
    for j in range(G):
        columns = slice(j * size, min((j + 1) * size, K))
        product_RK = codes_RK[:, columns] @ H[columns]
        system[:, j, G:] = problem.group_sums(product_RK)
        system[:, j, :G] = problem.group_sums(product_RK.mul_(codes_RK))
    system[:, G:, :G] = system[:, :G, G:].transpose(1, 2)
    product_RK = weight_RK.double() @ H
    right_R2G = torch.cat([problem.group_sums(product_RK * codes_RK), problem.group_sums(product_RK)], dim=1)
    unit_R2G = system.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    unit_R2G = torch.where(unit_R2G > 0, unit_R2G, 1.0)
    system /= unit_R2G[:, :, None]
    system /= unit_R2G[:, None, :]
    system.diagonal(dim1=1, dim2=2).add_(RIDGE)
    lower, failed_R = torch.linalg.cholesky_ex(system)
    fitted_R2G = torch.cholesky_solve((right_R2G / unit_R2G)[..., None], lower)[..., 0] / unit_R2G
    return torch.where((failed_R == 0)[:, None], fitted_R2G, torch.nan)  # NaN never wins
