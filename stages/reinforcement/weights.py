"""Weights on their way to a worker: what learns, and what buffers hold. A worker has built the frozen rest itself."""

from __future__ import annotations

from typing import NamedTuple

import safetensors.torch
from torch import Tensor, nn

from ..runtime.parameters import digest


class Weights(NamedTuple):
    """What training changes, as it was before step `version`: the bytes of a safetensors file."""

    version: int
    tensors: bytes


def take_weights(model: nn.Module, *, version: int) -> Weights:
    """Copy the weights of a whole model, whatever its device."""
    tensors = {name: tensor.contiguous() for name, tensor in changing(model).items()}
    return Weights(version, safetensors.torch.save(tensors))


def put_weights(model: nn.Module, weights: Weights) -> None:
    """Load what `take_weights` took into a model that was built in the same way."""
    taken, own = safetensors.torch.load(weights.tensors), changing(model)
    if other := sorted(taken.keys() ^ own.keys()):
        raise ValueError(
            f"trainer and worker do not both have a weight {other[0]}; `build` must make the same model twice"
        )
    for name, tensor in own.items():
        tensor.copy_(taken[name])


def changing(model: nn.Module) -> dict[str, Tensor]:
    """Return {name: tensor} of trainable parameters and persistent buffers; each once, under the first of its names."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def frozen_digest(model: nn.Module) -> str:
    """Hash the parameters that do not train. Under ZeRO-3 the model must be whole."""
    return digest(parameter.detach() for parameter in model.parameters() if not parameter.requires_grad)
