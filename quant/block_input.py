"""One calibration batch at a block's door.

A block is called as `block(*args, **kwargs)`. What goes from block to block is its first argument, the hidden states;
the rest (masks, position embeddings) stands beside them.
Shape letters: B utterances or sequences, T positions, D width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockInput(NamedTuple):
    """One batch as a block receives it; `args[0]` are the hidden states [B, T, D].

    `valid_BT` is a boolean mask of the positions that are no padding, or None where every position counts.
    """

    args: tuple
    kwargs: dict
    valid_BT: Tensor | None
