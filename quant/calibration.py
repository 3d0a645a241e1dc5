"""Quantise a model part by part and block by block, each on what the blocks before it, already quantised, send it.

Only what stands between two blocks is kept of a calibration batch, on the host. At a block:
- its modules are solved in the order in which activations pass them, each with the H of what its quantised
  predecessors give it ("true sequential"); modules that read the same tensor share one H;
- with refinement, scales and norms are then trained towards what the block gives in the full-precision model
  (quant/blockwise.py). That takes a second stream, the full-precision one, through the block before it is quantised;
- the block runs once more, and its outputs take the place of its inputs.

On several ranks each has its share of the batches. H is summed over ranks, the modules of a group are shared out to be
solved, and rank 0 refines on everybody's activations. Finished blocks are kept; a run that goes on takes each from
there in place of solving it, and so sees the same activations again.
Shape letters: B utterances, T positions, D width, N output channels, K input channels.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .activations import ActivationStore, StoredInputs
from .block_moments import block_moments, shared_groups
from .blocks import Part, quantisable
from .expert_inputs import ReplayedCalls
from .expert_layout import expert_layout
from .expert_problems import ExpertProblem
from .experts import quantise_experts
from .kept_blocks import Kept, finished_block, install_block, kept_for_all
from .layer_error import error_terms, relative_error
from .linear import PackedLinear
from .mixed_targets import MixedTargets
from .moments import ARITHMETICS, InputMoments
from .packed_experts import PackedExperts
from .packed_model import replace_module
from .ranks import Alone, Ranks
from .report import BlockReport, ModuleReport, read_report
from .shared_inputs import InputGroup
from .solution import LayerSolution
from .streams import ReadBatches, Stream, touched, within
from .targets import Target

NEVER_CALLED = "%s: no calibration batch calls it; it stays in full precision"
log = logging.getLogger(__name__)

Solve = Callable[..., LayerSolution]  # (weight_NK, hessian_KK or None, *, bits, group_size)


class Refine(Protocol):
    """quant/blockwise.py's `refine_block`, with its config bound. It changes the block in place and reports."""

    def __call__(
        self, block: nn.Module, inputs: Sequence, targets_BTD: Sequence[Tensor], *, name: str
    ) -> dict[str, Any]: ...


@dataclass
class CalibrationConfig:
    """How activations and moments are taken."""

    true_sequential: bool = True  # False: all modules of a block on one pass of its full-precision form
    arithmetic: str = "float64"  # float32: products of 1,024 tokens in float32, where float64 is slow
    # Of the full-precision path in a block's targets of refinement: 1 repairs what came before the block as well, 0 is
    # the official decoupleQ, where a block learns its own full-precision output on inputs of the quantised path.
    full_share: float = 1.0
    memory_gb: float = 8.0  # of activations that a rank keeps on the host; what is past it lies in files

    def __post_init__(self):
        if self.arithmetic not in ARITHMETICS:
            choices = ", ".join(ARITHMETICS)
            raise ValueError(f"calibration.arithmetic is {self.arithmetic!r}; choose one of {choices}")
        if not 0 <= self.full_share <= 1:
            raise ValueError(f"calibration.full_share is {self.full_share}; give a share from 0 to 1")
        if self.memory_gb < 0:
            raise ValueError(f"calibration.memory_gb is {self.memory_gb}; give gigabytes, 0 to keep all in files")


class Calibration:
    """Quantises `model` in place. `folder` is for activations past the memory limit; all ranks see it."""

    def __init__(
        self,
        model: nn.Module,
        *,
        solve: Solve,
        scale_dtype: torch.dtype = torch.bfloat16,
        cfg: CalibrationConfig | None = None,
        folder: Path,
        kept: Kept | None = None,
        refine: Refine | None = None,
        ranks: Ranks | None = None,
        on_block: Callable[[BlockReport], None] = lambda report: None,
    ):
        self.model, self.solve, self.scale_dtype = model.eval(), solve, scale_dtype
        self.cfg, self.folder, self.kept, self.refine = cfg or CalibrationConfig(), Path(folder), kept, refine
        self.ranks, self.on_block = ranks or Alone(), on_block

    def run(self, parts: Sequence[Part], read: ReadBatches, *, targets: Mapping[str, Target]) -> list[BlockReport]:
        """Quantise the modules that `targets` names, which lie in blocks of `parts`, and report on every block."""
        spans = [(part, span) for part in parts if (span := touched(part, targets))]
        full: dict[str, Stream] = {}
        if self.refine and self.cfg.full_share:
            # The full-precision stream starts before anything is quantised, in all parts.
            full = {part.name: self._stream(part, span, read, "full") for part, span in spans}
        reports: list[BlockReport] = []
        for part, span in spans:
            streams = self._stream(part, span, read, "quantised"), full.get(part.name)
            for block in span:
                reports.append(self._block(block, *streams, within(targets, block), last=block == span[-1]))
                self.on_block(reports[-1])
            self.ranks.barrier()  # files are deleted for all
            for stream in streams:
                if stream is not None:
                    stream.store.clear()
        self.ranks.barrier()
        if self.ranks.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        return reports

    def _stream(self, part: Part, span: list[str], read: ReadBatches, name: str) -> Stream:
        return Stream.at_the_door(self.model, part, span, read, store=self._store(f"{part.name}-{name}"))

    def _store(self, name: str) -> ActivationStore:
        # Rank 0 refines on all ranks' activations, which it finds in files. The limit is shared by all streams: with
        # refinement one for each of three parts, and one or two on their way.
        in_files = self.refine is not None and self.ranks.size > 1
        gigabytes = 0.0 if in_files else self.cfg.memory_gb / (5 if self.refine else 1)
        return ActivationStore(self.folder, name, limit_bytes=gigabytes * 1e9)

    # ---- one block

    def _block(
        self, block: str, stream: Stream, full: Stream | None, targets: Mapping[str, Target], *, last: bool
    ) -> BlockReport:
        """Quantise one block, or take it from what is kept, and send the batches on."""
        if full is not None:
            full.advance(block)
        found = kept_for_all(self.kept, block, self.ranks)
        if found is not None:
            tensors, facts = found
            install_block(self.model, block, tensors, facts["matrices"])
            report = read_report(facts["report"])
        else:
            own = None
            if self.refine is not None and targets and self.cfg.full_share < 1:
                own = stream.behind(block, store=self._store("own"))
            report = BlockReport(block, self._quantise(block, stream, targets))
            if self.refine is not None and report.modules:
                report.refinement = self._refine(block, stream, full, own)
            if self.kept is not None and self.ranks.rank == 0:
                tensors, matrices = finished_block(self.model, block)
                self.kept.save(block, tensors, matrices=matrices, report=asdict(report))
        self.ranks.barrier()
        if not last:
            stream.advance(block)
        return report

    def _quantise(self, block: str, stream: Stream, targets: Mapping[str, Target]) -> list[ModuleReport]:
        if not targets:
            return []
        module, inputs = self.model.get_submodule(block), stream.inputs(block)
        modules = {name: one for name, one in quantisable(self.model, block).items() if name in targets}
        groups = shared_groups(module, modules, inputs, self.ranks)
        for name in set(modules) - {name for group in groups for name in group.names}:
            log.warning(NEVER_CALLED, name)
        reports = []
        for together in [[group] for group in groups] if self.cfg.true_sequential else [groups]:
            linear = [group for group in together if type(modules[group.names[0]]) is nn.Linear]
            # Taken before any of them is quantised: the others of `together` would see it.
            moments = block_moments(module, linear, modules, inputs, arithmetic=self.cfg.arithmetic, ranks=self.ranks)
            experts = [group.names[0] for group in together if group not in linear]
            packed = {name: self._experts(name, modules[name], module, inputs, targets[name]) for name in experts}
            for group in linear:
                reports += self._solve_group(group, modules, moments[group.names[0]], targets)
            for name, (one, report) in packed.items():
                replace_module(self.model, name, one)
                reports.append(report)
            module = self.model.get_submodule(block)  # a block may be a linear layer itself
        return reports

    def _solve_group(
        self,
        group: InputGroup,
        modules: Mapping[str, nn.Module],
        moments: InputMoments,
        targets: Mapping[str, Target],
    ) -> list[ModuleReport]:
        """Solve modules of one input, shared out over the ranks, and put the packed ones into their places."""
        tokens, H_KK = moments.count, moments.mean_KK().float()
        if 0 < tokens < len(H_KK):
            log.warning(
                "%s: calibrated on %d tokens, fewer than its %d inputs; damping carries what they do not show: give "
                "more calibration data", ", ".join(group.names), tokens, len(H_KK),
            )  # fmt: skip
        solved: dict[str, tuple] = {}
        for at, name in enumerate(group.names):
            if at % self.ranks.size == self.ranks.rank:
                started = time.perf_counter()
                solution = self._solve(name, modules[name].weight, H_KK if tokens else None, targets[name])
                fields = (solution.codes_NK.cpu(), solution.scale_NG.cpu(), solution.zero_NG.cpu())
                solved[name] = (fields, time.perf_counter() - started)
        solved = {name: one for share in self.ranks.gather(solved) for name, one in share.items()}
        reports = []
        for name in group.names:
            (codes_NK, scale_NG, zero_NG), seconds = solved[name]
            solution, was = LayerSolution(codes_NK, scale_NG, zero_NG, *targets[name]), modules[name]
            packed = self._packed(name, solution, was.bias).to(was.weight.device)
            error = relative_error(packed.dequantised_NK(), was.weight, H_KK) if tokens else None
            replace_module(self.model, name, packed)
            reports.append(
                ModuleReport(
                    name=name,
                    bits=targets[name].bits,
                    group_size=targets[name].group_size,
                    weights=was.weight.numel(),
                    bits_per_weight=packed.bits_per_weight,
                    tokens=tokens,
                    error=error,
                    seconds=seconds,
                    fallback="" if tokens else "round to nearest: no tokens",
                )
            )
        return reports

    def _solve(self, name: str, weight_NK: Tensor, H_KK: Tensor | None, target: Target) -> LayerSolution:
        settings = {"bits": target.bits, "group_size": target.group_size}
        if H_KK is None:
            settings["method"] = "rtn"
        try:
            return self.solve(weight_NK.detach().float(), H_KK, **settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _packed(self, name: str, solution: LayerSolution, bias: Tensor | None) -> PackedLinear:
        try:
            return PackedLinear.from_solution(solution, bias=bias, scale_dtype=self.scale_dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _experts(
        self, name: str, experts: nn.Module, block: nn.Module, inputs: StoredInputs, target: Target
    ) -> tuple[PackedExperts, ModuleReport]:
        """Quantise a layer of fused experts; every rank solves all of them, from the moments of all ranks."""
        started, errors, tokens = time.perf_counter(), [], []

        def solve(problem: ExpertProblem) -> LayerSolution:
            H_KK = None if problem.moments is None else problem.moments.mean_KK().float()
            solution = self._solve(problem.name, problem.weight_NK, H_KK, target)
            tokens.append(problem.tokens)
            if H_KK is not None:
                stored = self._packed(problem.name, solution, None)  # scales in 16 bits, as a linear layer is judged
                errors.append(error_terms(stored.dequantised_NK(), problem.weight_NK, H_KK))
            return solution

        packed, fallbacks = quantise_experts(
            experts,
            ReplayedCalls(block, experts, inputs, numbers=inputs.batches),
            solve,
            name=name,
            scale_dtype=self.scale_dtype,
            arithmetic=self.cfg.arithmetic,
            ranks=self.ranks,
        )
        matrices, layout = (packed.gate_up, packed.down), expert_layout(experts, name=name)
        weights = sum(one.weights for one in matrices)
        lost, whole = (sum(terms[i] for terms in errors) for i in (0, 1))
        return packed, ModuleReport(
            name=name,
            bits=target.bits,
            group_size=target.group_size,
            weights=weights,
            bits_per_weight=sum(one.bits_per_weight * one.weights for one in matrices) / weights,
            tokens=sum(tokens[: layout.experts]),
            error=lost / whole if whole else None,
            seconds=time.perf_counter() - started,
            fallback="; ".join(f"{which}: {what}" for which, what in fallbacks.items()),
        )

    def _refine(self, block: str, stream: Stream, full: Stream | None, own: Stream | None) -> dict[str, Any]:
        """Refine a block on rank 0, with the batches of all ranks in their order, and give the others what it made."""
        assert self.refine is not None
        inputs = stream.of_all_ranks(block, self.ranks).inputs(block)
        fulls, owns = (one and one.of_all_ranks(block, self.ranks).hidden(block) for one in (full, own))
        targets = MixedTargets(fulls, owns, share=self.cfg.full_share) if fulls and owns else fulls or owns
        made = None
        if self.ranks.rank == 0:
            module = self.model.get_submodule(block)
            report = self.refine(module, inputs, targets, name=block)
            made = report, {key: value.cpu() for key, value in module.state_dict().items()}
        report, state = self.ranks.gather(made)[0]
        self.model.get_submodule(block).load_state_dict(state)
        return report
