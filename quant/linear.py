"""A linear layer whose weight is packed codes with a scale and a zero per group: w = scale * code + zero.

`codes` are the bytes of quant/packing.py, `scale_zero` [G, N, 2] holds scale and zero side by side in 16 bits, one
4-byte load per group and channel. Both are buffers: no optimizer sees them, and casting a model leaves them alone.
There is no float weight. The forward pass here is the reference: dequantise, multiply.

Shape letters: N output channels, K input channels, G groups per row, k the columns of a tile.
"""

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.float32_buffers import Float32Buffers
from .packing import pack_codes, packed_rows, span, unpack_codes, unpack_columns
from .solution import LayerSolution, group_columns, group_count
from .stored_grid import SCALE_DTYPES, check_scale_dtype, on_stored_grid

TILE_ELEMENTS = 1 << 22  # of a weight that are dequantised at a time: 16 MB in float32


class Layout(NamedTuple):
    """What the bytes of a packed weight mean."""

    N: int
    K: int
    bits: int
    group_size: int

    @property
    def G(self) -> int:
        return group_count(self.K, self.group_size)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Yield (first, last) column of tiles of about TILE_ELEMENTS: whole groups, or a part of one group."""
        P, width = span(self.bits, self.group_size), TILE_ELEMENTS // self.N
        whole = P if self.G == 1 else math.lcm(P, self.group_size)
        unit = P if whole > width and self.group_size % P == 0 else whole * max(1, width // whole)
        for first in range(0, self.K, unit):
            yield first, min(first + unit, self.K)

    def groups(self, first: int, last: int) -> slice:
        """Return the groups of a tile."""
        g = group_columns(self.K, self.group_size)
        return slice(first // g, -(-last // g))


def codes_of(packed: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """Return codes_kN of a tile, uint8."""
    _, K, bits, group_size = layout
    return unpack_columns(packed, first, last, K=K, bits=bits, group_size=group_size)


def scaled(codes_kN: Tensor, scale_NG: Tensor, zero_NG: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """Return w_kN of a tile: scale * code + zero, in the type of the scales, which is also that of codes_kN."""
    groups = layout.groups(first, last)
    scale_kN, zero_kN = (
        values_NG[:, groups].T
        if groups.stop - groups.start == 1
        else values_NG[:, groups].T.repeat_interleave(layout.group_size, dim=0)[: last - first]
        for values_NG in (scale_NG, zero_NG)
    )
    return codes_kN.mul(scale_kN).add_(zero_kN)


def dequantise(packed: Tensor, scale_NG: Tensor, zero_NG: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return w_NK: scale * code + zero in the type of the scales, then rounded to `dtype`, tile by tile."""
    weight_NK = torch.empty(layout.N, layout.K, dtype=dtype, device=packed.device)
    for first, last in layout.tiles():
        codes_kN = codes_of(packed, layout, first, last).to(scale_NG.dtype)
        weight_NK[:, first:last] = scaled(codes_kN, scale_NG, zero_NG, layout, first, last).T
    return weight_NK


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
        packed_rows(layout.K, bits=layout.bits, group_size=layout.group_size)
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
        N, K, bits, group_size = layout
        check_scale_dtype(scale_zero.dtype)
        assert codes.shape == (packed_rows(K, bits=bits, group_size=group_size), N), "codes do not fit the layout"
        assert scale_zero.shape == (layout.G, N, 2), "scales do not fit the layout"
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
        rows = packed_rows(layout.K, bits=layout.bits, group_size=layout.group_size)
        return cls(
            layout,
            codes=torch.empty(rows, layout.N, dtype=torch.uint8, device=device),
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
        return dequantise(self.codes, self.scale_NG(), self.zero_NG(), self.layout, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = as_computed(x)
        bias_N = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantised_NK(x.dtype), bias_N)

    def extra_repr(self) -> str:
        N, K, bits, group_size = self.layout
        return (
            f"in_features={K}, out_features={N}, bias={self.bias is not None}, bits={bits}, group_size={group_size}, "
            f"scale_dtype={str(self.scale_zero.dtype).removeprefix('torch.')}"
        )
