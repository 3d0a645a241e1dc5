"""The kernel for tens of tokens: in the interpreter in float32 and float16, on a GPU in bfloat16 and float16."""

import pytest
import torch

pytest.importorskip("triton")

from fused_products import DEVICE, Case, assert_nothing_is_written_outside

from seedling.kernels.w2a16.middle import middle_batch
from seedling.kernels.w2a16.settings import MiddleTile

ONE_PART, SPLIT = MiddleTile(32, 2, 4, 1, 1, 2), MiddleTile(16, 1, 8, 2, 1, 8)
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter, not a GPU")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "M, N, K, bits, group_size, tile",
    [
        (1, 1, 1, 2, 64, ONE_PART),
        (17, 37, 300, 2, 64, ONE_PART),
        (33, 64, 520, 2, 64, SPLIT),
        (18, 31, 97, 2, 32, SPLIT),
        (20, 48, 150, 2, 48, ONE_PART),
        (19, 64, 300, 2, -1, ONE_PART),
        (17, 48, 140, 4, 96, SPLIT),
        (31, 33, 200, 4, -1, SPLIT),
    ],
)
def test_it_is_as_exact_as_torch(M, N, K, bits, group_size, tile, dtype):
    case = Case(M, N, K, bits=bits, group_size=group_size, dtype=dtype, bias=M > 18)
    case.assert_as_exact_as_torch(case.run(middle_batch, tile=tile))


@interpreted
@pytest.mark.parametrize("tile", [ONE_PART, SPLIT])
@pytest.mark.parametrize("N", [29, 48])
def test_nothing_is_written_outside(monkeypatch, N, tile):
    assert_nothing_is_written_outside(monkeypatch, Case(19, N, 70), middle_batch, tile=tile)


def test_no_tokens_give_no_outputs():
    assert Case(0, 16, 64).run(middle_batch).shape == (0, 16)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4])
def test_on_a_gpu_it_is_as_exact_as_torch_and_the_same_twenty_times(dtype, bits):
    random = torch.Generator().manual_seed(bits)
    for group_size in (-1, 16, 32, 48, 64, 96, 128):
        M, N, K = (int(torch.randint(1, high, (1,), generator=random)) for high in (300, 3000, 5000))
        for width in (N, 16 * -(-N // 16)):
            case = Case(M, width, K, bits=bits, group_size=group_size, dtype=dtype, bias=M % 2 == 0)
            y_MN = case.run(middle_batch)
            case.assert_as_exact_as_torch(y_MN)
            assert all(torch.equal(case.run(middle_batch), y_MN) for _ in range(20)), case.name
