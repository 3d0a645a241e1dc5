"""Scales and zeros in 16 bits, and codes that fit them: nearest by brute force, and what the solved error becomes."""

import pytest
import torch
from packed_layers import random_solution

from seedling.quant import solve_layer
from seedling.quant.linear import PackedLinear
from seedling.quant.solution import LayerSolution
from seedling.quant.stored_grid import on_stored_grid, stored_scale_zero

TYPES = (torch.bfloat16, torch.float16)


def by_groups(scale_zero, K, group_size):
    """Scale and zero of every column, float64."""
    g = K if group_size == -1 else group_size
    groups_K = torch.arange(K) // g
    return (scale_zero[groups_K][..., at].T.double() for at in range(2))


def distances(solution, codes_NK, scale_zero):
    """|stored - solved|^2 of each group, float64."""
    (_, K), g = codes_NK.shape, solution.group_size
    solved_GN2 = torch.stack([solution.scale_NG.T, solution.zero_NG.T], dim=-1)
    (scale, zero), (scale0, zero0) = by_groups(scale_zero, K, g), by_groups(solved_GN2, K, g)
    squares = (scale * codes_NK + zero - scale0 * solution.codes_NK - zero0) ** 2
    return torch.stack([part.sum(1) for part in squares.split(K if g == -1 else g, dim=1)], dim=1)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("scale_dtype", TYPES)
def test_each_code_is_the_nearest_of_all_to_what_was_solved(bits, group_size, scale_dtype):
    solution = random_solution(6, 150, bits=bits, group_size=group_size)
    codes_NK, scale_zero = on_stored_grid(solution, scale_dtype)
    scale, zero = by_groups(scale_zero, 150, group_size)
    levels = scale[..., None] * torch.arange(2**bits).double() + zero[..., None]
    away = (levels - solution.dequantised_NK().double()[..., None]).abs()
    own = away.gather(2, codes_NK.long()[..., None])[..., 0]
    assert codes_NK.dtype == torch.uint8 and scale_zero.dtype == scale_dtype
    torch.testing.assert_close(own, away.amin(2), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("scale_dtype", TYPES)
def test_no_group_is_further_away_than_with_rounded_scales_and_the_codes_of_the_solution(bits, group_size, scale_dtype):
    solution = random_solution(6, 150, bits=bits, group_size=group_size)
    plain = distances(solution, solution.codes_NK, stored_scale_zero(solution.scale_zero_GN2(), scale_dtype))
    found = distances(solution, *on_stored_grid(solution, scale_dtype))
    assert (found <= plain * (1 + 1e-4)).all() and found.sum() < 0.99 * plain.sum()


@pytest.mark.parametrize("scale_dtype", TYPES)
def test_a_solution_in_16_bits_is_stored_as_it_is(scale_dtype):
    solution = random_solution(6, 150, bits=8, group_size=64)
    scale_NG, zero_NG = (values.to(scale_dtype).float() for values in (solution.scale_NG, solution.zero_NG))
    scale_NG[0], zero_NG[1], scale_NG[2, 0] = 0.0, 0.0, torch.finfo(scale_dtype).max
    exact = LayerSolution(solution.codes_NK, scale_NG, zero_NG, 8, 64)
    layer = PackedLinear.from_solution(exact, bias=None, scale_dtype=scale_dtype)
    assert torch.equal(layer.codes_NK(), exact.codes_NK)
    assert torch.equal(layer.scale_NG(), scale_NG) and torch.equal(layer.zero_NG(), zero_NG)


def test_a_constant_group_stays_constant():
    solution = random_solution(4, 64, bits=8, group_size=64)
    constant = LayerSolution(solution.codes_NK, torch.zeros(4, 1), solution.zero_NG, 8, 64)
    codes_NK, scale_zero = on_stored_grid(constant, torch.bfloat16)
    assert (scale_zero[..., 0] == 0).all() and torch.equal(codes_NK, constant.codes_NK)


# The most that (w~ - w) H (w~ - w)^T may grow by being stored; rounding to the nearest has 3.2 and 73 at 8 bits.
BOUNDS = {
    (torch.bfloat16, 0): {2: 1.002, 3: 1.005, 4: 1.02, 8: 2.0},
    (torch.float16, 0): {2: 1.001, 3: 1.001, 4: 1.001, 8: 1.05},
    (torch.bfloat16, 25): {2: 1.04, 3: 1.06, 4: 1.2, 8: 4.0},
    (torch.float16, 25): {2: 1.002, 3: 1.002, 4: 1.005, 8: 1.5},
}


@pytest.mark.parametrize("mean", [0, 25])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_stored_errs_little_more_than_what_was_solved(mean, bits):
    generator = torch.Generator().manual_seed(0)
    weight_NK = 0.02 * (torch.randn(24, 128, generator=generator) + mean)
    inputs = torch.randn(1024, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 128**0.5
    hessian_KK = inputs.T @ inputs / len(inputs)
    solution = solve_layer(weight_NK, hessian_KK, bits=bits, group_size=64)

    def error(found_NK):
        away = (found_NK - weight_NK).double()
        return ((away @ hessian_KK.double()) * away).sum().item()

    for scale_dtype in TYPES:
        layer = PackedLinear.from_solution(solution, bias=None, scale_dtype=scale_dtype)
        growth = error(layer.dequantised_NK()) / error(solution.dequantised_NK())
        assert growth < BOUNDS[scale_dtype, mean][bits], f"{scale_dtype}: {growth:.4f}"
