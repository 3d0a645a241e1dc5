"""A linear layer whose weight is packed codes with a scale and a zero per group: w = scale * code + zero.

`codes` are the bytes of kernels/w2a16/packing.py, `scale_zero` [G, N, 2] holds scale and zero side by side in 16 bits.
Both are buffers: no optimizer sees them, and casting a model leaves them alone. There is no float weight: the op of
kernels/w2a16 multiplies.

Shape letters: N output channels, K input channels, G groups per row.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.w2a16.layout import Layout
from ..kernels.w2a16.op import packed_linear
from ..kernels.w2a16.packing import pack_codes, unpack_codes
from ..kernels.w2a16.reference import dequantise
from ..model.float32_buffers import Float32Buffers
from .solution import LayerSolution
from .stored_grid import SCALE_DTYPES, check_scale_dtype, on_stored_grid


def as_computed(x: Tensor) -> Tensor:
    """Return x in the type that a linear layer would multiply in here: autocast's, if there is one."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def form_of(layout: Layout, *, scale_zero: Tensor) -> dict[str, Any]:
    """Return the form of a packed matrix as JSON has it; those of E experts have shape [E, N, K]."""
    return {
        "bits": layout.bits,
        "group_size": layout.group_size,
        "scale_dtype": str(scale_zero.dtype).removeprefix("torch."),
        "shape": [*scale_zero.shape[:-3], layout.N, layout.K],
    }


def layout_of(form: Mapping[str, Any], *, name: str) -> Layout:
    """Return the layout of one matrix of this form; ValueError, naming the module, where it has no packed form."""
    try:
        layout = Layout(*map(operator.index, (*form["shape"][-2:], form["bits"], form["group_size"])))
        _ = layout.rows
        SCALE_DTYPES[form["scale_dtype"]]
    except KeyError as error:
        raise ValueError(f"{name}: its form in quantization_config lacks or does not know {error}: {form}") from None
    except TypeError:
        raise ValueError(
            f"{name}: its form in quantization_config is {form}; bits and group_size must be integers, shape [N, K] or "
            "[E, N, K], scale_dtype a word: restore config.json"
        ) from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return layout


class PackedLinear(Float32Buffers):
    """Stands for nn.Linear(K, N). `from_solution` makes one; `empty` makes the place that a file is loaded into."""

    codes: Tensor
    scale_zero: Tensor
    bias: nn.Parameter | None

    def __init__(self, layout: Layout, *, codes: Tensor, scale_zero: Tensor, bias: Tensor | None):
        super().__init__()
        self.layout = layout
        check_scale_dtype(scale_zero.dtype)
        layout.check(codes, scale_zero)
        self.register_buffer("codes", codes)
        self.register_buffer("scale_zero", scale_zero)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))

    @classmethod
    def from_solution(
        cls, solution: LayerSolution, *, bias: Tensor | None, scale_dtype: torch.dtype = torch.bfloat16
    ) -> "PackedLinear":
        """Pack a solution as near to it as scales and zeros of `scale_dtype` come.

        ValueError where `scale_dtype` cannot hold a scale or a zero.
        """
        bits, group_size = solution.bits, solution.group_size
        codes_NK, scale_zero = on_stored_grid(solution, scale_dtype)
        codes = pack_codes(codes_NK, bits=bits, group_size=group_size)
        return cls(Layout(*solution.codes_NK.shape, bits, group_size), codes=codes, scale_zero=scale_zero, bias=bias)

    @classmethod
    def empty(cls, layout: Layout, *, scale_dtype: torch.dtype, bias: Tensor | None, device=None) -> "PackedLinear":
        """Return one with undefined values of this form, into which a file's are loaded."""
        return cls(
            layout,
            codes=torch.empty(layout.rows, layout.N, dtype=torch.uint8, device=device),
            scale_zero=torch.empty(layout.G, layout.N, 2, dtype=scale_dtype, device=device),
            bias=bias,
        )

    def matrices(self) -> dict[str, dict[str, Any]]:
        """Return what config.json says about this layer; see packed_model.PackedModule."""
        return {"": form_of(self.layout, scale_zero=self.scale_zero)}

    @classmethod
    def place_for(cls, module: nn.Module, forms: Mapping[str, Mapping[str, Any]], *, name: str) -> "PackedLinear":
        """Return a place for a file's values that stands for `module`; ValueError where that is no such nn.Linear."""
        form = forms[""]
        layout = layout_of(form, name=name)
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != (layout.N, layout.K):
            raise ValueError(
                f"{name} is packed as a linear layer [{layout.N}, {layout.K}], and the model has "
                f"{type(module).__name__}({module.extra_repr()}) there; config.json does not belong to these weights"
            )
        device = module.weight.device
        return cls.empty(layout, scale_dtype=SCALE_DTYPES[form["scale_dtype"]], bias=module.bias, device=device)

    @property
    def in_features(self) -> int:
        return self.layout.K

    @property
    def out_features(self) -> int:
        return self.layout.N

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes, padding included, scales and zeros, per weight; the bias is not counted."""
        return 8 * (self.codes.nbytes + self.scale_zero.nbytes) / (self.layout.N * self.layout.K)

    def codes_NK(self) -> Tensor:
        """Return the codes, uint8."""
        return unpack_codes(self.codes, self.layout.K, bits=self.layout.bits, group_size=self.layout.group_size)

    def scale_NG(self) -> Tensor:
        """Return the scales in float32."""
        return self.scale_zero[..., 0].T.float()

    def zero_NG(self) -> Tensor:
        """Return the zeros in float32."""
        return self.scale_zero[..., 1].T.float()

    def dequantised_NK(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return scale * code + zero, computed in float32 and rounded to `dtype`."""
        return dequantise(self.codes, self.scale_zero, self.layout, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = as_computed(x)
        bias_N = None if self.bias is None else self.bias.to(x.dtype)
        return packed_linear(x, self.codes, self.scale_zero, bias_N, bits=self.bits, group_size=self.group_size)

    def extra_repr(self) -> str:
        N, K, bits, group_size = self.layout
        return (
            f"in_features={K}, out_features={N}, bias={self.bias is not None}, bits={bits}, group_size={group_size}, "
            f"scale_dtype={str(self.scale_zero.dtype).removeprefix('torch.')}"
        )
