"""Buffers that follow a model to another device and refuse a change of dtype.

`model.to(torch.bfloat16)` casts buffers too, and would keep 8 bits of a mean near 15 or of a codebook.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Float32Buffers(nn.Module):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self
