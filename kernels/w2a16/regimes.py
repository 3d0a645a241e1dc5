"""A product goes to the kernel of its number of tokens; settings.py has the bounds."""

from torch import Tensor

from .large import large_batch
from .layout import Layout
from .middle import middle_batch
from .settings import regime
from .small import small_batch

KERNELS = {"small": small_batch, "middle": middle_batch, "large": large_batch}


def linear(x_MK: Tensor, codes: Tensor, scale_zero_GN2: Tensor, bias_N: Tensor | None, layout: Layout) -> Tensor:
    """Return x W~^T + b, y_MN in the type of x."""
    kernel = KERNELS[regime(x_MK.shape[0])]
    return kernel(x_MK, codes, scale_zero_GN2, bias_N, bits=layout.bits, group_size=layout.group_size)
