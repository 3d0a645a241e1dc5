"""A tree cache whose buffers stay where they are, as a recorded step needs them: it is replayed on fixed addresses.

Buffers are as large as the largest search so far and outlive it; those in use are the first rows and columns. What
nobody has written yet is zero, and what an earlier search has left is finite: a mask does not hide a NaN.

Shape letters: U utterances, H heads, T columns, D width of a head, Q columns that a step appends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .tree_cache import TreeCache, TreeLayer, gathered, stacked

COLUMNS = 64  # the fewest that buffers grow by


def bucket(size: int, *, least: int = 1) -> int:
    """Return `size` rounded up to one of four sizes an octave, or a multiple of `least`."""
    step = max(least, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step


class StaticCache(TreeCache):
    """Made for a first search, loaded again for each further one."""

    def __init__(self, groups: Sequence[DynamicCache], *, room: int):
        Cache.__init__(
            self, layers=[TreeLayer(layer.keys[:0, :, :0], layer.values[:0, :, :0]) for layer in groups[0].layers]
        )
        self.load(groups, room=room)

    def load(self, groups: Sequence[DynamicCache], *, room: int) -> None:
        """Begin with the caches of groups of prompts; there will be `room` for more columns."""
        for n, layer in enumerate(self.layers):
            keys_UHTD = stacked([group.layers[n].keys for group in groups])
            values_UHTD = stacked([group.layers[n].values for group in groups])
            rows, columns = keys_UHTD.shape[0], keys_UHTD.shape[2]
            layer.keys = _grown(layer.keys, rows=rows, columns=columns + room)
            layer.values = _grown(layer.values, rows=rows, columns=columns + room)
            layer.keys[:rows, :, :columns], layer.values[:rows, :, :columns] = keys_UHTD, values_UHTD
            layer.rows, layer.columns = rows, columns

    def thin_out(self, columns_UT: Tensor, *, room: int) -> None:
        """Keep these columns of each utterance, in this order. Buffers move only where there is less than `room`."""
        rows, columns = columns_UT.shape
        for layer in self.layers:
            keys_UHTD = gathered(layer.keys[:rows], columns_UT)
            values_UHTD = gathered(layer.values[:rows], columns_UT)
            layer.keys = _grown(layer.keys, rows=rows, columns=columns + room)
            layer.values = _grown(layer.values, rows=rows, columns=columns + room)
            layer.keys[:rows, :, :columns], layer.values[:rows, :, :columns] = keys_UHTD, values_UHTD
            layer.columns = columns

    def append(self, columns: int) -> int:
        """Count that many more columns in; return the first of them."""
        first = self.columns
        for layer in self.layers:
            layer.columns += columns
        return first


class StaticLayer(DynamicLayer):
    """One layer of the cache as a step sees it: the first rows and columns, new ones written where `write_Q` says."""

    def __init__(self, keys_UHTD: Tensor, values_UHTD: Tensor, write_Q: Tensor):
        super().__init__()
        self.keys, self.values, self.write_Q, self.is_initialized = keys_UHTD, values_UHTD, write_Q, True
        self.dtype, self.device = keys_UHTD.dtype, keys_UHTD.device

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the new columns; return all of them."""
        self.keys.index_copy_(2, self.write_Q, key_states)
        self.values.index_copy_(2, self.write_Q, value_states)
        return self.keys, self.values


def _grown(buffer_UHTD: Tensor, *, rows: int, columns: int) -> Tensor:
    """Return the buffer, or an empty one in its place that has so many rows and columns, and as many as it has."""
    U, H, T, D = buffer_UHTD.shape
    if rows <= U and columns <= T:
        return buffer_UHTD
    with torch.inference_mode(False):  # or a later search outside of that mode could not write to them
        return buffer_UHTD.new_zeros(max(U, bucket(rows)), H, max(T, bucket(columns, least=COLUMNS)), D)
