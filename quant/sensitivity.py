"""What each module loses at each number of bits, and which bits to give to whom within a budget.

Errors are relative output errors |(w~ - w) X|^2 / |w X|^2 on the full-precision activations: every module is measured
alone, with everything before it as it was. The choice is greedy: all modules start where they are stored in the fewest
bits, and the step that takes away most error per bit it costs is made as long as the budget allows. Padding counts: a
row of 128 columns in groups of 64 takes 6.5 bits a weight at 3 bits and 4.5 at 4. Adding up relative errors of modules
says that they harm alike, which is a guess; a measured loss of the whole model would cost a run for every candidate.
Shape letters: N output channels, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .activations import ActivationStore
from .block_moments import block_moments, shared_groups
from .blocks import Part, quantisable
from .expert_inputs import ReplayedCalls
from .expert_layout import PROJECTIONS
from .expert_problems import expert_problems
from .kept_blocks import Kept, kept_for_all
from .layer_error import error_terms
from .linear import PackedLinear
from .ranks import Alone, Ranks
from .solution import LayerSolution
from .streams import ReadBatches, Stream, touched, within
from .targets import Target

Terms = dict[int, tuple[float, float, float]]  # bits -> error and output, both squared, and bits stored


@dataclass(frozen=True)
class Sensitivity:
    """A module's relative output error and stored bits per weight at each number of bits."""

    name: str
    weights: int
    errors: dict[int, float]
    bits_per_weight: dict[int, float]


class SensitivityReport:
    """Measures the modules that `targets` names at all `candidates`, block by block; nothing in the model changes."""

    def __init__(
        self,
        model: nn.Module,
        *,
        candidates: Sequence[int],
        solve: Callable[..., LayerSolution],
        scale_dtype: torch.dtype,
        folder: Path,
        arithmetic: str = "float64",
        memory_gb: float = 8.0,
        kept: Kept | None = None,
        ranks: Ranks | None = None,
    ):
        self.model, self.candidates, self.solve, self.scale_dtype = model.eval(), candidates, solve, scale_dtype
        self.folder, self.arithmetic, self.memory_gb = folder, arithmetic, memory_gb
        self.kept, self.ranks = kept, ranks or Alone()

    def run(self, parts: Sequence[Part], read: ReadBatches, *, targets: Mapping[str, Target]) -> list[Sensitivity]:
        found: list[Sensitivity] = []
        for part in parts:
            if not (span := touched(part, targets)):
                continue
            store = ActivationStore(self.folder, f"{part.name}-sensitivity", limit_bytes=self.memory_gb * 1e9)
            stream = Stream.at_the_door(self.model, part, span, read, store=store)
            for block in span:
                found += self._block(block, stream, within(targets, block))
                if block != span[-1]:
                    stream.advance(block)
            self.ranks.barrier()  # files are deleted for all
            store.clear()
        return found

    def _block(self, block: str, stream: Stream, targets: Mapping[str, Target]) -> list[Sensitivity]:
        name = f"sensitivity-{block}"
        if (kept := kept_for_all(self.kept, name, self.ranks)) is not None:
            return [read_sensitivity(values) for values in kept[1]["modules"]]
        found = self._measured(block, stream, targets) if targets else []
        if self.kept is not None and self.ranks.rank == 0:
            self.kept.save(name, {}, modules=[asdict(one) for one in found])
        self.ranks.barrier()
        return found

    def _measured(self, block: str, stream: Stream, targets: Mapping[str, Target]) -> list[Sensitivity]:
        module, inputs = self.model.get_submodule(block), stream.inputs(block)
        modules = {name: one for name, one in quantisable(self.model, block).items() if name in targets}
        groups = shared_groups(module, modules, inputs, self.ranks)
        linear = [group for group in groups if type(modules[group.names[0]]) is nn.Linear]
        moments = block_moments(module, linear, modules, inputs, arithmetic=self.arithmetic, ranks=self.ranks)
        mine: dict[str, Terms] = {}
        first_of = {name: group.names[0] for group in linear for name in group.names}
        for at, (name, first) in enumerate(first_of.items()):
            if at % self.ranks.size == self.ranks.rank:
                H_KK = moments[first].mean_KK().float()
                mine[name] = self._terms(modules[name].weight, H_KK, targets[name].group_size)
        terms = {name: one for share in self.ranks.gather(mine) for name, one in share.items()}
        for group in groups:
            if group not in linear:
                name = group.names[0]
                calls = ReplayedCalls(module, modules[name], inputs, numbers=inputs.batches)
                terms[name] = self._expert_terms(name, modules[name], calls, targets[name].group_size)
        return [
            _sensitivity(name, sum(p.numel() for p in _matrices(modules[name])), terms[name])
            for group in groups
            for name in group.names
        ]

    def _terms(self, weight_NK: torch.Tensor, H_KK: torch.Tensor, group_size: int) -> Terms:
        terms: Terms = {}
        for bits in self.candidates:
            solution = self.solve(weight_NK.detach().float(), H_KK, bits=bits, group_size=group_size)
            packed = PackedLinear.from_solution(solution, bias=None, scale_dtype=self.scale_dtype)
            lost, whole = error_terms(packed.dequantised_NK(), weight_NK, H_KK)
            terms[bits] = lost, whole, packed.bits_per_weight * weight_NK.numel()
        return terms

    def _expert_terms(self, name: str, experts: nn.Module, calls: ReplayedCalls, group_size: int) -> Terms:
        sums = dict.fromkeys(self.candidates, (0.0, 0.0, 0.0))
        for projection in PROJECTIONS:
            problems = expert_problems(
                experts, calls, name=name, projection=projection, arithmetic=self.arithmetic, ranks=self.ranks
            )
            for problem in problems:
                H_KK = torch.zeros(problem.weight_NK.shape[1:] * 2)
                if problem.moments is not None:
                    H_KK = problem.moments.mean_KK().float()
                for bits, terms in self._terms(problem.weight_NK, H_KK, group_size).items():
                    sums[bits] = tuple(a + b for a, b in zip(sums[bits], terms))
        return sums


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters(recurse=False) if p.dim() > 1 and not name.endswith("bias")]


def _sensitivity(name: str, weights: int, terms: Terms) -> Sensitivity:
    errors = {bits: lost / whole if whole > 0 else 0.0 for bits, (lost, whole, _) in terms.items()}
    return Sensitivity(name, weights, errors, {bits: stored / weights for bits, (_, _, stored) in terms.items()})


def read_sensitivity(values: dict[str, Any]) -> Sensitivity:
    """Return one that was kept as JSON, whose keys are texts."""
    numbers = {key: {int(bits): x for bits, x in values[key].items()} for key in ("errors", "bits_per_weight")}
    return Sensitivity(values["name"], values["weights"], **numbers)


def choose_bits(
    measured: Sequence[Sensitivity], *, budget: float, candidates: Sequence[int], fixed: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the bits of each module, so that stored bits per weight are at most `budget` on the average.

    Each has one of `candidates`; modules in `fixed` keep theirs, which count as well. ValueError where even the fewest
    stored bits are more.
    """
    weights, fixed = sum(one.weights for one in measured), fixed or {}
    chosen = {one.name: fixed[one.name] if one.name in fixed else _cheapest(one, candidates) for one in measured}
    left = budget * weights - sum(one.bits_per_weight[chosen[one.name]] * one.weights for one in measured)
    if left < 0:
        least = budget - left / weights
        raise ValueError(
            f"budget is {budget:g} bits per weight, and the fewest bits cost {least:.3f} with their scales and zeros; "
            "raise budget, or group_size"
        )
    while True:  # ends: every step lowers the error of its module
        steps = []
        for one in (one for one in measured if one.name not in fixed):
            now = chosen[one.name]
            for bits in candidates:
                cost = (one.bits_per_weight[bits] - one.bits_per_weight[now]) * one.weights
                gain = one.errors[now] - one.errors[bits]
                if gain > 0 and cost <= left:
                    steps.append((gain / cost if cost > 0 else math.inf, gain, one.name, bits, cost))
        if not steps:
            return chosen
        *_, name, bits, cost = max(steps)
        chosen[name], left = bits, left - cost


def _cheapest(one: Sensitivity, candidates: Sequence[int]) -> int:
    """Return the candidate that is stored in the fewest bits, of several the one of the least error."""
    return min(candidates, key=lambda bits: (one.bits_per_weight[bits], one.errors[bits]))
