"""Gradients of a packed layer whose integers are frozen: of scales and zeros, and of the activations.

    dscale[j, r] = sum of dW[r, k] * code[r, k]        over the columns k of group j, dW = dy^T x
    dzero[j, r]  = sum of dW[r, k]
    dx = dy W~

dW would be as large as the weight in 16 bits. Here a block makes a tile of it, of one span of columns and some
channels, in registers; multiplies it with its codes; and stores two sums a plane and channel. A plane lies within a
group, so that what is left is to add planes, in a fixed order: equal calls have equal results.

For dx the weight is decoded a chunk of columns at a time into scratch memory that stays in the L2 cache, and multiplied
by the library: [M, N] x [N, k]. Chunks of channels, as large.py has them, would leave partial sums to be rounded.

Shape letters: M positions, N output channels, K input channels, G groups per row, S spans, P columns of a span, R
columns of a plane (packing.py), k the columns of a chunk; BM, BN and so on are sizes of blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import group_columns, group_sums
from .layout import Layout
from .packing import plane_columns, span
from .scales import both_at_once, scale_of, zero_of

SCRATCH_BYTES = 16 << 20  # of decoded weights: a third of the L2 cache of an H100


@triton.jit
def scale_zero_gradient_kernel(
    x_ptr, dy_ptr, codes_ptr, sums_ptr, M, N, K, x_stride, dy_stride,
    BITS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store, for each plane of one span and BN channels, the sums over its columns of dW * code and of dW."""
    PLANES: tl.constexpr = P // R
    k_P = tl.program_id(0) * P + tl.arange(0, P)
    n_N = tl.program_id(1) * BN + tl.arange(0, BN)
    m_M = tl.arange(0, BM)
    dweight_NP = tl.zeros([BN, P], tl.float32)
    for row in range(0, M, BM):
        m = (row + m_M)[:, None]
        dy_MN = tl.load(dy_ptr + m.to(tl.int64) * dy_stride + n_N, mask=(m < M) & (n_N < N), other=0)
        x_MP = tl.load(x_ptr + m.to(tl.int64) * x_stride + k_P, mask=(m < M) & (k_P < K), other=0)
        dweight_NP = tl.dot(tl.trans(dy_MN), x_MP, dweight_NP, input_precision="ieee")
    # Columns lie along the right operand: a thread has 16 of a plane's 64, and three others of its warp have the rest.
    dweight_NLR = tl.reshape(dweight_NP, (BN, PLANES, R))
    byte_row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    bytes_NR = tl.load(codes_ptr + byte_row[None, :] * N + n_N[:, None], mask=(n_N < N)[:, None], other=0)
    planes = tl.arange(0, PLANES)
    codes_NLR = bytes_NR.to(tl.int32)[:, None, :] >> (planes * BITS)[None, :, None] & 2**BITS - 1
    dscale_NL = tl.sum(dweight_NLR * codes_NLR.to(tl.float32), 2)
    dzero_NL = tl.sum(dweight_NLR, 2)
    planes += tl.program_id(0) * PLANES
    at_NL = sums_ptr + (planes.to(tl.int64)[None, :] * N + n_N[:, None]) * 2
    kept = (planes * R < K)[None, :] & (n_N < N)[:, None]
    tl.store(at_NL, dscale_NL, mask=kept)
    tl.store(at_NL + 1, dzero_NL, mask=kept)


def scale_zero_gradient(x_MK: Tensor, dy_MN: Tensor, codes: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Return dscale_zero_GN2 in float32, at 2 and 4 bits (8 works as well). x and dy have one type."""
    (M, K), N = x_MK.shape, dy_MN.shape[1]
    x_MK, dy_MN = _rows(x_MK), _rows(dy_MN.to(x_MK.dtype))
    P, R = span(bits, group_size), plane_columns(group_size)
    planes = triton.cdiv(K, R)
    sums_LN2 = torch.empty(planes, N, 2, dtype=torch.float32, device=x_MK.device)
    BM, BN, warps, stages = (64, 128, 8, 3) if x_MK.dtype.itemsize == 2 else (16, 32, 4, 2)
    scale_zero_gradient_kernel[(triton.cdiv(K, P), triton.cdiv(N, BN))](
        x_MK, dy_MN, codes, sums_LN2, M, N, K, x_MK.stride(0), dy_MN.stride(0),
        BITS=bits, P=P, R=R, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return group_sums(sums_LN2, -1 if group_size == -1 else group_size // R, dim=0)


@triton.jit
def decode_columns_kernel(
    codes_ptr, both_ptr, weight_ptr, first_span, N, K, columns_of_group,
    FORM: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store weights, scale * code + zero rounded to the type of the scratch, of BR rows of bytes and BN channels.

    8 bytes a thread are loaded and 8 weights a plane stored, so that none has to change threads in between.
    """
    t = tl.program_id(0) // (R // BR)
    i_R = (tl.program_id(0) % (R // BR) * BR + tl.arange(0, BR))[:, None]
    n_N = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (n_N < N)[None, :]
    at_RN = i_R * N + n_N[None, :]
    bytes_RN = tl.load(codes_ptr + ((first_span + t) * R).to(tl.int64) * N + at_RN, mask=inside, other=0)
    for plane in tl.static_range(P // R):
        k = (first_span + t) * P + plane * R
        group = tl.minimum(k, K - 1) // columns_of_group
        both_N = tl.load(both_ptr + group.to(tl.int64) * N + n_N, mask=n_N < N, other=0)
        codes_RN = (bytes_RN.to(tl.int32) >> (plane * BITS)) & (2**BITS - 1)
        weight_RN = codes_RN.to(tl.float32) * scale_of(both_N, FORM)[None, :] + zero_of(both_N, FORM)[None, :]
        weight_kN = weight_ptr + (t * P + plane * R).to(tl.int64) * N
        tl.store(weight_kN + at_RN, weight_RN.to(weight_ptr.dtype.element_ty), mask=inside & (k + i_R < K))


def input_gradient(
    dy_MN: Tensor, codes: Tensor, scale_zero_GN2: Tensor, *, bits: int, group_size: int, K: int
) -> Tensor:
    """Return dx_MK in the type of dy."""
    (M, N), dtype = dy_MN.shape, dy_MN.dtype
    P, R, BR, BN = span(bits, group_size), plane_columns(group_size), 16, 128
    both_GN, form = both_at_once(scale_zero_GN2)
    spans = max(1, SCRATCH_BYTES // (N * P * dtype.itemsize))
    dx_MK = torch.empty(M, K, dtype=dtype, device=dy_MN.device)
    scratch_kN = torch.empty(min(spans * P, triton.cdiv(K, P) * P), N, dtype=dtype, device=dy_MN.device)
    for first in range(0, K, spans * P):
        last = min(first + spans * P, K)
        grid = (triton.cdiv(last - first, P) * (R // BR), triton.cdiv(N, BN))
        decode_columns_kernel[grid](
            codes, both_GN, scratch_kN, first // P, N, K, group_columns(K, group_size),
            FORM=form, BITS=bits, P=P, R=R, BR=BR, BN=BN, num_warps=8,
        )  # fmt: skip
        dx_MK[:, first:last] = dy_MN @ scratch_kN[: last - first].T
    return dx_MK


def gradients(
    dy_nN: Tensor,
    x_nK: Tensor,
    codes: Tensor,
    scale_zero_GN2: Tensor,
    layout: Layout,
    *,
    wants_x: bool,
    wants_scale_zero: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx_nK in the type of x and dscale_zero_GN2 in that of the scales, as reference.gradients does."""
    _, K, bits, group_size = layout
    dx_nK = dscale_zero_GN2 = None
    if wants_x:
        dy = dy_nN.to(x_nK.dtype)
        dx_nK = input_gradient(dy, codes, scale_zero_GN2, bits=bits, group_size=group_size, K=K)
    if wants_scale_zero:
        dscale_zero_GN2 = scale_zero_gradient(x_nK, dy_nN, codes, bits=bits, group_size=group_size)
        dscale_zero_GN2 = dscale_zero_GN2.to(scale_zero_GN2.dtype)
    return dx_nK, dscale_zero_GN2


def _rows(values: Tensor) -> Tensor:
    """Return values with neighbouring columns side by side in memory; rows may be apart."""
    return values if values.stride(-1) == 1 else values.contiguous()
