"""Targets of a block between two truths: what its full-precision form makes of the inputs it has, and of full ones.

Towards its own output on inputs that carry the error of the blocks before it, a block repairs itself alone ("own", the
official decoupleQ). Towards the output of the full-precision path ("full") it repairs what came before it too.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class MixedTargets(Sequence):
    """share * full + (1 - share) * own, batch by batch, each made when it is asked for."""

    def __init__(self, full: Sequence[Tensor], own: Sequence[Tensor], *, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"the share of the full-precision path in a target is {share}; give a number from 0 to 1")
        if len(full) != len(own):
            raise ValueError(
                f"{len(full)} targets of the full path and {len(own)} own ones cannot be mixed; give as many"
            )
        self.full, self.own, self.share = full, own, share

    def __len__(self) -> int:
        return len(self.full)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return MixedTargets(self.full[at], self.own[at], share=self.share)
        # Not lerp of the two as they are: in 16 bits the difference of large numbers would be rounded.
        return self.own[at].float().lerp(self.full[at].float(), self.share)
