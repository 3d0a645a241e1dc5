"""Tens to a few hundred tokens: a tensor-core product whose weights are decoded into its left operand, in registers.

Each warp has channels of its own and the block walks over spans of columns; tokens are the narrow side of the
instruction, so that 32 of them cost half of 64. Every block of tokens decodes the weights again: what costs nothing
while memory is the limit is the price from about 128 tokens on. Where blocks of channels and tokens are too few for
the multiprocessors, `split` of them share the columns; their float32 partial sums are added in a fixed order.

Shape letters: M tokens, N output channels, K input channels, G groups per row, W warps, R columns of a plane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import added, decode_plane, load_words, slab, tile_rows, unit_of
from .launch import Weight, hardware_of, on_device, with_rows
from .scales import scale_of, zero_of
from .settings import MiddleTile, middle_tile
from .split import sum_parts
from .sums import plane_sums


@triton.jit
def middle_kernel(
    x_ptr,
    sums_ptr,
    codes_ptr,
    scale_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a group; 0 where a row is one group
    R: tl.constexpr,
    EVEN: tl.constexpr,
    RAGGED: tl.constexpr,  # K is no multiple of R
    FORM: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    W: tl.constexpr,
    V: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    BN: tl.constexpr = 8 * W * V
    PLANES: tl.constexpr = 8 // BITS
    P: tl.constexpr = PLANES * R
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    block, part = tl.program_id(0), tl.program_id(2)
    channels = block * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    lane_channels = (
        block * BN
        + tl.arange(0, W)[None, :, None, None, None] * (8 * V)
        + tl.arange(0, 8)[None, None, :, None, None] * V
    )
    rows = tile_rows(R, STEP)
    x_offsets = tokens[None, :] * x_stride + tl.arange(0, R)[:, None]
    y = tl.zeros([BN, BM], tl.float32)

    for span in tl.range(part, tl.cdiv(K, P), SPLIT, num_stages=STAGES):
        start = codes_ptr + span * R * tl.cast(N // 4 if EVEN else N, tl.int64)
        words = load_words(start, rows, lane_channels, N, STEP, V, EVEN, FAST)
        for plane in tl.static_range(PLANES):
            column = span * P + plane * R
            there = column + tl.arange(0, 1) < K
            within = (tokens < M)[None, :] & there[:, None]
            if RAGGED:
                within &= column + tl.arange(0, R)[:, None] < K
            x = tl.load(x_ptr + column + x_offsets, mask=within, other=0)
            sums = tl.load(sums_ptr + column // R * M + tokens, mask=(tokens < M) & there, other=0)
            if plane == 0 or (GROUP > 0 and GROUP % P != 0):
                group = column // GROUP if GROUP > 0 else 0
                both = tl.load(scale_zero_ptr + group * N + channels, mask=(channels < N) & there, other=0)
                both = both.reshape([W, 8, V // 2, 2]).permute(2, 0, 3, 1).reshape([BN])
                scale, zero = scale_of(both, FORM), zero_of(both, FORM)
            weights = slab(decode_plane(words, plane, BITS, DTYPE, FAST), R, W, V, STEP)
            y += (scale * unit_of(plane, BITS, DTYPE, FAST))[:, None] * tl.dot(weights, x, input_precision="ieee")
            y += (zero - scale * added(plane, BITS, DTYPE, FAST))[:, None] * sums[None, :]

    y = y.reshape([V // 2, W, 2, 8, BM]).permute(1, 3, 0, 2, 4).reshape([BN, BM])
    if SPLIT == 1 and bias_ptr is not None:
        y += tl.load(bias_ptr + channels, mask=channels < N, other=0).to(tl.float32)[:, None]
    out = out_ptr + (part * M + tokens)[None, :] * tl.cast(N, tl.int64) + channels[:, None]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(channels < N)[:, None] & (tokens < M)[None, :])


def middle_batch(
    x_MK: Tensor,
    codes: Tensor,
    scale_zero_GN2: Tensor,
    bias_N: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    tile: MiddleTile | None = None,
) -> Tensor:
    """Return x W~^T + b, y_MN in the type of x. `tile` stands in for what the table has."""
    (M, K), N = x_MK.shape, codes.shape[1]
    y_MN = x_MK.new_empty(M, N)
    if not y_MN.numel():
        return y_MN
    weight = Weight.of(codes, scale_zero_GN2, K, bits=bits, group_size=group_size, dtype=x_MK.dtype)
    tile = tile or middle_tile(M, N, K, span=weight.span, hardware=hardware_of(x_MK.device))
    x_MK = with_rows(x_MK)
    out = y_MN if tile.split == 1 else y_MN.new_empty(tile.split, M, N, dtype=torch.float32)
    with on_device(x_MK):
        middle_kernel[(triton.cdiv(N, 8 * tile.warps * tile.channels), triton.cdiv(M, tile.tokens), tile.split)](
            x_MK,
            plane_sums(x_MK, weight.plane),
            weight.codes,
            weight.both_GN,
            bias_N,
            out,
            M,
            N,
            K,
            x_MK.stride(0),
            **weight.constants,
            BM=tile.tokens,
            W=tile.warps,
            V=tile.channels,
            STEP=tile.step,
            SPLIT=tile.split,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
        return y_MN if tile.split == 1 else sum_parts(out, bias_N, y_MN)
