"""A key-value cache whose columns are tokens of many beams: appended in place, thinned out when it is full.

Transformers' own cache is copied as a whole for every token. Here keys and values lie in a buffer with room at the end.
When it is full, the columns that no beam descends from are dropped, and the buffer is made anew: so it stays about as
long as one hypothesis, however many beams have died. An utterance that leaves is overwritten by the last one.
Shape letters: U utterances, H heads, T columns, D width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

ROOM = 64  # columns that a new buffer has free, at least


class TreeLayer(DynamicLayer):
    """One layer's buffers, of which the first `rows` and `columns` are in use."""

    def __init__(self, keys_UHTD: Tensor, values_UHTD: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys_UHTD, values_UHTD, True
        self.dtype, self.device = keys_UHTD.dtype, keys_UHTD.device
        self.rows, self.columns = keys_UHTD.shape[0], keys_UHTD.shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append columns; return all keys and values."""
        first, self.columns = self.columns, self.columns + key_states.shape[2]
        seen = []
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[: self.rows, :, first : self.columns] = new
            seen.append(buffer[: self.rows, :, : self.columns])
        return seen[0], seen[1]

    def get_seq_length(self) -> int:
        return self.columns


class TreeCache(Cache):
    """Made from the caches of groups of prompts, the shorter ones padded on the left."""

    def __init__(self, groups: Sequence[DynamicCache]):
        layers = [[group.layers[n] for group in groups] for n in range(len(groups[0].layers))]
        super().__init__(
            layers=[
                TreeLayer(stacked([layer.keys for layer in of]), stacked([layer.values for layer in of]))
                for of in layers
            ]
        )

    @property
    def rows(self) -> int:
        return self.layers[0].rows

    @property
    def columns(self) -> int:
        return self.layers[0].columns

    def has_room(self, columns: int) -> bool:
        return self.columns + columns <= self.layers[0].keys.shape[2]

    def thin_out(self, columns_UT: Tensor, *, room: int) -> None:
        """Keep these columns of each utterance, in this order, and make room for more."""
        for layer in self.layers:
            layer.keys = gathered(layer.keys[: layer.rows], columns_UT, room=room)
            layer.values = gathered(layer.values[: layer.rows], columns_UT, room=room)
            layer.columns = columns_UT.shape[1]

    def keep(self, rows: Sequence[int]) -> dict[int, int]:
        """Drop all other rows; return where each of these now lies."""
        gaps = sorted(set(range(len(rows))) - set(rows))
        moved = dict(zip(sorted(row for row in rows if row >= len(rows)), gaps))
        for layer in self.layers:
            for old, new in moved.items():
                layer.keys[new, :, : layer.columns] = layer.keys[old, :, : layer.columns]
                layer.values[new, :, : layer.columns] = layer.values[old, :, : layer.columns]
            layer.rows = len(rows)
        return {row: moved.get(row, row) for row in rows}


def stacked(groups: list[Tensor]) -> Tensor:
    """Return the groups' states one under the other, the last columns aligned; padding is zero."""
    widest = max(group.shape[2] for group in groups)
    padded = [torch.nn.functional.pad(group, (0, 0, widest - group.shape[2], 0)) for group in groups]
    return torch.cat(padded) if len(padded) > 1 else padded[0]


def gathered(states_UHTD: Tensor, columns_UT: Tensor, *, room: int = 0) -> Tensor:
    """Return these columns of each utterance, followed by `room` empty ones."""
    U, H, _, D = states_UHTD.shape
    T = columns_UT.shape[1]
    buffer = states_UHTD.new_zeros(U, H, T + room, D)
    torch.gather(states_UHTD, 2, columns_UT[:, None, :, None].expand(U, H, T, D), out=buffer[:, :, :T])
    return buffer
