"""GPTQ's rounding in blocks against the plain algorithm, which removes one column at a time from the inverse."""

import numpy as np
import pytest
import torch
from small_layers import random_problem

from seedling.quant.act_order import ActOrder
from seedling.quant.initial import min_max
from seedling.quant.rounding import COLUMNS, gptq_codes, spread_of


def plain_gptq(w_K: np.ndarray, H_KK: np.ndarray, scale_K: np.ndarray, zero_K: np.ndarray, top: int) -> np.ndarray:
    """Optimal brain quantisation in a given order: H's inverse is made anew for the columns that are left."""
    w_K, codes_K = w_K.copy(), np.zeros_like(w_K)
    for k in range(len(w_K)):
        inverse = np.linalg.inv(H_KK[k:, k:])
        codes_K[k] = np.clip(np.floor((w_K[k] - zero_K[k]) / scale_K[k] + 0.5), 0, top)
        error = w_K[k] - (scale_K[k] * codes_K[k] + zero_K[k])
        w_K[k:] -= error / inverse[0, 0] * inverse[0]
    return codes_K


@pytest.mark.parametrize("cols", [1, 20, COLUMNS + 7])
def test_blocks_round_as_one_column_at_a_time_does(cols):
    problem = random_problem(5, cols, bits=3, group_size=16)
    ordered, (scale_NG, zero_NG) = ActOrder(problem), min_max(problem)
    codes_NK = ordered.restored(gptq_codes(ordered.weight_KN, ordered.grid(scale_NG, zero_NG), ordered.spread_KK))
    H_KK = problem.hessian_KK.double()
    H_KK.diagonal().add_(0.01 * H_KK.diagonal().mean())
    order_K = ordered.order_K
    for row in range(5):
        wanted = plain_gptq(
            problem.weight_NK[row, order_K].double().numpy(),
            H_KK[order_K][:, order_K].numpy(),
            scale_NG[row, problem.group_of_column_K[order_K]].double().numpy(),
            zero_NG[row, problem.group_of_column_K[order_K]].double().numpy(),
            problem.top,
        )
        assert codes_NK[row, order_K].tolist() == wanted.tolist()


def test_columns_go_by_falling_diagonal():
    problem = random_problem(2, 12)
    diagonal_K = problem.hessian_KK.diagonal()[ActOrder(problem).order_K]
    assert (diagonal_K.diff() <= 0).all()


def test_the_spread_is_a_row_of_the_inverse_for_the_columns_that_are_left():
    hessian_KK, order_K = (
        random_problem(2, 12).hessian_KK,
        torch.randperm(12, generator=torch.Generator().manual_seed(0)),
    )
    spread_KK = spread_of(hessian_KK, order_K)
    damped_KK = hessian_KK.double()[order_K][:, order_K]
    damped_KK.diagonal().add_(0.01 * damped_KK.diagonal().mean())
    for k in range(12):
        inverse_K = torch.linalg.inv(damped_KK[k:, k:])[0]
        torch.testing.assert_close(spread_KK[k, k:].double(), inverse_K / inverse_K[0], rtol=1e-5, atol=1e-5)
    assert spread_KK.tril(-1).abs().max() == 0


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(ValueError, match="far from positive definite"):
        spread_of(torch.diag(torch.tensor([1.0, -1e6])), torch.arange(2))
