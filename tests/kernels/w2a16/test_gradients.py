"""Gradients in Triton's interpreter against float64 autograd through scale * code + zero."""

import pytest
import torch
from packed_weights import explicit, random_weight

pytest.importorskip("triton")

from seedling.kernels.w2a16 import gradients as module
from seedling.kernels.w2a16 import reference
from seedling.kernels.w2a16.gradients import input_gradient, scale_zero_gradient

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter, not a GPU")
# M, N, K: one of each, primes, spans that end early, more than a block
SHAPES = [(1, 1, 1), (5, 7, 37), (33, 129, 300), (70, 40, 513)]
FORMATS = [(2, 64), (2, 32), (2, 96), (2, 48), (2, 128), (2, 512), (2, -1), (4, 64), (4, 32), (4, -1)]


def case(M: int, N: int, K: int, *, bits: int, group_size: int, dtype: torch.dtype):
    weight = random_weight(N, K, bits=bits, group_size=group_size, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x_MK, dy_MN = torch.randn(M, K, generator=generator).to(dtype), torch.randn(M, N, generator=generator).to(dtype)
    leaves = [value.double().requires_grad_() for value in (x_MK, weight.scale_zero_GN2)]
    wanted = torch.autograd.grad(explicit(leaves[0], weight, leaves[1]), leaves, dy_MN.double())
    return weight, x_MK, dy_MN, *wanted


def assert_near(found, wanted, *, name: str, tolerance: float):
    error, size = (found.double() - wanted).norm(), wanted.norm()
    assert found.shape == wanted.shape and error <= tolerance * size, f"{name}: error {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("bits, group_size", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_scales_zeros_and_inputs_are_those_of_autograd_in_float64(bits, group_size, dtype):
    for M, N, K in SHAPES:
        weight, x_MK, dy_MN, dx_MK, dscale_zero_GN2 = case(M, N, K, bits=bits, group_size=group_size, dtype=dtype)
        found = scale_zero_gradient(x_MK, dy_MN, weight.codes, bits=bits, group_size=group_size)
        assert found.dtype == torch.float32
        for index, name in enumerate(["dscale", "dzero"]):  # products of fp16 numbers are exact in float32
            name = f"{name} of {M} x {N} x {K}"
            assert_near(found[..., index], dscale_zero_GN2[..., index], name=name, tolerance=1e-5)
        found = input_gradient(dy_MN, weight.codes, weight.scale_zero_GN2, bits=bits, group_size=group_size, K=K)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-3
        assert_near(found, dx_MK, name=f"dx of {M} x {N} x {K}", tolerance=tolerance)


def test_chunks_of_columns_make_no_difference(monkeypatch):
    weight, _, dy_MN, _, _ = case(5, 24, 1100, bits=2, group_size=96, dtype=torch.float32)
    arguments = {"bits": 2, "group_size": 96, "K": 1100}
    whole = input_gradient(dy_MN, weight.codes, weight.scale_zero_GN2, **arguments)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 1)
    chunked = input_gradient(dy_MN, weight.codes, weight.scale_zero_GN2, **arguments)
    torch.testing.assert_close(chunked, whole)


def test_rows_that_lie_apart_and_columns_that_do_are_read_as_they_are():
    weight, x_MK, dy_MN, _, wanted = case(9, 24, 130, bits=2, group_size=64, dtype=torch.float32)
    wide_x, tall_dy = torch.full((9, 200), torch.nan), torch.empty(24, 9)
    wide_x[:, :130], tall_dy[:] = x_MK, dy_MN.T
    found = scale_zero_gradient(wide_x[:, :130], tall_dy.T, weight.codes, bits=2, group_size=64)
    assert_near(found, wanted, name="dscale_zero", tolerance=1e-5)


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("wants_scale_zero", [True, False])
def test_what_is_wanted_is_what_the_reference_gives_and_in_its_types(wants_x, wants_scale_zero):
    weight, x_MK, dy_MN, *_ = case(0, 24, 130, bits=2, group_size=64, dtype=torch.float32)
    for M in (0, 9):
        x_MK, dy_MN = torch.randn(M, 130).half(), torch.randn(M, 24).half()
        arguments = dy_MN, x_MK, weight.codes, weight.scale_zero_GN2, weight.layout
        wanted = {"wants_x": wants_x, "wants_scale_zero": wants_scale_zero}
        for found, other in zip(module.gradients(*arguments, **wanted), reference.gradients(*arguments, **wanted)):
            assert (found is None) == (other is None)
            if found is not None:
                assert found.dtype == other.dtype
                torch.testing.assert_close(
                    found, other, rtol=2e-3, atol=2e-3 * max(1.0, float(other.abs().max() if M else 0))
                )
