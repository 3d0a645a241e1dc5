"""Second moments of a layer's inputs, H = X^T X / n over the tokens that are no padding.

Sums are float64. Where a device's float64 is slow, products of 1,024 tokens at a time may be taken in float32 and only
their sum in float64: what is lost is the rounding within one such product, about 1e-7 of the geometric mean of the two
columns' moments, however many tokens follow. Nothing waits for the device until the moments are asked for.
Shape letters: K input channels, n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .exact_products import exact_products
from .ranks import Ranks

ARITHMETICS = ("float64", "float32")
CHUNK_ELEMENTS = 1 << 24  # of X in float64 at a time: 128 MB
FLOAT32_TOKENS = 1024


class InputMoments:
    """Running sum of X^T X. `name` is what an error calls the layer."""

    def __init__(self, width: int, *, name: str, device: torch.device | str = "cpu", arithmetic: str = "float64"):
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic is {arithmetic!r}; choose one of {', '.join(ARITHMETICS)}")
        self.name, self.arithmetic = name, arithmetic
        self.sum_KK = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._finite: dict[int, Tensor] = {}  # batch -> whether all that counts in it was finite

    def add(self, x: Tensor, valid: Tensor | None = None, *, batch: int = 0) -> None:
        """Add inputs [..., K]; `valid` [...] is boolean, False for padding, whose values do not matter at all."""
        x_nK = x.detach().reshape(-1, x.shape[-1])
        if valid is None:
            self._count += len(x_nK)
        else:
            valid_n1 = valid.reshape(-1, 1)
            assert len(valid_n1) == len(x_nK), f"{self.name}: {len(x_nK)} tokens, and a mask of {len(valid_n1)}"
            self._count += valid_n1.sum()
            x_nK = torch.where(valid_n1, x_nK, 0)
        finite = torch.isfinite(x_nK).all()
        self._finite[batch] = self._finite[batch] & finite if batch in self._finite else finite
        for chunk_nK in x_nK.split(self._chunk(x_nK.shape[1])):
            self.sum_KK += self._product(chunk_nK)

    def merge(self, ranks: Ranks) -> None:
        """Make this the moments of all ranks' tokens; all ranks call it. ValueError on all where one has NaN.

        Sums are float64 in the order of ranks: for another number of them they differ by 1e-16 of their size.
        """
        bad = [batch for batches in ranks.gather(self._not_finite()) for batch in batches]
        self._require_finite(bad)
        if ranks.size > 1:
            self.sum_KK = ranks.sum_floats(self.sum_KK.cpu()).to(self.sum_KK.device)
            self._count = ranks.sum_floats(self._count.cpu().reshape(1)).reshape(()).to(self._count.device)

    @property
    def count(self) -> int:
        """Tokens so far."""
        return int(self._count)

    def mean_KK(self) -> Tensor:
        """Return H in float64; zeros where no token was seen. ValueError names layer and batch of a NaN or infinity."""
        self._require_finite(self._not_finite())
        return self.sum_KK / self._count.clamp(min=1)

    def _not_finite(self) -> list[int]:
        return [batch for batch, finite in self._finite.items() if not finite]

    def _require_finite(self, bad: list[int]) -> None:
        if bad:
            raise ValueError(
                f"{self.name}: its inputs hold NaN or infinity in calibration batch {min(bad)}; the model overflows on "
                "it: leave that audio out, or calibrate in a wider type (precision=fp32)"
            )

    def _chunk(self, width: int) -> int:
        return max(1, CHUNK_ELEMENTS // width) if self.arithmetic == "float64" else FLOAT32_TOKENS

    def _product(self, chunk_nK: Tensor) -> Tensor:
        if self.arithmetic == "float64":
            chunk_nK = chunk_nK.double()
            return chunk_nK.T @ chunk_nK
        chunk_nK = chunk_nK.float()
        with exact_products(chunk_nK.device):
            return (chunk_nK.T @ chunk_nK).double()
