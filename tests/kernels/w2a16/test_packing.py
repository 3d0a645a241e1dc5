"""The layout of packed codes, against the formula of its specification taken byte by byte."""

import pytest
import torch

from seedling.kernels.w2a16.packing import pack_codes, packed_rows, padded_columns, plane_columns, span, unpack_codes
from seedling.kernels.w2a16.packing import unpack_columns as columns

BITS, GROUPS = (2, 3, 4, 8), (-1, 32, 48, 64, 96, 128, 512)


def codes_of(N: int, K: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (N, K), generator=torch.Generator().manual_seed(K), dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("N, K", [(1, 1), (1, 255), (3, 77), (17, 256), (2, 257), (5, 700)])
def test_unpacking_gives_the_codes_back(bits, group_size, N, K):
    codes_NK = codes_of(N, K, bits)
    packed = pack_codes(codes_NK, bits=bits, group_size=group_size)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_rows(K, bits=bits, group_size=group_size), N)
    assert torch.equal(unpack_codes(packed, K, bits=bits, group_size=group_size), codes_NK)


def field(packed, k: int, r: int, *, width: int, P: int) -> int:
    """The specification: row t * R + i, bits width * j and up, hold column t * P + j * R + i."""
    R = P * width // 8
    t, within = divmod(k, P)
    j, i = divmod(within, R)
    return int(packed[t * R + i, r]) >> width * j & (1 << width) - 1


@pytest.mark.parametrize("bits, group_size, P", [(2, 64, 256), (2, -1, 256), (2, 128, 256), (2, 32, 128), (4, 64, 128)])
def test_each_code_lies_where_the_layout_says(bits, group_size, P):
    codes_NK = codes_of(2, 600, bits)
    packed = pack_codes(codes_NK, bits=bits, group_size=group_size)
    assert span(bits, group_size) == P
    for k in range(600):
        for r in range(2):
            assert field(packed, k, r, width=bits, P=P) == codes_NK[r, k]


@pytest.mark.parametrize("group_size, P", [(64, 256), (32, 128)])
def test_three_bits_are_two_bits_over_one_bit(group_size, P):
    codes_NK = codes_of(2, 600, 3)
    packed = pack_codes(codes_NK, bits=3, group_size=group_size)
    low, high = packed.split([len(packed) * 2 // 3, len(packed) // 3])
    for k in range(600):
        assert field(low, k, 1, width=2, P=P) == codes_NK[1, k] & 3
        assert field(high, k, 1, width=1, P=P) == codes_NK[1, k] >> 2


def test_eight_bits_are_the_transposed_codes():
    codes_NK = codes_of(3, 128, 8)
    assert torch.equal(pack_codes(codes_NK, bits=8, group_size=64), codes_NK.T)


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_code_zero(bits):
    packed = pack_codes(torch.full((1, 1), 2**bits - 1, dtype=torch.uint8), bits=bits, group_size=64)
    Kp = padded_columns(1, bits=bits, group_size=64)
    unpacked = unpack_codes(packed, Kp, bits=bits, group_size=64)
    assert unpacked[0, 0] == 2**bits - 1 and not unpacked[0, 1:].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 80, 96, 128, 192, 256])
def test_no_plane_straddles_a_group(bits, group_size):
    width = plane_columns(group_size)
    for first in range(0, padded_columns(1000, bits=bits, group_size=group_size), width):
        assert first // group_size == (first + width - 1) // group_size
    assert span(bits, group_size) % width == 0


@pytest.mark.parametrize("group_size", [1, 8, 40, 100])
def test_a_group_that_kernels_could_not_read_is_refused(group_size):
    with pytest.raises(ValueError, match=f"group_size {group_size} cannot be packed.*multiple of 16"):
        pack_codes(torch.zeros(1, 64, dtype=torch.uint8), bits=2, group_size=group_size)


@pytest.mark.parametrize("bits", BITS)
def test_a_part_is_unpacked_as_it_is_in_the_whole(bits):
    codes_NK = codes_of(3, 1000, bits)
    packed, P = pack_codes(codes_NK, bits=bits, group_size=64), span(bits, 64)
    for first, last in ((0, 1), (0, P), (P, 2 * P + 3), (2 * P, 1000)):
        found = columns(packed, first, last, K=1000, bits=bits, group_size=64)
        assert torch.equal(found.T, codes_NK[:, first:last])
