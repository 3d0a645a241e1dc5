"""Sums of activations over the columns of each plane, in float32: what takes the offsets of decoded numbers out again.

    y[n] = sum over planes of  scale * sum(x code) + zero * sum(x)
         = sum over planes of  scale 2^-field * sum(x decoded) + (zero - scale added) * sum(x)

A plane (packing.py) lies in one group and is read at one field of the mantissa (decode.py), so one sum a plane serves.
Shape letters: M tokens, K input channels, J planes, R columns of a plane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sums_kernel(x_ptr, sums_ptr, M, K, x_stride, R: tl.constexpr, BM: tl.constexpr):
    plane, tokens = tl.program_id(0), tl.program_id(1) * BM + tl.arange(0, BM)
    columns = plane * R + tl.arange(0, R)
    rows = tokens[:, None] * tl.cast(x_stride, tl.int64)
    x = tl.load(x_ptr + rows + columns[None, :], mask=(tokens < M)[:, None] & (columns < K)[None, :], other=0)
    tl.store(sums_ptr + plane * M + tokens, tl.sum(x.to(tl.float32), axis=1), mask=tokens < M)


def plane_sums(x_MK: Tensor, plane: int) -> Tensor:
    """Return sums_JM, float32, J = ceil(K / plane); rows of x are contiguous."""
    M, K = x_MK.shape
    sums_JM = x_MK.new_empty(triton.cdiv(K, plane), M, dtype=torch.float32)
    block = 16
    sums_kernel[(sums_JM.shape[0], triton.cdiv(M, block))](
        x_MK, sums_JM, M, K, x_MK.stride(0), R=plane, BM=block, num_warps=1
    )
    return sums_JM
