"""Which sequences of calibration batches judge a refinement and which train it: a seeded split.

Whole batches are held out where that comes near the fraction asked for, as no batch is then run twice; where batches
are few, single sequences are, and the other sequences of such a batch train.
Shape letters: B sequences of a batch, T positions, D width; valid_BT may have no T (rows that are positions).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """For each batch, which of its sequences count: boolean [B], on the CPU."""

    train: list[Tensor]
    held_out: list[Tensor]


def split_sequences(usable: Sequence[Tensor], *, fraction: float, seed: int, name: str) -> Split:
    """Hold out about `fraction` of the usable sequences, at least one; `usable` has a boolean [B] for each batch.

    ValueError, naming the block, where fewer than two can be used.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = [at for at, usable_B in enumerate(usable) if usable_B.any()]
    if len(batches) * fraction >= 1:
        chosen = {batches[i] for i in torch.randperm(len(batches), generator=generator)[: _share(batches, fraction)]}
        held_out = [usable_B & (at in chosen) for at, usable_B in enumerate(usable)]
    else:
        sequences = [(at, row) for at in batches for row in usable[at].nonzero()[:, 0].tolist()]
        if len(sequences) < 2:
            raise ValueError(
                f"{name}: {len(sequences)} calibration sequence with valid positions; refinement needs at least two, "
                "one of them held out: give more calibration data, or turn refinement off"
            )
        held_out = [torch.zeros_like(usable_B) for usable_B in usable]
        for i in torch.randperm(len(sequences), generator=generator)[: _share(sequences, fraction)].tolist():
            at, row = sequences[i]
            held_out[at][row] = True
    return Split([usable_B & ~held_B for usable_B, held_B in zip(usable, held_out)], held_out)


def _share(items: Sequence, fraction: float) -> int:
    return min(max(1, round(fraction * len(items))), len(items) - 1)
