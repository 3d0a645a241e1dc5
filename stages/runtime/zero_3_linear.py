"""What multiplies in linear layers: torch's operation, or the Function that DeepSpeed puts in its place under ZeRO 3.

The Function saves its input for the backward pass even where the weight is frozen, and saves it as it came, in 32 bits
where autocast multiplies in 16: a step under ZeRO 3 has other activations than under the other stages. Once ZeRO 3 was
used in a process, it stays in the place of torch's own for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn

from .world import import_deepspeed


@contextmanager
def linear_layers(*, zero_3: bool) -> Iterator[None]:
    """Multiply on the CPU as a step under ZeRO 3 does, or as one under another stage, whatever was used before."""
    if not zero_3:
        with mock.patch.object(nn.functional, "linear", torch._C._nn.linear):
            yield
        return
    import_deepspeed()
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.zero import linear

    cpu = CPU_Accelerator()  # the Function asks the accelerator, which may be a GPU, whether it is under autocast
    with mock.patch.object(nn.functional, "linear", linear.zero3_linear_wrap):
        with mock.patch.object(linear, "get_accelerator", lambda: cpu):
            yield
