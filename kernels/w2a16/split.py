"""Partial products of blocks that share the columns of a weight, added in a fixed order: equal calls, equal results.

Atomic additions would come in any order, and a counter by which the last block knows that it is the last would be
state between calls, which two streams may not share. Shape letters: S parts, M tokens, N output channels.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def sum_kernel(parts_ptr, bias_ptr, y_ptr, total, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y = parts[0] + parts[1] + ... + bias, in this order, over M * N elements."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < total
    y = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(parts_ptr + part * tl.cast(total, tl.int64) + element, mask=mask, other=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + element % N, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=mask)


def sum_parts(parts_SMN: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> Tensor:
    """Return y = sum over S of parts, in float32, + bias, in the type of y."""
    split, M, N = parts_SMN.shape
    sum_kernel[(triton.cdiv(M * N, BLOCK),)](parts_SMN, bias_N, y_MN, M * N, N, SPLIT=split, BLOCK=BLOCK)
    return y_MN
