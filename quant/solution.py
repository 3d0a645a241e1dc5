"""What a layer solver returns: integer codes, and a scale and a zero for every group of every row.

Codes are unsigned, 0 .. 2^bits - 1, and w = scale * code + zero. Scale and zero are free real numbers: a zero is an
offset in units of the weight, and a scale may be negative.
Shape letters: N output channels, K input channels, G groups in a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
PER_CHANNEL = -1  # a group size: the whole row is one group


def group_count(columns: int, group_size: int) -> int:
    """Return G, the groups in a row of K columns; the last one may be short."""
    return 1 if group_size == PER_CHANNEL else -(-columns // group_size)


def require_grid(*, bits: int, group_size: int) -> None:
    """Raise ValueError for bits or group sizes that there are no codes for."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; codes have {', '.join(map(str, BITS))} bits")
    if group_size != PER_CHANNEL and group_size < 1:
        raise ValueError(f"group_size is {group_size}; give the columns of a group, such as 64, or -1 for whole rows")


@dataclass(frozen=True)
class LayerSolution:
    """A quantised weight.

    `row_errors_N`, where a solver knows them, are (w~ - w) H (w~ - w)^T of the Hessian that it was given.
    """

    codes_NK: Tensor  # uint8
    scale_NG: Tensor  # float32
    zero_NG: Tensor  # float32
    bits: int
    group_size: int  # -1: one group a row
    row_errors_N: Tensor | None = None

    def __post_init__(self):
        require_grid(bits=self.bits, group_size=self.group_size)
        N, K = self.codes_NK.shape
        wanted = (N, group_count(K, self.group_size))
        for name in ("scale_NG", "zero_NG"):
            if (found := tuple(getattr(self, name).shape)) != wanted:
                raise ValueError(
                    f"{name} has shape {found}; {N} x {K} codes in groups of {self.group_size} need {wanted}"
                )

    def dequantised_NK(self) -> Tensor:
        """Return scale * code + zero, float32."""
        return expand_groups(self.scale_NG, like=self.codes_NK, group_size=self.group_size) * self.codes_NK.float() + (
            expand_groups(self.zero_NG, like=self.codes_NK, group_size=self.group_size)
        )


def expand_groups(values_NG: Tensor, *, like: Tensor, group_size: int) -> Tensor:
    """Return the value of each column's group, [N, K] as `like`."""
    K = like.shape[-1]
    if group_size == PER_CHANNEL:
        return values_NG.expand(-1, K)
    return torch.repeat_interleave(values_NG, group_size, dim=-1)[..., :K]
