"""A few tokens (M up to about 16): codes are read once, by warps that need nothing of one another.

Each warp has spans of columns of its own and the same 8 V channels; with codes decoded in registers (decode.py) it
multiplies a plane of R columns on the tensor core, weights as the left operand, so that 8 tokens fill an instruction
where rows of activations would be padded to 16. sums.py says how offsets and zeros come in. At the end the warps of a
block are summed, and with `split` blocks for the same channels their float32 partial sums by a second kernel, in a
fixed order: equal calls have equal results.

Shape letters: M tokens, N output channels, K input channels, G groups per row, W warps, R columns of a plane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import added, decode_plane, load_words, slab_of_warps, tile_rows, unit_of
from .launch import Weight, hardware_of, on_device, with_rows
from .scales import scale_of, zero_of
from .settings import SmallTile, small_tile
from .split import sum_parts
from .sums import plane_sums


@triton.jit
def small_kernel(
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
    BN: tl.constexpr = 8 * V
    PLANES: tl.constexpr = 8 // BITS
    P: tl.constexpr = PLANES * R
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    block, part = tl.program_id(0), tl.program_id(1)
    spans = tl.cdiv(K, P)

    warp = tl.arange(0, W)
    warp_tile = warp[None, :, None, None, None]
    channel_tile = block * BN + tl.arange(0, 8)[None, None, :, None, None] * V
    channels = block * BN + tl.arange(0, BN)
    tokens = tl.arange(0, BM)
    x_offsets = tokens[None, None, :] * x_stride + tl.arange(0, R)[None, :, None]
    y = tl.zeros([W, BN // 16, 16, BM], tl.float32)

    for first in tl.range(part * W, spans, SPLIT * W, num_stages=STAGES):
        # A warp that has no span left reads the last again, and multiplies it with nothing.
        rows = tl.minimum(warp_tile, spans - 1 - first) * R + tile_rows(R, STEP)
        start = codes_ptr + first * R * tl.cast(N // 4 if EVEN else N, tl.int64)
        words = load_words(start, rows, channel_tile, N, STEP, V, EVEN, FAST)
        for plane in tl.static_range(PLANES):
            column = (first + warp) * P + plane * R
            within = (tokens < M)[None, None, :] & (column < K)[:, None, None]
            if RAGGED:
                within &= column[:, None, None] + tl.arange(0, R)[None, :, None] < K
            x = tl.load(x_ptr + column[:, None, None] + x_offsets, mask=within, other=0)
            sums = tl.load(
                sums_ptr + (column // R)[:, None] * M + tokens[None, :],
                mask=(column < K)[:, None] & (tokens < M)[None, :],
                other=0,
            )
            if plane == 0 or (GROUP > 0 and (GROUP % P != 0)):
                group = column // GROUP if GROUP > 0 else column * 0
                both = tl.load(
                    scale_zero_ptr + group[:, None] * N + channels[None, :],
                    mask=(channels < N)[None, :] & (column < K)[:, None],
                    other=0,
                )
                both = both.reshape([W, 8, V // 2, 2]).permute(0, 2, 3, 1).reshape([W, BN // 16, 16])
                scale, zero = scale_of(both, FORM), zero_of(both, FORM)
            weights = slab_of_warps(decode_plane(words, plane, BITS, DTYPE, FAST), R, W, V, STEP)
            products = tl.dot(weights, x, input_precision="ieee").reshape([W, BN // 16, 16, BM])
            y += (scale * unit_of(plane, BITS, DTYPE, FAST))[:, :, :, None] * products
            offset = zero - scale * added(plane, BITS, DTYPE, FAST)
            y += offset[:, :, :, None] * sums[:, None, None, :]

    y = tl.sum(y, axis=0)
    y = y.reshape([V // 2, 2, 8, BM]).permute(2, 0, 1, 3).reshape([BN, BM])
    mask = (channels < N)[:, None] & (tokens < M)[None, :]
    if SPLIT == 1 and bias_ptr is not None:
        y += tl.load(bias_ptr + channels, mask=channels < N, other=0).to(tl.float32)[:, None]
    out = out_ptr + (part * M + tokens)[None, :] * tl.cast(N, tl.int64) + channels[:, None]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


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
    (M, K), N = x_MK.shape, codes.shape[1]
    y_MN = x_MK.new_empty(M, N)
    if not y_MN.numel():
        return y_MN
    weight = Weight.of(codes, scale_zero_GN2, K, bits=bits, group_size=group_size, dtype=x_MK.dtype)
    tile = tile or small_tile(M, N, K, span=weight.span, hardware=hardware_of(x_MK.device))
    x_MK = with_rows(x_MK)
    out = y_MN if tile.split == 1 else y_MN.new_empty(tile.split, M, N, dtype=torch.float32)
    with on_device(x_MK):
        small_kernel[(triton.cdiv(N, 8 * tile.channels), tile.split)](
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
