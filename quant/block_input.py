"""One calibration batch at a block's door.

B is the batch, T the positions and D the width of the hidden states. A block is called as ``block(*args, **kwargs)``; what goes
from block to block is its first argument [B, T, D], the rest (masks, position embeddings, positions) is the same for all
blocks of a part.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockInput(NamedTuple):
    """One batch as a block receives it; ``args[0]`` are the hidden states [B, T, D].

    ``valid_BT`` is a boolean mask of the positions that are no padding, or None where every position counts.
    """

    args: tuple
    kwargs: dict
    valid_BT: Tensor | None
