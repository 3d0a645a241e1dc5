"""The public op: a linear layer whose weight stays packed, forward and backward, on any device.

Registered with torch.library, so that torch.compile, fake tensors and autograd know it. Gradients flow to the
activations, to scales and zeros (where they are trained), and to the bias; codes are integers and have none.
Shape letters: N output channels, K input channels, G groups per row, R rows of bytes (packing.py), n positions.
"""

import logging
import os
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from . import reference
from .layout import Layout

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "triton", "reference"]
KERNEL_BITS = (2, 4)  # other widths take the reference
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability of a GPU with bf16 tensor cores


def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale_zero_GN2: Tensor,
    bias_N: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    impl: Implementation = "auto",
) -> Tensor:
    """Return x W~^T + b, [..., N] in the type of x, for w~ = scale * code + zero.

    x is [..., K], codes uint8 [R, N], scale_zero_GN2 in any floating-point type (16 bits to serve, 32 to train), bias_N
    in the type of x. group_size -1 is one group a row. "auto" takes the Triton kernels where they run and the reference
    elsewhere. ValueError where shapes, types or devices do not fit, or "triton" is asked for where it cannot run.
    """
    layout = Layout(codes.shape[-1], x.shape[-1], bits, group_size)
    layout.check(codes, scale_zero_GN2)
    if codes.dtype != torch.uint8 or not scale_zero_GN2.is_floating_point() or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype}, codes {codes.dtype}, scale_zero {scale_zero_GN2.dtype}; codes must be uint8, the others "
            "floating-point"
        )
    if bias_N is not None and (bias_N.shape != (layout.N,) or bias_N.dtype != x.dtype):
        raise ValueError(f"bias is {bias_N.dtype} {list(bias_N.shape)}; it must be {x.dtype} [{layout.N}]")
    devices = {tensor.device for tensor in (x, codes, scale_zero_GN2, bias_N) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"x, codes, scale_zero and bias lie on {sorted(map(str, devices))}; move them to one device")
    return torch.ops.seedling.packed_linear(x, codes, scale_zero_GN2, bias_N, bits, group_size, impl)


def implementation(impl: str, device: torch.device, *, bits: int, dtype: torch.dtype) -> str:
    """Return "triton" or "reference" for x of `dtype`; ValueError where "triton" is asked for and cannot run."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is {impl!r}; it is auto, triton or reference")
    if impl == "reference":
        return impl
    obstacle = f"{bits} bits have no kernel" if bits not in KERNEL_BITS else _obstacle(device)
    if device.type != "cuda" and impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return impl
    if not obstacle and dtype not in KERNEL_DTYPES:
        obstacle = f"x is {dtype}, and tensor cores take 16 bits"
    if impl == "triton" and obstacle:
        raise ValueError(f"impl='triton' cannot run: {obstacle}; use impl='auto' or 'reference'")
    return "reference" if obstacle else "triton"


def _chosen(impl: str, x: Tensor, scale_zero: Tensor, bits: int) -> str:
    # Scales in 64 bits are there to be exact, whatever x has.
    dtype = scale_zero.dtype if scale_zero.dtype == torch.float64 else x.dtype
    return implementation(impl, x.device, bits=bits, dtype=dtype)


@cache
def _obstacle(device: torch.device) -> str | None:
    """Return what keeps the kernels from running on this device. A GPU that is left without them is logged, once."""
    if device.type != "cuda":
        return f"kernels run on a GPU, and x is on {device}"
    obstacle = None
    if (found := torch.cuda.get_device_capability(device)) < OLDEST:
        name = torch.cuda.get_device_name(device)
        obstacle = f"{name} has compute capability {found[0]}.{found[1]}, below {OLDEST[0]}.{OLDEST[1]}"
    else:
        try:
            import triton  # noqa: F401
        except ImportError:
            obstacle = "triton is not installed (pip install seedling[gpu])"
    if obstacle:
        logger.warning("packed layers are dequantised for every product: %s", obstacle)
    return obstacle


# --- registration ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("seedling::packed_linear", mutates_args=())
def _forward(
    x: Tensor, codes: Tensor, scale_zero: Tensor, bias: Tensor | None, bits: int, group_size: int, impl: str
) -> Tensor:
    layout = Layout(codes.shape[-1], x.shape[-1], bits, group_size)
    with torch.autocast(x.device.type, enabled=False):
        if _chosen(impl, x, scale_zero, bits) == "reference":
            return reference.linear(x, codes, scale_zero, bias, layout)
        from .regimes import linear  # Triton is imported where it is used

        return linear(x.reshape(-1, layout.K), codes, scale_zero, bias, layout).view(*x.shape[:-1], layout.N)


@_forward.register_fake
def _(x, codes, scale_zero, bias, bits, group_size, impl):
    return x.new_empty(*x.shape[:-1], codes.shape[-1])


@torch.library.custom_op("seedling::packed_linear_gradients", mutates_args=())
def _gradients(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    scale_zero: Tensor,
    bits: int,
    group_size: int,
    impl: str,
    wants_x: bool,
    wants_scale_zero: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx and dscale_zero; empty ones for what is not wanted."""
    layout = Layout(codes.shape[-1], x.shape[-1], bits, group_size)
    x_nK, dy_nN = x.reshape(-1, layout.K), dy.reshape(-1, layout.N)
    with torch.autocast(x.device.type, enabled=False):
        gradients = reference.gradients
        if _chosen(impl, x, scale_zero, bits) == "triton":
            from .gradients import gradients
        dx_nK, dscale_zero_GN2 = gradients(
            dy_nN, x_nK, codes, scale_zero, layout, wants_x=wants_x, wants_scale_zero=wants_scale_zero
        )
    return (
        x.new_empty(0) if dx_nK is None else dx_nK.view(x.shape),
        scale_zero.new_empty(0) if dscale_zero_GN2 is None else dscale_zero_GN2,
    )


@_gradients.register_fake
def _(dy, x, codes, scale_zero, bits, group_size, impl, wants_x, wants_scale_zero):
    return (
        x.new_empty(x.shape if wants_x else 0),
        scale_zero.new_empty(scale_zero.shape if wants_scale_zero else 0),
    )


def _save(ctx, inputs, output):
    x, codes, scale_zero, _, *ctx.settings = inputs
    ctx.save_for_backward(x, codes, scale_zero)


def _backward(ctx, dy):
    x, codes, scale_zero = ctx.saved_tensors
    wants_x, _, wants_scale_zero, wants_bias, *_ = ctx.needs_input_grad
    dx, dscale_zero = torch.ops.seedling.packed_linear_gradients(
        dy, x, codes, scale_zero, *ctx.settings, wants_x, wants_scale_zero
    )
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if wants_bias else None
    return dx if wants_x else None, None, dscale_zero if wants_scale_zero else None, dbias, None, None, None


_forward.register_autograd(_backward, setup_context=_save)
