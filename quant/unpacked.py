"""Packed modules with a dense weight beside their codes: where no kernel reads codes, a weight is dequantised once.

A packed module dequantises its weight at every call, which costs a CPU many times what the product itself does.
`unpack` gives dense weights to as many modules as a number of bytes allows, the parts that run most often first. An
unpacked module is still the packed one: it shares its tensors, its dense weight is no part of its state, and what is
saved is codes. Other modules are left as they are, so that without such an allowance there is no dense copy at all.

Shape letters: N output channels, K input channels, E experts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .linear import PackedLinear, as_computed
from .packed_experts import PackedMatrices
from .packed_model import replace_module


class UnpackedLinear(PackedLinear):
    """A packed linear layer that multiplies with a weight made once, for inputs of that weight's type."""

    dense_NK: Tensor

    @classmethod
    def of(cls, packed: PackedLinear, dtype: torch.dtype) -> "UnpackedLinear":
        """Return `packed` with a dense weight in `dtype`; all other tensors are shared."""
        module = cls(packed.layout, codes=packed.codes, scale_zero=packed.scale_zero, bias=None)
        module.bias = packed.bias
        module.register_buffer("dense_NK", packed.dequantised_NK(dtype), persistent=False)
        return module

    def forward(self, x: Tensor) -> Tensor:
        x = as_computed(x)
        if x.dtype != self.dense_NK.dtype:  # as exact as if nothing were unpacked
            return super().forward(x)
        return nn.functional.linear(x, self.dense_NK, None if self.bias is None else self.bias.to(x.dtype))

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.dense_NK = self.dequantised_NK(self.dense_NK.dtype)


class UnpackedMatrices(PackedMatrices):
    """One projection of all experts, with the weights of all of them made once."""

    dense_ENK: Tensor

    @classmethod
    def of(cls, packed: PackedMatrices, dtype: torch.dtype) -> "UnpackedMatrices":
        """Return `packed` with dense weights in `dtype`; all other tensors are shared."""
        module = cls(packed.layout, codes=packed.codes, scale_zero=packed.scale_zero, bias=None)
        module.bias = packed.bias
        dense = packed.codes.new_empty(len(packed.codes), packed.layout.N, packed.layout.K, dtype=dtype)
        module.register_buffer("dense_ENK", dense, persistent=False)
        module._fill()
        return module

    def one(self, x_nK: Tensor, expert: int) -> Tensor:
        if x_nK.dtype != self.dense_ENK.dtype:
            return super().one(x_nK, expert)
        bias_N = None if self.bias is None else self.bias[expert].to(x_nK.dtype)
        return nn.functional.linear(x_nK, self.dense_ENK[expert], bias_N)

    def _fill(self) -> None:
        for expert, dense_NK in enumerate(self.dense_ENK):
            dense_NK.copy_(self.dequantised_NK(expert, self.dense_ENK.dtype))

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._fill()


class Unpacked(NamedTuple):
    """How many of the packed modules got a dense weight, and the bytes of all dense weights."""

    modules: int
    of: int
    nbytes: int


def unpack(parts: Sequence[nn.Module], *, most_bytes: float) -> Unpacked:
    """Give dense weights to packed modules below `parts`, in place, as long as they take `most_bytes` or less in all.

    Parts come in the order given, experts after all else of a part, as few of them run at a time. Weights have the type
    that their part computes in, which is that of its first parameter.
    """
    found, unpacked, taken = 0, 0, 0
    for part in parts:
        dtype = next(part.parameters()).dtype
        for name, module in _packed_below(part):
            found += 1
            size = _weights(module) * dtype.itemsize
            if taken + size > most_bytes:
                continue
            form = UnpackedLinear if isinstance(module, PackedLinear) else UnpackedMatrices
            replace_module(part, name, form.of(module, dtype))
            unpacked, taken = unpacked + 1, taken + size
    return Unpacked(unpacked, found, taken)


def _packed_below(part: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedMatrices]]:
    kinds = (PackedLinear, PackedMatrices)
    found = [(name, module) for name, module in part.named_modules() if isinstance(module, kinds)]
    return iter(sorted(found, key=lambda one: isinstance(one[1], PackedMatrices)))


def _weights(module: PackedLinear | PackedMatrices) -> int:
    experts = len(module.codes) if isinstance(module, PackedMatrices) else 1
    return experts * module.layout.N * module.layout.K
