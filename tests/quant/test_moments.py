"""InputMoments: numpy's X^T X / n over valid tokens, whatever padding holds; one clear error for what is not finite.

Shape letters: n tokens, K channels.
"""

import numpy as np
import pytest
import torch

from seedling.quant.moments import InputMoments


def inputs(K=7, *, seed=0):
    """Batches [2, T, K] with masks; channels differ a thousandfold in size and have means."""
    draws = np.random.default_rng(seed)
    size_K = np.logspace(-2, 1, K)
    batches = [(draws.standard_normal((2, T, K)) + 0.5) * size_K for T in (1, 5, 1300)]
    masks = [np.arange(x.shape[1]) < np.array([[x.shape[1]], [max(1, x.shape[1] // 2)]]) for x in batches]
    return [x.astype(np.float32) for x in batches], masks


def expected(batches, masks):
    x_nK = np.concatenate([x[mask] for x, mask in zip(batches, masks)]).astype(np.float64)
    return x_nK.T @ x_nK / len(x_nK), len(x_nK)


@pytest.mark.parametrize("arithmetic, tolerance", [("float64", 1e-13), ("float32", 1e-6)])
@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan"), float("inf")])
def test_moments_are_those_of_valid_tokens_whatever_padding_holds(arithmetic, tolerance, padding):
    batches, masks = inputs()
    moments = InputMoments(7, name="layer", arithmetic=arithmetic)
    for number, (x, mask) in enumerate(zip(batches, masks)):
        filled = np.where(mask[..., None], x, np.float32(padding))
        moments.add(torch.from_numpy(filled), torch.from_numpy(mask), batch=number)
    H_KK, n = expected(batches, masks)
    assert moments.count == n
    scale_KK = np.sqrt(np.outer(np.diag(H_KK), np.diag(H_KK)))
    assert (np.abs(moments.mean_KK().numpy() - H_KK) / scale_KK).max() < tolerance


def test_without_a_mask_every_token_counts_and_any_leading_shape_is_the_same():
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    one, other = InputMoments(5, name="a"), InputMoments(5, name="b")
    one.add(x)
    other.add(x.reshape(6, 5))
    assert one.count == 6 and torch.equal(one.mean_KK(), other.mean_KK())
    np.testing.assert_allclose(one.mean_KK(), x.reshape(6, 5).double().T @ x.reshape(6, 5).double() / 6, rtol=1e-14)


def test_a_large_count_does_not_lose_small_tokens():
    """A float32 running sum would stop at 2^24 ones."""
    moments = InputMoments(1, name="layer", arithmetic="float32")
    moments.add(torch.full((1, 1), 2.0**13))
    for _ in range(3):
        moments.add(torch.ones(1000, 1))
    assert moments.mean_KK().item() == pytest.approx((2.0**26 + 3000) / 3001, rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_with_layer_and_first_batch(value):
    moments = InputMoments(3, name="llm.layers.1.mlp.up_proj")
    for number in range(5):
        x = torch.ones(4, 3)
        if number in (2, 4):
            x[1, 2] = value
        moments.add(x, batch=number)
    with pytest.raises(ValueError, match=r"^llm\.layers\.1\.mlp\.up_proj: .*calibration batch 2; "):
        moments.mean_KK()


class TwoRanks:
    """Two ranks in one process: what both bring is known beforehand."""

    size = 2

    def __init__(self, moments):
        self.moments, self.asked = moments, []

    def gather(self, value):
        return [one._not_finite() for one in self.moments]

    def sum_floats(self, values):
        self.asked.append(values)
        if values.shape == (1,):
            return torch.tensor([float(sum(one.count for one in self.moments))], dtype=torch.float64)
        return sum(one.sum_KK for one in self.moments)


def test_moments_of_two_ranks_are_those_of_all_their_tokens():
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    whole, first, second = (InputMoments(4, name="layer") for _ in range(3))
    whole.add(x)
    first.add(x[:3])
    second.add(x[3:])
    first.merge(TwoRanks([first, second]))
    assert first.count == 10
    np.testing.assert_allclose(first.mean_KK(), whole.mean_KK(), rtol=1e-14)


def test_nan_on_another_rank_is_an_error_on_this_one():
    first, second = InputMoments(2, name="layer"), InputMoments(2, name="layer")
    first.add(torch.ones(1, 2), batch=0)
    second.add(torch.full((1, 2), float("nan")), batch=1)
    with pytest.raises(ValueError, match=r"layer: .*batch 1"):
        first.merge(TwoRanks([first, second]))


def test_no_token_gives_zeros():
    assert not InputMoments(3, name="layer").mean_KK().any()


def test_an_unknown_arithmetic_is_refused():
    with pytest.raises(ValueError, match="arithmetic is 'half'"):
        InputMoments(3, name="layer", arithmetic="half")
