"""Solving what is left within the box, against scipy's bounded least squares."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from small_layers import random_problem

from seedling.quant.act_order import ActOrder
from seedling.quant.box import BoxRounding, block_columns, largest_eigenvalue
from seedling.quant.initial import group_clip


def test_settling_finds_the_minimum_within_the_box():
    problem = random_problem(6, 20)
    ordered, start = ActOrder(problem), group_clip(problem)
    rounding = BoxRounding(ordered, columns=4)
    low_KN, high_KN = (end - ordered.weight_KN for end in ordered.grid(0.4 * start.scale_NG, 0.4 * start.zero_NG).box())
    x_KN = torch.clamp(torch.zeros(20, 6), low_KN, high_KN)
    pull_KN = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
    rounding._settle(x_KN, low_KN, high_KN, pull_KN, slice(0, None), steps=3000)
    root_KK = np.linalg.cholesky(ordered.hessian_KK.double().numpy()).T
    at_bound = 0
    for row in range(6):
        # x H x / 2 + pull x, completed to a square.
        target_K = -np.linalg.solve(root_KK.T, pull_KN[:, row].double().numpy())
        bounds = (low_KN[:, row].double().numpy(), high_KN[:, row].double().numpy() + 1e-9)
        wanted_K = lsq_linear(root_KK, target_K, bounds=bounds, tol=1e-12).x
        np.testing.assert_allclose(x_KN[:, row].numpy(), wanted_K, atol=2e-3)
        at_bound += int(
            np.isclose(wanted_K, bounds[0], atol=1e-5).sum() + np.isclose(wanted_K, bounds[1], atol=1e-5).sum()
        )
    assert at_bound > 20, "the box should have mattered"


def test_the_largest_eigenvalue_is_that_of_the_scaled_hessian():
    hessian_KK = random_problem(2, 30).hessian_KK
    unit_K = hessian_KK.diagonal().rsqrt()
    wanted = torch.linalg.eigvalsh(unit_K[:, None] * hessian_KK * unit_K).max()
    assert 0.97 * wanted < largest_eigenvalue(hessian_KK) <= wanted * (1 + 1e-6)


def test_negative_scales_swap_the_ends_of_the_box():
    problem = random_problem(3, 8)
    low_KN, high_KN = ActOrder(problem).grid(-torch.ones(3, 2), torch.ones(3, 2)).box()
    assert (low_KN == -2).all() and (high_KN == 1).all()


@pytest.mark.parametrize("K, columns", [(1, 16), (512, 32), (1024, 64), (4096, 64), (11008, 172)])
def test_wide_layers_have_a_constant_number_of_blocks(K, columns):
    assert block_columns(K) == columns


def test_the_box_matters_at_two_bits_and_hardly_at_eight():
    """Against GPTQ on the same grid: fewer errors where weights are clipped, the same where none is."""
    from seedling.quant.gptq import GPTQRounding

    gain = {}
    for bits in (2, 8):
        problem = random_problem(64, 64, bits=bits, group_size=-1)
        ordered, start = ActOrder(problem), group_clip(problem)
        box, plain = BoxRounding(ordered, columns=8)(start), GPTQRounding(ordered)(start)
        gain[bits] = float(box.errors_N.sum() / plain.errors_N.sum())
    assert gain[2] < 0.9 < gain[8] < 1.1
