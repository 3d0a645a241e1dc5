"""The trainable form of a packed layer: integers frozen, scales and centres learn.

With w = s * (c - h) + m, h = (2^bits - 1) / 2, the scale s and the centre m of a group are nearly independent, where
s and the zero z = m - h * s are strongly correlated. Both are trained relative to the scale they start from, s0, so
that one learning rate suits groups of every size:

    s = s0 * scale_ratio                               scale_ratio starts at 1
    z = z0 + |s0| * centre_shift - h * (s - s0)        centre_shift starts at 0: m = m0 + |s0| * centre_shift

Written so, nothing moves by rounding before something has been trained: outputs and stored bytes are those of the
packed layer. A group of scale 0 is a constant; its centre moves relative to |z0|. The op's gradients of scales and
zeros need no gradient of the weight (kernels/w2a16/reference.py).

Shape letters: N output channels, K input channels, G groups per row.
"""

import torch
from torch import Tensor, nn

from ..kernels.w2a16.op import packed_linear
from ..model.float32_buffers import Float32Buffers
from .linear import PackedLinear, as_computed
from .stored_grid import stored_scale_zero


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
        return PackedLinear(
            self.layout,
            codes=self.codes,
            scale_zero=stored_scale_zero(self.scale_zero_GN2().detach(), self.initial_scale_zero.dtype),
            bias=None if self.bias is None else self.bias.detach().to(self.bias_dtype),
        ).train(self.training)

    @property
    def in_features(self) -> int:
        return self.layout.K

    @property
    def out_features(self) -> int:
        return self.layout.N

    def scale_zero_GN2(self) -> Tensor:
        """Return scales and zeros as they stand, with their graph."""
        return tuned_scale_zero(
            self.initial_scale_zero, self.scale_ratio_NG, self.centre_shift_NG, bits=self.layout.bits
        )

    def forward(self, x: Tensor) -> Tensor:
        x = as_computed(x)
        bias_N = None if self.bias is None else self.bias.to(x.dtype)
        bits, group_size = self.layout.bits, self.layout.group_size
        return packed_linear(x, self.codes, self.scale_zero_GN2(), bias_N, bits=bits, group_size=group_size)

    def extra_repr(self) -> str:
        N, K, bits, group_size = self.layout
        return f"in_features={K}, out_features={N}, bias={self.bias is not None}, bits={bits}, group_size={group_size}"


def tuned_scale_zero(initial_GN2: Tensor, scale_ratio_NG: Tensor, centre_shift_NG: Tensor, *, bits: int) -> Tensor:
    """Return scale_zero_GN2 from where scales and zeros started and how they have been trained.

    ValueError where the parameters have 16 bits: 1 + 2e-5 is 1 in bfloat16, so that no step of training would be seen.
    """
    if scale_ratio_NG.dtype.itemsize < 4 or centre_shift_NG.dtype.itemsize < 4:
        raise ValueError(
            f"scales are to be trained in {scale_ratio_NG.dtype}, in which a step of 1e-5 is lost; keep parameters in "
            "float32 (train.precision=fp32) and compute in bf16 by autocast"
        )
    scale0_GN, zero0_GN = initial_GN2.to(scale_ratio_NG.dtype).unbind(-1)
    unit_GN = torch.where(scale0_GN == 0, zero0_GN, scale0_GN).abs()
    scale_GN = scale0_GN * scale_ratio_NG.T
    middle = (2**bits - 1) / 2
    zero_GN = zero0_GN + unit_GN * centre_shift_NG.T - middle * (scale_GN - scale0_GN)
    return torch.stack([scale_GN, zero_GN], dim=-1)
