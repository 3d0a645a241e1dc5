"""How far training has moved the scales of a model, and how far 16 bits move them again when it is folded.

A change that is smaller than the rounding has no effect on what is stored: bfloat16 holds a scale to 0.2 to 0.4 %,
float16 to 0.02 to 0.05 %.

Shape letters: E experts (where a module holds a matrix for each), N output channels, G groups per row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .packed_model import tuned_modules
from .tuned import tuned_scale_zero

SCALES = ("scale_ratio", "centre_shift")  # how the names of a matrix's trained parameters begin


def tuned_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold the scales of one matrix, or of one for each expert, while they are trained."""
    return {
        f"{name}.{inner}".strip("."): owner
        for name, module in tuned_modules(model).items()
        for inner, owner in module.named_modules()
        if _own(owner, SCALES[0])
    }


@dataclass
class TrainedScales:
    """The scales of a model before it is folded; `moved` compares them with those after it."""

    changes: list[Tensor]  # of each matrix: |scale / what it was - 1|
    exact: dict[str, Tensor]  # of each matrix, by its module's name: scale_zero [G, N, 2] or [E, G, N, 2] in float32

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "TrainedScales":
        matrices = tuned_matrices(model)
        changes = [(ratio - 1).abs() for owner in matrices.values() for ratio in _own(owner, SCALES[0])]
        return cls(changes, {name: _scale_zero(owner) for name, owner in matrices.items()})

    def moved(self, folded: nn.Module) -> dict[str, float]:
        """Return means and maxima: relative change of scales by training, scales and zeros by rounding, in scales."""
        roundings = []
        for name, exact in self.exact.items():
            unit = exact[..., :1].abs().clamp_min(torch.finfo(torch.float32).tiny)
            roundings.append((exact - folded.get_submodule(name).scale_zero.float()).abs() / unit)
        found = {}
        for name, parts in (("scale_change", self.changes), ("rounding", roundings)):
            values = torch.cat([part.flatten() for part in parts])
            found |= {f"{name}_mean": float(values.mean()), f"{name}_max": float(values.max())}
        return found


def _own(owner: nn.Module, kind: str) -> list[nn.Parameter]:
    return [p for name, p in owner.named_parameters(recurse=False) if name.startswith(kind)]


def _scale_zero(owner: nn.Module) -> Tensor:
    start, bits = owner.initial_scale_zero, owner.layout.bits
    (ratio,), (shift,) = (_own(owner, kind) for kind in SCALES)
    parts = zip(start, ratio, shift) if start.dim() == 4 else [(start, ratio, shift)]
    return torch.stack([tuned_scale_zero(*part, bits=bits) for part in parts]).reshape(start.shape)
