"""What every kernel of a packed layer is asked: as exact as torch, the same twice, and not a byte outside.

On a CPU the kernels run in Triton's interpreter (tests/conftest.py), which knows no bfloat16 and takes seconds a case.
"""

from collections.abc import Callable

import torch
from packed_weights import explicit, random_weight
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """Operands of one product, x W~^T + b; fp16 scales, so that float16 and float32 have the same weight."""

    def __init__(self, M: int, N: int, K: int, *, bits=2, group_size=64, dtype=torch.float32, bias=True, offset=0.0):
        generator = torch.Generator().manual_seed(M + N + K)
        self.weight = random_weight(N, K, bits=bits, group_size=group_size, dtype=torch.float16, device=DEVICE)
        self.x_MK = (torch.randn(M, K, generator=generator) + offset).to(DEVICE, dtype)
        self.bias_N = torch.randn(N, generator=generator).to(DEVICE, dtype) if bias else None
        self.name = f"{M} x {N} x {K}, {bits} bits in groups of {group_size}, {dtype}"

    def run(self, kernel: Callable[..., Tensor], **settings) -> Tensor:
        _, _, bits, group_size = self.weight.layout
        form = {"bits": bits, "group_size": group_size}
        return kernel(self.x_MK, self.weight.codes, self.weight.scale_zero_GN2, self.bias_N, **form, **settings)

    def assert_as_exact_as_torch(self, y_MN: Tensor) -> None:
        """At most twice as far from float64 as torch with the dequantised weight in the type of x."""
        x_MK, dtype = self.x_MK, self.x_MK.dtype
        bias = None if self.bias_N is None else self.bias_N.double()
        exact = explicit(x_MK.double(), self.weight, self.weight.scale_zero_GN2.double(), bias)
        identity = torch.eye(x_MK.shape[1], dtype=torch.float64, device=x_MK.device)
        weight_NK = explicit(identity, self.weight, self.weight.scale_zero_GN2.double()).T.to(dtype)
        plain = torch.nn.functional.linear(x_MK, weight_NK, self.bias_N)
        assert y_MN.dtype == dtype and y_MN.shape == exact.shape, self.name
        error, allowed = (y_MN - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed + 1e-6, f"{self.name}: kernel {error:.3g}, torch {allowed:.3g}"


def assert_nothing_is_written_outside(monkeypatch, case: Case, kernel: Callable[..., Tensor], **settings) -> None:
    """Every tensor that a launcher makes lies between guards; afterwards they are as they were."""
    guarded, guard, empty = [], 4096, Tensor.new_empty

    def between_guards(like, *shape, dtype=None, device=None):
        dtype, size = dtype or like.dtype, torch.Size(shape if isinstance(shape[0], int) else shape[0])
        if not size.numel():  # the interpreter's own
            return empty(like, size, dtype=dtype, device=device or like.device)
        whole = torch.full((size.numel() + 2 * guard,), torch.nan, dtype=dtype, device=like.device)
        guarded.append((whole, size.numel()))
        return whole[guard : guard + size.numel()].view(size)

    monkeypatch.setattr(Tensor, "new_empty", between_guards)
    y_MN = case.run(kernel, **settings)
    monkeypatch.setattr(Tensor, "new_empty", empty)
    case.assert_as_exact_as_torch(y_MN)
    assert len(guarded) >= 2, "the launcher allocates otherwise: this test sees nothing"
    for whole, size in guarded:
        assert whole[:guard].isnan().all() and whole[guard + size :].isnan().all(), case.name
        assert not whole[guard : guard + size].isnan().any(), f"{case.name}: not all was written"
