"""Many tokens: the weight is dequantised some rows at a time into a scratch in the L2, for the library's GEMM.

With some hundred tokens a product is limited by the tensor cores, which the library's kernels use best; what is left
to save is the way of the dequantised weight through memory, 2 bytes a weight out and in again. Rows come in chunks of
about SCRATCH_BYTES, and every chunk overwrites the last one's scratch before it has left the cache.

Shape letters: M tokens, N output channels, K input channels, G groups per row, W warps, R columns of a plane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import added, decode_plane, load_words, slab, tile_rows, unit_of
from .launch import Weight, on_device
from .scales import scale_of, zero_of
from .settings import DEQUANTISE_CHANNELS, DEQUANTISE_WARPS, SCRATCH_BYTES


@triton.jit
def dequantise_kernel(
    codes_ptr,
    scale_zero_ptr,
    weight_ptr,
    first_channel,
    last_channel,
    N,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    RAGGED: tl.constexpr,
    FORM: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
    W: tl.constexpr,
    V: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write weight[channel - first_channel, column] of one span and 8 W V channels."""
    BN: tl.constexpr = 8 * W * V
    PLANES: tl.constexpr = 8 // BITS
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    span, block = tl.program_id(0), first_channel + tl.program_id(1) * BN
    lane_channels = (
        block + tl.arange(0, W)[None, :, None, None, None] * (8 * V) + tl.arange(0, 8)[None, None, :, None, None] * V
    )
    start = codes_ptr + span * R * tl.cast(N // 4 if EVEN else N, tl.int64)
    words = load_words(start, tile_rows(R, STEP), lane_channels, N, STEP, V, EVEN, FAST)
    channels = block + tl.arange(0, BN)
    channels = channels.reshape([W, 8, V // 2, 2]).permute(2, 0, 3, 1).reshape([BN])  # as slab has them
    within = channels < last_channel
    weight_rows = weight_ptr + (channels - first_channel)[:, None] * tl.cast(K, tl.int64)
    for plane in tl.static_range(PLANES):
        column = (span * PLANES + plane) * R
        if column < K:
            columns = column + tl.arange(0, R)
            group = column // GROUP if GROUP > 0 else 0
            both = tl.load(scale_zero_ptr + group * tl.cast(N, tl.int64) + channels, mask=within, other=0)
            decoded = slab(decode_plane(words, plane, BITS, DTYPE, FAST), R, W, V, STEP).to(tl.float32)
            code = decoded * unit_of(plane, BITS, DTYPE, FAST) - added(plane, BITS, DTYPE, FAST)
            weight = scale_of(both, FORM)[:, None] * code + zero_of(both, FORM)[:, None]
            tl.store(weight_rows + columns[None, :], weight.to(DTYPE), mask=within[:, None] & (columns < K)[None, :])


def dequantise_triton(
    codes: Tensor,
    scale_zero_GN2: Tensor,
    K: int,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    first: int = 0,
    last: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return w_NK = scale * code + zero in `dtype`, of channels first .. last - 1 (all of them by default).

    Computed in float32 and rounded once. `out` is a contiguous tensor to write into.
    """
    weight = Weight.of(codes, scale_zero_GN2, K, bits=bits, group_size=group_size, dtype=dtype)
    last = weight.N if last is None else last
    out = codes.new_empty(last - first, K, dtype=dtype) if out is None else out
    if out.numel():
        grid = (triton.cdiv(K, weight.span), triton.cdiv(last - first, 8 * DEQUANTISE_WARPS * DEQUANTISE_CHANNELS))
        with on_device(codes):
            dequantise_kernel[grid](
                weight.codes,
                weight.both_GN,
                out,
                first,
                last,
                weight.N,
                K,
                **weight.constants,
                W=DEQUANTISE_WARPS,
                V=DEQUANTISE_CHANNELS,
                STEP=8,
                num_warps=DEQUANTISE_WARPS,
            )
    return out


def large_batch(
    x_MK: Tensor,
    codes: Tensor,
    scale_zero_GN2: Tensor,
    bias_N: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """Return x W~^T + b, y_MN in the type of x."""
    (M, K), N = x_MK.shape, codes.shape[1]
    y_MN = x_MK.new_empty(M, N)
    if not y_MN.numel():
        return y_MN
    rows = min(N, max(64, scratch_bytes // (K * x_MK.element_size()) // 64 * 64))
    scratch_nK = x_MK.new_empty(rows, K)
    for first in range(0, N, rows):
        last = min(first + rows, N)
        weight_nK = dequantise_triton(
            codes,
            scale_zero_GN2,
            K,
            bits=bits,
            group_size=group_size,
            dtype=x_MK.dtype,
            first=first,
            last=last,
            out=scratch_nK[: last - first],
        )
        if bias_N is None:
            torch.mm(x_MK, weight_nK.T, out=y_MN[:, first:last])
        else:
            torch.addmm(bias_N[first:last], x_MK, weight_nK.T, out=y_MN[:, first:last])
    return y_MN
