"""A model that ZeRO-3 has cut up, whole for a while: in the memory of the CPU, as a GPU may have no room for it.

Weights are gathered one at a time, so that on the GPU the largest one comes on top of what training holds, and no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .world import import_deepspeed


@contextlib.contextmanager
def whole_weights(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Put whole copies on the CPU in the place of a model's parameters and buffers; to be entered on all ranks.

    A rank that does not `keep` them takes part in the gathering and is left with the shards that it has.
    """
    gathering = import_deepspeed().zero.GatheredParameters
    copies: dict[int, Tensor] = {}
    for parameter in model.parameters():
        with gathering([parameter]):
            if keep:
                copies[id(parameter)] = nn.Parameter(_on_cpu(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers() if keep else ():
        copies[id(buffer)] = _on_cpu(buffer)
    # Other tensors, not other data of these: a parameter whose data change device loses its gradient accumulator, and
    # with it the hooks by which DeepSpeed hears of gradients.
    own = [
        (held, name, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if id(tensor) in copies
    ]
    try:
        for held, name, tensor in own:
            held[name] = copies[id(tensor)]
        yield
    finally:
        for held, name, tensor in own:
            held[name] = tensor


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
