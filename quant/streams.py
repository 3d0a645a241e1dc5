"""A stream of calibration batches through the blocks of a part: where each batch stands, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .activations import ActivationStore, Stored, StoredInputs, Surroundings, device_of, hidden_of
from .blocks import Part
from .door import capture
from .ranks import Ranks
from .targets import Target

# Yields (number among the batches of all ranks, batch) of this rank's batches, each time anew and in the same order.
ReadBatches = Callable[[], Iterable[tuple[int, Any]]]


class Stream:
    """This rank's batches between two blocks of `model`. `around` is what each block is called with beside them."""

    def __init__(
        self, model: nn.Module, store: ActivationStore, numbers: list[int], around: dict[str, list[Surroundings]]
    ):
        self.model, self.store, self.numbers, self.around = model, store, numbers, around

    @classmethod
    def at_the_door(
        cls, model: nn.Module, part: Part, span: list[str], read: ReadBatches, *, store: ActivationStore
    ) -> Stream:
        """Take every batch to the first block of `span`, which are blocks of `part` in order."""
        numbers: list[int] = []
        around: dict[str, list[Surroundings]] = {block: [] for block in span}
        with torch.no_grad():
            for number, batch in read():
                captured = capture(model, span, part.start(batch))
                store.put(number, captured.hidden_BTD)
                numbers.append(number)
                for block in span:
                    around[block].append(captured.surroundings[block])
        return cls(model, store, numbers, around)

    def inputs(self, block: str) -> StoredInputs:
        """Return what a block that the stream stands before would be called with, on its device."""
        return StoredInputs(self.hidden(block), self.around[block])

    def hidden(self, block: str) -> Stored:
        """Return the hidden states alone, on the device of a block."""
        return Stored(self.store, self.numbers, device=device_of(self.model.get_submodule(block)))

    def advance(self, block: str) -> None:
        """Send every batch through a block."""
        self.behind(block, store=self.store)

    def behind(self, block: str, *, store: ActivationStore) -> Stream:
        """Return the batches behind a block, in another store; this stream stays before it."""
        module, inputs = self.model.get_submodule(block), self.inputs(block)
        with torch.no_grad():
            for at, number in enumerate(self.numbers):
                given = inputs[at]
                store.put(number, hidden_of(module(*given.args, **given.kwargs)))
        return Stream(self.model, store, self.numbers, self.around)

    def of_all_ranks(self, block: str, ranks: Ranks) -> Stream:
        """Return the batches of all ranks in their order; all ranks call it, and their stores lie in files."""
        if ranks.size == 1:
            return self
        shares = ranks.gather((self.numbers, self.around[block]))
        every = sorted((pair for share in shares for pair in zip(*share)), key=lambda pair: pair[0])
        around = {block: [one for _, one in every]}
        return Stream(self.model, self.store, [number for number, _ in every], around)


def touched(part: Part, targets: Mapping[str, Target]) -> list[str]:
    """Return a part's blocks from the first to the last that has something to quantise."""
    having = [at for at, block in enumerate(part.blocks) if within(targets, block)]
    return part.blocks[having[0] : having[-1] + 1] if having else []


def within(targets: Mapping[str, Target], block: str) -> dict[str, Target]:
    """Return the targets that lie in a block, or are it."""
    return {name: target for name, target in targets.items() if name == block or name.startswith(f"{block}.")}
