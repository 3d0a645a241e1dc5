"""Scales and zeros for fixed codes, against least squares on the inputs themselves."""

import numpy as np
import pytest
import torch
from small_layers import random_problem

from seedling.quant import closed_form
from seedling.quant.closed_form import refitted
from seedling.quant.initial import min_max
from seedling.quant.problem import Problem


def least_squares(problem: Problem, codes_K: torch.Tensor, weight_K: torch.Tensor) -> np.ndarray:
    """Return scales and zeros, [2G], by numpy on a root of H."""
    root_KK = torch.linalg.cholesky(problem.hessian_KK.double()).t().numpy()
    member_KG = torch.nn.functional.one_hot(problem.group_of_column_K, problem.groups).double().numpy()
    basis = np.concatenate([codes_K.double().numpy()[:, None] * member_KG, member_KG], axis=1)
    return np.linalg.lstsq(root_KK @ basis, root_KK @ weight_K.double().numpy(), rcond=None)[0]


@pytest.mark.parametrize("group_size", [-1, 4, 5, 16])
@pytest.mark.parametrize("rows_at_a_time", [3, 100])
def test_it_is_the_least_squares_solution(group_size, rows_at_a_time, monkeypatch):
    problem = random_problem(7, 18, group_size=group_size)
    monkeypatch.setattr(closed_form, "SYSTEM_BYTES", rows_at_a_time * 8 * (2 * problem.groups) ** 2)
    scale_NG, zero_NG = min_max(problem)
    found = refitted(problem, problem.judged(problem.nearest(scale_NG, zero_NG), scale_NG, zero_NG))
    for row in range(7):
        wanted = least_squares(problem, found.codes_NK[row], problem.weight_NK[row])
        got = torch.cat([found.scale_NG[row], found.zero_NG[row]]).numpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cols, group_size", [(16, -1), (16, 4), (300, 64)])
def test_the_gradient_is_zero_at_the_solution(cols, group_size):
    problem = random_problem(6, cols, group_size=group_size)
    scale_NG, zero_NG = min_max(problem)
    found = refitted(problem, problem.judged(problem.nearest(scale_NG, zero_NG), scale_NG, zero_NG))
    codes_NK, H = found.codes_NK.double(), problem.hessian_KK.double()
    scale, zero = (values_NG.double().requires_grad_() for values_NG in found[1:3])
    of_column_K = problem.group_of_column_K
    off_NK = scale[:, of_column_K] * codes_NK + zero[:, of_column_K] - problem.weight_NK
    ((off_NK @ H) * off_NK).sum().backward()
    terms_NK = problem.weight_NK.double().abs() @ H.abs()
    assert (scale.grad.abs() / problem.group_sums(codes_NK * terms_NK)).max() < 1e-6
    assert (zero.grad.abs() / problem.group_sums(terms_NK)).max() < 1e-6


def test_no_row_gets_worse_and_rows_of_equal_codes_stay_finite():
    problem = random_problem(6, 16)
    scale_NG, zero_NG = min_max(problem)
    codes_NK = problem.nearest(scale_NG, zero_NG)
    codes_NK[2] = 1
    before = problem.judged(codes_NK, scale_NG, zero_NG)
    after = refitted(problem, before)
    assert (after.errors_N <= before.errors_N).all() and after.errors_N.isfinite().all()
    assert after.errors_N[2] < before.errors_N[2]
