"""The equation of the op and its gradients in plain torch: any device, any width, any type.

    y = x W~^T + b                                     w~ = scale * code + zero
    dx = dy W~
    dscale[r, j] = sum of dW[r, k] * code[r, k]        over the columns k of group j, dW = dy^T x
    dzero[r, j]  = sum of dW[r, k]                     = dy^T times the sums of x over the group

dW, which has the size of the weight, is never formed: a tile of it is reduced before the next one is made. Weights are
computed in float32, or in the type of the scales where that is wider, and then rounded to the type of x.
Shape letters: N output channels, K input channels, G groups per row, n positions, k the columns of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import layout as layouts
from .groups import group_sums
from .layout import Layout
from .packing import unpack_columns


def dequantise(codes: Tensor, scale_zero_GN2: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return w_NK in `dtype`, made tile by tile."""
    scale_zero_GN2 = _exact(scale_zero_GN2)
    weight_NK = torch.empty(layout.N, layout.K, dtype=dtype, device=codes.device)
    for first, last in layout.tiles():
        codes_kN = _codes(codes, layout, first, last).to(scale_zero_GN2.dtype)
        weight_NK[:, first:last] = _scaled(codes_kN, scale_zero_GN2, layout, first, last).T
    return weight_NK


def linear(x: Tensor, codes: Tensor, scale_zero_GN2: Tensor, bias_N: Tensor | None, layout: Layout) -> Tensor:
    """Return x W~^T + b, [..., N], in the type of x."""
    return torch.nn.functional.linear(x, dequantise(codes, scale_zero_GN2, layout, x.dtype), bias_N)


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
    """Return dx_nK in the type of x and dscale_zero_GN2 in that of the scales; None for what is not wanted."""
    exact_GN2 = _exact(scale_zero_GN2)
    dx_nK = torch.empty_like(x_nK) if wants_x else None
    dscale_GN = torch.zeros_like(exact_GN2[..., 0]) if wants_scale_zero else None
    for first, last in layout.tiles() if wants_x or wants_scale_zero else ():
        codes_kN = _codes(codes, layout, first, last).to(exact_GN2.dtype)
        if dx_nK is not None:
            dx_nK[:, first:last] = dy_nN @ _scaled(codes_kN, exact_GN2, layout, first, last).to(x_nK.dtype).T
        if dscale_GN is not None:
            products_kN = _product(x_nK[:, first:last].T, dy_nN, exact_GN2.dtype).mul_(codes_kN)
            dscale_GN[layout.groups(first, last)] += group_sums(products_kN, layout.group_size, dim=0)
    if dscale_GN is None:
        return dx_nK, None
    dzero_GN = _zero_gradient(x_nK, dy_nN, layout, exact_GN2.dtype)
    return dx_nK, torch.stack([dscale_GN, dzero_GN], dim=-1).to(scale_zero_GN2.dtype)


def _exact(scale_zero_GN2: Tensor) -> Tensor:
    return scale_zero_GN2 if scale_zero_GN2.dtype.itemsize >= 4 else scale_zero_GN2.float()


def _codes(packed: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """Return codes_kN of a tile, uint8."""
    _, K, bits, group_size = layout
    return unpack_columns(packed, first, last, K=K, bits=bits, group_size=group_size)


def _scaled(codes_kN: Tensor, scale_zero_GN2: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """Return w_kN of a tile: scale * code + zero, in the type of the scales, which is also that of codes_kN."""
    groups = layout.groups(first, last)
    scale_kN, zero_kN = (
        values_GN
        if groups.stop - groups.start == 1
        else values_GN.repeat_interleave(layout.group_size, dim=0)[: last - first]
        for values_GN in scale_zero_GN2[groups].unbind(-1)
    )
    return codes_kN.mul(scale_kN).add_(zero_kN)


def _product(a_kn: Tensor, b_nN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b, summed and returned in `dtype`: in bf16, a gradient's many small parts would be rounded away."""
    if a_kn.is_cuda and dtype == torch.float32 and a_kn.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a_kn, b_nN, out_dtype=dtype)
    return a_kn.to(dtype) @ b_nN.to(dtype)


def _zero_gradient(x_nK: Tensor, dy_nN: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return dzero_GN, with copies of x and dy in `dtype` for a few positions at a time."""
    dzero_GN = torch.zeros(layout.G, layout.N, dtype=dtype, device=x_nK.device)
    for x_rK, dy_rN in _position_chunks(x_nK, dy_nN):
        dzero_GN.addmm_(group_sums(x_rK.to(dtype), layout.group_size).T, dy_rN.to(dtype))
    return dzero_GN


def _position_chunks(x_nK: Tensor, dy_nN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    count = max(1, layouts.TILE_ELEMENTS // max(x_nK.shape[1], dy_nN.shape[1]))
    return zip(x_nK.split(count), dy_nN.split(count))
