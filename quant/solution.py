"""What a solver returns: integer codes and free real scales and zeros, w = scale * code + zero.

Codes are unsigned, 0 .. 2^bits - 1. Groups are runs of `group_size` columns of the original order; the last may be
short, and a group size of -1 makes one group of a whole row ("per channel"). A scale may be negative.
Shape letters: N output channels, K input channels, G = ceil(K / group_size) groups per row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def check_bits(bits: int) -> None:
    """Raise ValueError for a width that has no packed form."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; packed weights have 2, 3, 4 or 8")


def group_count(K: int, group_size: int) -> int:
    """Return G, the groups of a row of K columns; ValueError for a group size that is neither -1 nor positive."""
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size is {group_size}; give the columns of a group, such as 64, or -1 for one per row")
    return 1 if group_size == -1 else -(-K // group_size)


def group_columns(K: int, group_size: int) -> int:
    """Return the columns of a whole group of a row of K: the group size, and K where that is -1."""
    return K if group_size == -1 else group_size


def columns_of_groups(values_NG: Tensor, K: int, group_size: int) -> Tensor:
    """Return values_NK: each column has the value of its group. A view where there is one group."""
    N, G = values_NG.shape
    if G == 1:
        return values_NG.expand(N, K)
    return values_NG.repeat_interleave(group_size, dim=1)[:, :K]


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

    def dequantised_NK(self) -> Tensor:
        """Return scale * code + zero in float32."""
        scale_NK, zero_NK = (
            columns_of_groups(values_NG, self.codes_NK.shape[1], self.group_size)
            for values_NG in (self.scale_NG, self.zero_NG)
        )
        return scale_NK * self.codes_NK.float() + zero_NK
