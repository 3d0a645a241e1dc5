"""A few tokens (M up to about 16): codes are read once, by warps that need nothing of one another.

Each warp has spans of columns of its own and the same 8 V channels; with codes decoded in registers (decode.py) it
multiplies a plane of R columns on the tensor core, weights as the left operand, so that 8 tokens fill an instruction
where rows of activations would be padded to 16. A decoded number is added_j + code in units of 2^field, so per plane j

    y += scale * sum(x code) + zero * sum(x) = scale 2^-field * dot + (zero - scale added_j) * sum(x)

in float32, where sum(x) is one more product, with ones: no pass over x before, no reduction across lanes. At the end
the warps of a block are summed, and with `split` blocks for the same channels their float32 partial sums by a second
kernel, in a fixed order: equal calls have equal results.

Shape letters: M tokens, N output channels, K input channels, G groups per row, S splits, W warps, R columns of a plane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import added, decode_plane, load_words, slab_of_warps, tile_channels, tile_rows, unit_of
from .launch import Operands, on_device
from .scales import scale_of, zero_of
from .settings import SmallTile, small_tile


@triton.jit
def small_kernel(
    x_ptr,
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
    FORM: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    W: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    BN: tl.constexpr = 8 * V
    PLANES: tl.constexpr = 8 // BITS
    P: tl.constexpr = PLANES * R
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    block, part = tl.program_id(0), tl.program_id(1)
    spans = tl.cdiv(K, P)

    warp = tl.arange(0, W)
    warp_tile = warp[None, :, None, None, None]
    channel_tile = block * BN + tile_channels(V)
    offsets = (warp_tile * R + tile_rows(R, WIDTH)) * N + channel_tile
    channels = block * BN + tl.arange(0, BN)
    tokens = tl.arange(0, BM)
    x_rows = x_ptr + tokens[None, None, :] * tl.cast(x_stride, tl.int64)
    ones = tl.full([W, 16, R], 1, DTYPE)
    y = tl.zeros([W, BN // 16, 16, BM], tl.float32)

    for first in tl.range(part * W, spans, SPLIT * W, num_stages=STAGES):
        mask = (channel_tile < N) & (first + warp_tile < spans)
        words = load_words(codes_ptr + first * R * tl.cast(N, tl.int64), offsets, mask, N, WIDTH, FAST)
        for plane in tl.static_range(PLANES):
            column = (first + warp) * P + plane * R
            columns = column[:, None, None] + tl.arange(0, R)[None, :, None]
            x = tl.load(x_rows + columns, mask=(tokens < M)[None, None, :] & (columns < K), other=0)
            if plane == 0 or (GROUP > 0 and (GROUP % P != 0)):
                group = column // GROUP if GROUP > 0 else column * 0
                both = tl.load(
                    scale_zero_ptr + group[:, None] * tl.cast(N, tl.int64) + channels[None, :],
                    mask=(channels < N)[None, :] & (column < K)[:, None],
                    other=0,
                )
                both = both.reshape([W, 8, V // 2, 2]).permute(0, 2, 3, 1).reshape([W, BN // 16, 16])
                scale, zero = scale_of(both, FORM), zero_of(both, FORM)
            weights = slab_of_warps(decode_plane(words, plane, BITS, DTYPE, FAST), R, W, V, WIDTH)
            products = tl.dot(weights, x, input_precision="ieee").reshape([W, BN // 16, 16, BM])
            sums = tl.dot(ones, x, input_precision="ieee")
            y += (scale * unit_of(plane, BITS, DTYPE, FAST))[:, :, :, None] * products
            y += (zero - scale * added(plane, BITS, DTYPE, FAST))[:, :, :, None] * sums[:, None, :, :]

    y = tl.sum(y, axis=0)
    y = y.reshape([V // 2, 2, 8, BM]).permute(2, 0, 1, 3).reshape([BN, BM])
    mask = (channels < N)[:, None] & (tokens < M)[None, :]
    if SPLIT == 1 and bias_ptr is not None:
        y += tl.load(bias_ptr + channels, mask=channels < N, other=0).to(tl.float32)[:, None]
    out = out_ptr + (part * M + tokens)[None, :] * tl.cast(N, tl.int64) + channels[:, None]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_parts(parts_ptr, bias_ptr, y_ptr, total, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y = parts[0] + parts[1] + ... + bias, in this order, over M * N elements."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < total
    y = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(parts_ptr + part * tl.cast(total, tl.int64) + element, mask=mask, other=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + element % N, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=mask)


def small_batch(
    x_MK: Tensor,
    codes: Tensor,
    scale_zero_GN2: Tensor,
    bias_N: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    tile: SmallTile | None = None,
) -> Tensor:
    """Return x W~^T + b, y_MN in the type of x. `tile` stands in for what the table has."""
    operands = Operands.of(x_MK, codes, scale_zero_GN2, bits=bits, group_size=group_size)
    M, N, K = operands.M, operands.N, operands.K
    y_MN = x_MK.new_empty(M, N)
    if not y_MN.numel():
        return y_MN
    tile = tile or small_tile(M, N, K, bits=bits, plane=operands.plane, hardware=operands.hardware)
    out = y_MN if tile.split == 1 else y_MN.new_empty(tile.split, M, N, dtype=torch.float32)
    with on_device(x_MK):
        small_kernel[(triton.cdiv(N, 8 * tile.channels), tile.split)](
            operands.x_MK,
            codes,
            operands.both_GN,
            bias_N,
            out,
            M,
            N,
            K,
            operands.x_MK.stride(0),
            **operands.constants,
            BM=tile.tokens,
            W=tile.warps,
            V=tile.channels,
            WIDTH=tile.width,
            SPLIT=tile.split,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
        if tile.split > 1:
            sum_parts[(triton.cdiv(M * N, 1024),)](out, bias_N, y_MN, M * N, N, SPLIT=tile.split, BLOCK=1024)
    return y_MN
