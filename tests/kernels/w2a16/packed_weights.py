"""Random packed weights for tests, and the layer written out as anyone would write it."""

from typing import NamedTuple

import torch
from torch import Tensor

from seedling.kernels.w2a16.groups import group_count
from seedling.kernels.w2a16.layout import Layout
from seedling.kernels.w2a16.packing import pack_codes


class Weight(NamedTuple):
    layout: Layout
    codes_NK: Tensor
    codes: Tensor  # packed
    scale_zero_GN2: Tensor


def random_weight(N: int, K: int, *, bits=2, group_size=64, dtype=torch.float32, seed=0, device="cpu") -> Weight:
    """Codes over the whole range; scales of both signs; zeros beside them."""
    generator = torch.Generator().manual_seed(seed)
    codes_NK = torch.randint(0, 2**bits, (N, K), generator=generator).to(torch.uint8)
    scale_zero_GN2 = torch.randn(group_count(K, group_size), N, 2, generator=generator).to(dtype)
    codes = pack_codes(codes_NK, bits=bits, group_size=group_size)
    return Weight(Layout(N, K, bits, group_size), codes_NK.to(device), codes.to(device), scale_zero_GN2.to(device))


def explicit(x: Tensor, weight: Weight, scale_zero_GN2: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x (s * c + z)^T + b, for autograd, in the type of x."""
    K = weight.layout.K
    group_K = torch.arange(K, device=x.device) // (K if weight.layout.group_size == -1 else weight.layout.group_size)
    scale_NK, zero_NK = (values_GN[group_K].T for values_GN in scale_zero_GN2.unbind(-1))
    y = x @ (scale_NK * weight.codes_NK.to(x.dtype) + zero_NK).T
    return y if bias_N is None else y + bias_N
