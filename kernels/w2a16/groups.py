"""Runs of columns that share a scale and a zero.

Groups are runs of `group_size` columns of the original order; the last may be short, and a group size of -1 makes one
group of a whole row ("per channel").
Shape letters: N output channels, K input channels, G = ceil(K / group_size) groups per row.
"""

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


def group_sums(values: Tensor, group_size: int, *, dim: int = -1) -> Tensor:
    """Return the sums over each group of the K columns that lie along `dim`: G in the place of K."""
    K, dim = values.shape[dim], dim % values.dim()
    g = group_columns(K, group_size)
    whole = K // g * g
    sums = values.narrow(dim, 0, whole).unflatten(dim, (-1, g)).sum(dim + 1) if whole else values.narrow(dim, 0, 0)
    if whole == K:
        return sums
    return torch.cat([sums, values.narrow(dim, whole, K - whole).sum(dim, keepdim=True)], dim)
