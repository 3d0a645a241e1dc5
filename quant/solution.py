"""What a solver returns: integer codes and free real scales and zeros, w = scale * code + zero.

Codes are unsigned, 0 .. 2^bits - 1. A scale may be negative. Groups are those of kernels/w2a16/groups.py.
Shape letters: N output channels, K input channels, G = ceil(K / group_size) groups per row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.w2a16.groups import check_bits, columns_of_groups, group_count


@dataclass(frozen=True)
class LayerSolution:
    """One linear layer, quantised. `row_errors_N` is (w~ - w) H (w~ - w)^T of the undamped H, without a factor 1/2."""

    codes_NK: Tensor  # uint8
    scale_NG: Tensor  # float32
    zero_NG: Tensor  # float32
    bits: int
    group_size: int
    row_errors_N: Tensor | None = None

    def __post_init__(self):
        check_bits(self.bits)
        if self.codes_NK.dtype != torch.uint8 or self.codes_NK.dim() != 2 or 0 in self.codes_NK.shape:
            raise ValueError(
                f"codes are {self.codes_NK.dtype} {list(self.codes_NK.shape)}; they must be uint8 [N, K], none empty"
            )
        N, K = self.codes_NK.shape
        wanted = (N, group_count(K, self.group_size))
        for name, values_NG in (("scales", self.scale_NG), ("zeros", self.zero_NG)):
            if values_NG.shape != wanted or values_NG.dtype != torch.float32:
                raise ValueError(
                    f"{name} are {values_NG.dtype} {list(values_NG.shape)}; codes [{N}, {K}] in groups of "
                    f"{self.group_size} need float32 {list(wanted)}"
                )
        if self.bits < 8 and bool((self.codes_NK >= 2**self.bits).any()):
            largest = int(self.codes_NK.max())
            raise ValueError(f"the largest code is {largest}; {self.bits} bits hold 0 .. {2**self.bits - 1}")

    def scale_zero_GN2(self) -> Tensor:
        """Return scale and zero side by side, as packed weights have them."""
        return torch.stack([self.scale_NG.T, self.zero_NG.T], dim=-1)

    def dequantised_NK(self) -> Tensor:
        """Return scale * code + zero in float32."""
        scale_NK, zero_NK = (
            columns_of_groups(values_NG, self.codes_NK.shape[1], self.group_size)
            for values_NG in (self.scale_NG, self.zero_NG)
        )
        return scale_NK * self.codes_NK.float() + zero_NK
