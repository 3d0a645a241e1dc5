"""The trainable form of a packed layer: integers frozen, scales and centres learn, dW is never formed.

With w = s * (c - h) + m, h = (2^bits - 1) / 2, the scale s and the centre m of a group are nearly independent, where
s and the zero z = m - h * s are strongly correlated. Both are trained relative to the scale they start from, s0, so
that one learning rate suits groups of every size:

    s = s0 * scale_ratio                               scale_ratio starts at 1
    z = z0 + |s0| * centre_shift - h * (s - s0)        centre_shift starts at 0: m = m0 + |s0| * centre_shift

Written so, nothing moves by rounding before something has been trained: outputs and stored bytes are those of the
packed layer. A group of scale 0 is a constant; its centre moves relative to |z0|.

Gradients, for y = x W~^T + b and dW = dy^T x, which has the size of the weight and would be the only such tensor:

    dz[r, j] = sum of dW[r, k] over the columns k of group j             = dy^T times the sums of x over each group
    ds[r, j] = sum of dW[r, k] * code[r, k] over them                    dW tile by tile, each reduced before the next
    dx       = dy W~                                                     tile by tile as well

Shape letters: N output channels, K input channels, G groups per row; n positions, k the columns of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.float32_buffers import Float32Buffers
from . import linear
from .linear import Layout, PackedLinear, as_computed, codes_of, dequantise, scaled
from .solution import group_columns
from .stored_grid import stored_scale_zero


class PackedProduct(torch.autograd.Function):
    """y = x W~^T + b for w~ = scale * code + zero; see `packed_product`."""

    @staticmethod
    def forward(ctx, x, codes, scale_NG, zero_NG, bias_N, layout: Layout) -> Tensor:
        ctx.save_for_backward(x, codes, scale_NG, zero_NG)
        ctx.layout = layout
        return nn.functional.linear(x, dequantise(codes, scale_NG, zero_NG, layout, x.dtype), bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, codes, scale_NG, zero_NG = ctx.saved_tensors
        layout: Layout = ctx.layout
        wants_x, _, wants_scale, wants_zero, wants_bias, _ = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            x_nK, dy_nN = x.reshape(-1, layout.K), dy.reshape(-1, layout.N)
            dx_nK = torch.empty_like(x_nK) if wants_x else None
            dscale_GN = torch.zeros_like(scale_NG.T) if wants_scale else None
            for first, last in layout.tiles() if wants_x or wants_scale else ():
                codes_kN = codes_of(codes, layout, first, last).to(scale_NG.dtype)
                if dx_nK is not None:
                    weight_kN = scaled(codes_kN, scale_NG, zero_NG, layout, first, last).to(x.dtype)
                    dx_nK[:, first:last] = dy_nN @ weight_kN.T
                if dscale_GN is not None:
                    dweight_kN = _product(x_nK[:, first:last].T, dy_nN, scale_NG.dtype)
                    products_kN = dweight_kN.mul_(codes_kN)
                    dscale_GN[layout.groups(first, last)] += group_sums(products_kN, layout.group_size)
            dzero_NG = _zero_gradient(x_nK, dy_nN, layout, zero_NG.dtype) if wants_zero else None
            return (
                None if dx_nK is None else dx_nK.view_as(x),
                None,
                None if dscale_GN is None else dscale_GN.T,
                dzero_NG,
                dy_nN.sum(0) if wants_bias else None,
                None,
            )


def packed_product(
    x: Tensor, codes: Tensor, scale_NG: Tensor, zero_NG: Tensor, bias_N: Tensor | None, *, layout: Layout
) -> Tensor:
    """Return x W~^T + b, [..., N] in the type of x, bias_N's too; the gradients of scale_NG and zero_NG have their own.

    Beside x and dy, the backward pass needs the memory of a tile of weights, linear.TILE_ELEMENTS.
    """
    return PackedProduct.apply(x, codes, scale_NG, zero_NG, bias_N, layout)


def group_sums(values_KN: Tensor, group_size: int) -> Tensor:
    """Return sums_GN over runs of `group_size` rows; the last run may be short, and -1 is all of them."""
    g = group_columns(len(values_KN), group_size)
    whole = len(values_KN) // g
    end = whole * g
    sums = values_KN[:end].unflatten(0, (whole, g)).sum(1)
    return torch.cat([sums, values_KN[end:].sum(0, keepdim=True)]) if end < len(values_KN) else sums


def _product(a_kn: Tensor, b_nN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b, summed and returned in `dtype`: in bf16, a gradient's many small parts would be rounded away."""
    if a_kn.is_cuda and dtype == torch.float32 and a_kn.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a_kn, b_nN, out_dtype=dtype)
    return a_kn.to(dtype) @ b_nN.to(dtype)


def _zero_gradient(x_nK: Tensor, dy_nN: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return dzero_NG, with copies of x and dy in `dtype` for a few positions at a time."""
    dzero_NG = torch.zeros(layout.N, layout.G, dtype=dtype, device=x_nK.device)
    for x_rK, dy_rN in _position_chunks(x_nK, dy_nN):
        sums_Gr = group_sums(x_rK.to(dtype).T, layout.group_size)
        dzero_NG.addmm_(dy_rN.to(dtype).T, sums_Gr.T)
    return dzero_NG


def _position_chunks(x_nK: Tensor, dy_nN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    count = max(1, linear.TILE_ELEMENTS // max(x_nK.shape[1], dy_nN.shape[1]))
    return zip(x_nK.split(count), dy_nN.split(count))


class TunedLinear(Float32Buffers):
    """A PackedLinear whose scales, centres and bias are float32 parameters. `of` makes one, `packed` folds it back."""

    codes: Tensor
    initial_scale_zero: Tensor

    def __init__(self, packed: PackedLinear):
        super().__init__()
        self.layout, self.bias_dtype = packed.layout, None if packed.bias is None else packed.bias.dtype
        self.register_buffer("codes", packed.codes)
        # Not named scale_zero: quant/hf.py refuses a folder without one, and would load this as if it never was tuned.
        self.register_buffer("initial_scale_zero", packed.scale_zero)
        shape, device = (self.layout.N, self.layout.G), packed.codes.device
        self.scale_ratio_NG = nn.Parameter(torch.ones(shape, device=device))
        self.centre_shift_NG = nn.Parameter(torch.zeros(shape, device=device))
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float().clone())

    @classmethod
    def of(cls, packed: PackedLinear) -> "TunedLinear":
        """Return the trainable form of a packed layer; it gives bit-identical outputs until it is trained."""
        return cls(packed).train(packed.training)

    def packed(self) -> PackedLinear:
        """Return the packed layer: the same codes, scales rounded to 16 bits; ValueError where those do not fit."""
        scale_NG, zero_NG = self.scale_and_zero()
        return PackedLinear(
            self.layout,
            codes=self.codes,
            scale_zero=stored_scale_zero(scale_NG.detach(), zero_NG.detach(), self.initial_scale_zero.dtype),
            bias=None if self.bias is None else self.bias.detach().to(self.bias_dtype),
        ).train(self.training)

    @property
    def in_features(self) -> int:
        return self.layout.K

    @property
    def out_features(self) -> int:
        return self.layout.N

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Return scale_NG and zero_NG as they stand, with their graph."""
        return tuned_scale_zero(
            self.initial_scale_zero, self.scale_ratio_NG, self.centre_shift_NG, bits=self.layout.bits
        )

    def forward(self, x: Tensor) -> Tensor:
        x = as_computed(x)
        scale_NG, zero_NG = self.scale_and_zero()
        bias_N = None if self.bias is None else self.bias.to(x.dtype)
        return packed_product(x, self.codes, scale_NG, zero_NG, bias_N, layout=self.layout)

    def extra_repr(self) -> str:
        N, K, bits, group_size = self.layout
        return f"in_features={K}, out_features={N}, bias={self.bias is not None}, bits={bits}, group_size={group_size}"


def tuned_scale_zero(
    initial_GN2: Tensor, scale_ratio_NG: Tensor, centre_shift_NG: Tensor, *, bits: int
) -> tuple[Tensor, Tensor]:
    """Return scale_NG and zero_NG from where they started and how they have been trained.

    ValueError where the parameters have 16 bits: 1 + 2e-5 is 1 in bfloat16, so that no step of training would be seen.
    """
    if scale_ratio_NG.dtype.itemsize < 4 or centre_shift_NG.dtype.itemsize < 4:
        raise ValueError(
            f"scales are to be trained in {scale_ratio_NG.dtype}, in which a step of 1e-5 is lost; keep parameters in "
            "float32 (train.precision=fp32) and compute in bf16 by autocast"
        )
    scale0_NG, zero0_NG = initial_GN2.to(scale_ratio_NG.dtype).permute(2, 1, 0)
    unit_NG = torch.where(scale0_NG == 0, zero0_NG, scale0_NG).abs()
    scale_NG = scale0_NG * scale_ratio_NG
    middle = (2**bits - 1) / 2
    return scale_NG, zero0_NG + unit_NG * centre_shift_NG - middle * (scale_NG - scale0_NG)
