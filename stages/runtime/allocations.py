"""The memory that tensors take while code runs: bytes alive now, the most at once, and how it came to that.

Every operation is seen as torch dispatches it, forward, backward and optimizer alike, on real tensors as on fake ones,
which have shapes and no values: so a model of any size is measured on any machine. A storage counts from the operation
that made it until it is freed, views of it count once. What a kernel takes and gives back within one operation, and
what an allocator rounds up or cannot use again, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts storages made while it is entered. `known` are tensors that lived before, which it leaves out."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:
            self._note(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, counted=True)
        self.peak = max(self.peak, self.live)
        return out

    def restart_peak(self) -> int:
        """Return the most that was alive since the last call, and begin anew from what is alive now."""
        peak, self.peak = self.peak, self.live
        return peak

    def _note(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if counted and tensor.device.type != "meta" else 0

        def freed(_: Any) -> None:
            self._seen.pop(key, None)
            self.live -= size

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
