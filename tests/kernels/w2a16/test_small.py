"""The kernel for a few tokens: in the interpreter in float32 and float16, on a GPU in bfloat16 and float16."""

import pytest
import torch

pytest.importorskip("triton")

from fused_products import DEVICE, Case, assert_nothing_is_written_outside

from seedling.kernels.w2a16.settings import SmallTile
from seedling.kernels.w2a16.small import small_batch

ONE_BLOCK, SPLIT = SmallTile(8, 2, 8, 1, 1, 2), SmallTile(16, 2, 4, 2, 1, 8)
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter, not a GPU")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "M, N, K, bits, group_size, tile",
    [
        (1, 1, 1, 2, 64, ONE_BLOCK),
        (3, 37, 300, 2, 64, ONE_BLOCK),
        (8, 48, 520, 2, 64, SPLIT),
        (11, 31, 97, 2, 32, SPLIT),
        (5, 16, 150, 2, 48, ONE_BLOCK),
        (2, 33, 257, 2, 96, ONE_BLOCK),
        (1, 64, 400, 2, 128, SPLIT),
        (1, 64, 300, 2, -1, ONE_BLOCK),
        (7, 17, 140, 4, 64, SPLIT),
        (2, 32, 64, 4, 16, ONE_BLOCK),
        (2, 48, 300, 4, -1, SPLIT),
    ],
)
def test_it_is_as_exact_as_torch(M, N, K, bits, group_size, tile, dtype):
    case = Case(M, N, K, bits=bits, group_size=group_size, dtype=dtype, bias=M > 1)
    case.assert_as_exact_as_torch(case.run(small_batch, tile=tile))


@interpreted
def test_the_table_has_a_tile_for_every_shape():
    case = Case(2, 40, 300)
    case.assert_as_exact_as_torch(case.run(small_batch))


@interpreted
@pytest.mark.parametrize("tile", [ONE_BLOCK, SPLIT])
@pytest.mark.parametrize("N", [29, 32])
def test_nothing_is_written_outside(monkeypatch, N, tile):
    assert_nothing_is_written_outside(monkeypatch, Case(3, N, 270), small_batch, tile=tile)


@interpreted
def test_rows_of_activations_may_lie_apart_and_columns_too():
    case = Case(3, 16, 70)
    y_MN = case.run(small_batch, tile=ONE_BLOCK)
    wide = torch.full((3, 200), torch.nan)
    wide[:, 7:77] = case.x_MK
    tall = case.x_MK.T.contiguous().T
    for x_MK in (wide[:, 7:77], tall):
        case.x_MK = x_MK
        assert torch.equal(case.run(small_batch, tile=ONE_BLOCK), y_MN)


def test_no_tokens_give_no_outputs():
    assert Case(0, 16, 64).run(small_batch).shape == (0, 16)


def test_a_width_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="2 or 4 bits, not 8; use the reference"):
        Case(1, 16, 64, bits=8).run(small_batch)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4])
def test_on_a_gpu_it_is_as_exact_as_torch_and_the_same_twenty_times(dtype, bits):
    random = torch.Generator().manual_seed(bits)
    for group_size in (-1, 16, 32, 48, 64, 96, 128):
        M, N, K = (int(torch.randint(1, high, (1,), generator=random)) for high in (17, 3000, 5000))
        for width in (N, 16 * -(-N // 16)):
            case = Case(M, width, K, bits=bits, group_size=group_size, dtype=dtype, bias=M % 2 == 0)
            y_MN = case.run(small_batch)
            case.assert_as_exact_as_torch(y_MN)
            assert all(torch.equal(case.run(small_batch), y_MN) for _ in range(20)), case.name


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_activations_far_from_zero_cost_no_exactness(dtype):
    case = Case(4, 512, 4096, dtype=dtype, offset=100.0)
    case.assert_as_exact_as_torch(case.run(small_batch))
