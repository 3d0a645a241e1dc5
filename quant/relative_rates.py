"""What learns in a block whose integers are frozen, each tensor at a rate relative to its own size.

A step of Adam moves a parameter by about its learning rate, whatever its gradient; an absolute rate would be a tenth
of one scale and a millionth of another. So the rate of
- the ratios of scales and the shifts of centres is `lr` itself, as they are relative already (quant/tuned.py);
- a bias is `lr` times its root mean square;
- weight and bias of a norm is `norm_lr` times the root mean square of the weight, which is what comes out of the norm.
Nothing decays: weight decay would pull scales and norms to 0.
"""

import logging
from typing import Any

import torch
from torch import nn

from .packed_model import tuned_modules

log = logging.getLogger(__name__)


def relative_groups(
    block: nn.Module, *, lr: float, norm_lr: float, norms: bool, biases: bool, name: str
) -> list[dict[str, Any]]:
    """Freeze all of `block` but what learns, and return that as optimizer groups ({"params", "lr"}), one a tensor.

    `block` has its packed modules in their trainable form. A tensor whose size is 0 has no rate; it stays as it is,
    and a line in the log says so.
    """
    block.requires_grad_(False)
    rates: dict[str, tuple[nn.Parameter, float, float]] = {}  # parameter, its size, rate relative to it
    for path, module in block.named_modules():
        own = dict(module.named_parameters(prefix=path, recurse=False))
        if "norm" in type(module).__name__.lower():
            size = _rms(module.weight) if getattr(module, "weight", None) is not None else 0.0
            rates |= {key: (one, size, norm_lr) for key, one in own.items() if norms}
        elif biases:
            biases_of = {key: one for key, one in own.items() if key.rpartition(".")[2] == "bias"}
            rates |= {key: (one, _rms(one), lr) for key, one in biases_of.items()}
    for path, module in tuned_modules(block).items():
        for key, one in module.named_parameters(prefix=path):
            if key.rpartition(".")[2] != "bias":
                rates[key] = (one, 1.0, lr)
    still = [key for key, (_, size, _) in rates.items() if size == 0]
    if still:
        log.warning("%s: %s: all zeros, which no learning rate is relative to; refinement leaves them", name, still)
    return [{"params": [one.requires_grad_()], "lr": rate * size} for one, size, rate in rates.values() if size]


def _rms(values: torch.Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())
