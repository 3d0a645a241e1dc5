"""Dequantising in chunks for the library's product, and the dequantised weight by itself."""

import pytest
import torch

pytest.importorskip("triton")

from fused_products import DEVICE, Case, assert_nothing_is_written_outside
from packed_weights import explicit, random_weight

from seedling.kernels.w2a16.large import dequantise_triton, large_batch

TYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "N, K, bits, group_size",
    [(1, 1, 2, 64), (37, 300, 2, 64), (64, 97, 2, 32), (48, 150, 4, 48), (33, 257, 2, -1), (16, 200, 4, 96)],
)
def test_the_weight_is_scale_times_code_plus_zero_rounded_once(N, K, bits, group_size, scales, dtype):
    weight = random_weight(N, K, bits=bits, group_size=group_size, dtype=scales, device=DEVICE)
    found = dequantise_triton(weight.codes, weight.scale_zero_GN2, K, bits=bits, group_size=group_size, dtype=dtype)
    exact = explicit(torch.eye(K, dtype=torch.float64, device=DEVICE), weight, weight.scale_zero_GN2.double()).T
    assert found.dtype == dtype and found.shape == (N, K)
    # Half an ulp of the type, and of float32 where terms cancel.
    unit, float32 = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps
    size = exact.abs() * unit * 1.01 + 16 * weight.scale_zero_GN2.abs().max() * float32
    assert ((found - exact).abs() <= size).all()


def test_a_part_is_as_it_is_in_the_whole():
    weight = random_weight(80, 130, device=DEVICE)
    form = {"bits": 2, "group_size": 64, "dtype": TYPES[0]}
    whole = dequantise_triton(weight.codes, weight.scale_zero_GN2, 130, **form)
    part = dequantise_triton(weight.codes, weight.scale_zero_GN2, 130, first=32, last=61, **form)
    assert torch.equal(part, whole[32:61])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("N", [150, 64])
def test_a_product_in_chunks_is_as_exact_as_torch(N, dtype):
    case = Case(9, N, 100, dtype=dtype, bias=N == 150)
    case.assert_as_exact_as_torch(case.run(large_batch, scratch_bytes=64 * 100 * 4))


def test_nothing_is_written_outside(monkeypatch):
    assert_nothing_is_written_outside(monkeypatch, Case(5, 70, 75, dtype=TYPES[0]), large_batch)
