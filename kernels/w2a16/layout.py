"""What the bytes of a packed weight mean, and in which pieces they are read where the whole would be too much.

Shape letters: N output channels, K input channels, G groups per row, P columns of a span (packing.py).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .groups import group_columns, group_count
from .packing import packed_rows, span

TILE_ELEMENTS = 1 << 22  # of a weight that are dequantised at a time: 16 MB in float32


class Layout(NamedTuple):
    N: int
    K: int
    bits: int
    group_size: int

    @property
    def G(self) -> int:
        return group_count(self.K, self.group_size)

    @property
    def rows(self) -> int:
        """Return the rows of codes, uint8 [rows, N]; ValueError where bits or group size have no packed form."""
        return packed_rows(self.K, bits=self.bits, group_size=self.group_size)

    def check(self, codes: Tensor, scale_zero_GN2: Tensor) -> None:
        """Raise ValueError where the tensors are not those of such a weight."""
        for name, found, wanted in (
            ("codes", codes, (self.rows, self.N)),
            ("scale_zero", scale_zero_GN2, (self.G, self.N, 2)),
        ):
            if found.shape != wanted:
                raise ValueError(
                    f"{name} has shape {list(found.shape)}; a weight of {self.N} outputs and {self.K} inputs at "
                    f"{self.bits} bits in groups of {self.group_size} has {list(wanted)}"
                )

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
