"""How codes lie in bytes: plane by plane, so that what a kernel reads together it also multiplies together.

K columns are cut into spans of P, a span into planes, which are runs of neighbouring columns. Row (t * R + i) of the
packed tensor, R = P / planes, holds in its bits [b * j, b * (j + 1)) the code of column t * P + j * R + i: one load of
[R, BN] bytes yields `planes` slabs, each a contiguous slice of columns, to be multiplied with contiguous slices of the
activations. Neither a redundant load nor an interleave is needed.

    bits    tensors               planes a byte    packed rows
    2       one of 2 bits         4                Kp / 4
    3       2 bits over 1 bit     4 and 8          Kp / 4 + Kp / 8: the low two bits of all columns, then the high bit
    4       one of 4 bits         2                Kp / 2
    8       one of 8 bits         1                Kp

A plane has R columns and must not straddle a group, or a slab would need two scales: R is 64, or 32 or 16 where the
group size is a multiple of no more (groups of 32, 96; of 48, 80). Other group sizes are refused: a tensor core takes no
slice of fewer than 16. So P is 256 at 2 and 3 bits for groups of 64, 128 and per channel, and 128 for groups of 32. The
1-bit planes of 3 bits are half as wide: both tensors have the same spans.

K is rounded up to Kp, a multiple of P. Codes there are 0, and whoever multiplies takes activations there as 0.
Shape letters: N output channels, K input channels, Kp the same padded, R rows of a span.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .groups import check_bits, group_count

WIDEST_PLANE, NARROWEST_PLANE = 64, 16  # columns


def plane_columns(group_size: int) -> int:
    """Return how many columns a plane has, 64, 32 or 16; ValueError where every plane would straddle a group."""
    group_count(1, group_size)
    width = WIDEST_PLANE
    while group_size != -1 and group_size % width:
        width //= 2
        if width < NARROWEST_PLANE:
            raise ValueError(
                f"group_size {group_size} cannot be packed: kernels read {NARROWEST_PLANE} columns of one group at a "
                f"time; use a multiple of {NARROWEST_PLANE} (64 is usual), or -1 for one group per row"
            )
    return width


def span(bits: int, group_size: int) -> int:
    """Return P, the columns that one run of packed rows holds; padding goes up to a multiple of it."""
    check_bits(bits)
    return plane_columns(group_size) * {2: 4, 3: 4, 4: 2, 8: 1}[bits]


def padded_columns(K: int, *, bits: int, group_size: int) -> int:
    """Return Kp, K rounded up to a multiple of P."""
    P = span(bits, group_size)
    return -(-K // P) * P


def packed_rows(K: int, *, bits: int, group_size: int) -> int:
    """Return Kp * bits / 8."""
    return padded_columns(K, bits=bits, group_size=group_size) * bits // 8


def pack_codes(codes_NK: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Return uint8 [Kp * bits / 8, N] on the device of codes_NK (uint8, below 2^bits)."""
    P, K = span(bits, group_size), codes_NK.shape[1]
    padding = padded_columns(K, bits=bits, group_size=group_size) - K
    codes_KN = torch.nn.functional.pad(codes_NK, (0, padding)).T
    return torch.cat([_pack(codes_KN >> low, width, P) for low, width in _fields(bits)])


def unpack_codes(packed: Tensor, K: int, *, bits: int, group_size: int) -> Tensor:
    """Return codes_NK, uint8 and contiguous, of what pack_codes made."""
    return unpack_columns(packed, 0, K, K=K, bits=bits, group_size=group_size).T.contiguous()


def unpack_columns(packed: Tensor, first: int, last: int, *, K: int, bits: int, group_size: int) -> Tensor:
    """Return the codes of columns first .. last - 1 of K, as they lie: transposed, codes_kN. `first` begins a span."""
    P, Kp = span(bits, group_size), padded_columns(K, bits=bits, group_size=group_size)
    assert first % P == 0, f"column {first} begins no span of {P}"
    end = -(-last // P) * P
    codes_kN, above = None, 0
    for low, width in _fields(bits):
        rows = packed[above + first * width // 8 : above + end * width // 8]
        field_kN = _unpack(rows, width, P)
        codes_kN = field_kN if codes_kN is None else codes_kN | field_kN << low
        above += Kp * width // 8
    assert codes_kN is not None
    return codes_kN[: last - first]


def _fields(bits: int) -> Iterator[tuple[int, int]]:
    """Yield (lowest bit, width) of each tensor that codes are split into."""
    yield from [(0, 2), (2, 1)] if bits == 3 else [(0, bits)]


def _pack(codes_KN: Tensor, width: int, P: int) -> Tensor:
    """Return the lowest `width` bits of codes, their number a multiple of P, plane-packed: [K * width / 8, N]."""
    if width == 8:
        return codes_KN.contiguous()
    planes_SJRN = (codes_KN & 2**width - 1).unflatten(0, (-1, 8 // width, P * width // 8))
    packed_SRN = planes_SJRN[:, 0].clone()
    for plane in range(1, 8 // width):
        packed_SRN |= planes_SJRN[:, plane] << plane * width
    return packed_SRN.flatten(0, 1)


def _unpack(packed_RN: Tensor, width: int, P: int) -> Tensor:
    """Return codes_KN of what _pack made."""
    if width == 8:
        return packed_RN
    packed_SRN = packed_RN.unflatten(0, (-1, P * width // 8))
    planes = [packed_SRN >> plane * width & 2**width - 1 for plane in range(8 // width)]
    return torch.stack(planes, dim=1).flatten(0, 2)
