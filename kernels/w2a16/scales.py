"""Scale and zero of a group and channel: one load brings both, 4 bytes where they are stored in 16 bits, 8 where in 32.

Kernels read scale_zero_GN2 as integers [G, N]; the scale is the lower half of each (little-endian), the zero the upper.
Shape letters: N output channels, G groups per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def both_at_once(scale_zero_GN2: Tensor) -> tuple[Tensor, tl.dtype]:
    """Return the same bytes as integers [G, N], and the type of their halves."""
    integers = torch.int64 if scale_zero_GN2.dtype == torch.float32 else torch.int32
    return scale_zero_GN2.contiguous().view(integers).squeeze(-1), FORMS[scale_zero_GN2.dtype]


@triton.jit
def scale_of(both, FORM: tl.constexpr):
    """Return the scale in float32."""
    if tl.float32 == FORM:
        return both.to(tl.int32).to(tl.float32, bitcast=True)
    if tl.bfloat16 == FORM:  # the upper half of a float32
        return (both << 16).to(tl.float32, bitcast=True)
    return both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def zero_of(both, FORM: tl.constexpr):
    """Return the zero in float32."""
    if tl.float32 == FORM:
        return (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    if tl.bfloat16 == FORM:
        return (both & -65536).to(tl.float32, bitcast=True)
    return (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
