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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .activations import ActivationStore, Stored, StoredInputs, device_of, hidden_of
from .blocks import Part, quantisable
from .door import capture
from .expert_inputs import ReplayedCalls
from .expert_layout import expert_layout
from .expert_problems import ExpertProblem
from .experts import quantise_experts
from .kept_blocks import install_block, packed_block
from .linear import PackedLinear
from .moments import InputMoments
from .packed_experts import PackedExperts
from .ranks import Alone, Ranks
from .shared_inputs import InputGroup, first_input, input_groups
from .solution import LayerSolution
from .targets import Target

log = logging.getLogger(__name__)

Solve = Callable[..., LayerSolution]  # (weight_NK, hessian_KK or None, *, bits, group_size)


class Refine(Protocol):
    """quant/blockwise.py's `refine_block`, with its config bound. It changes the block in place and reports."""

    def __call__(
        self, block: nn.Module, inputs: Sequence, targets_BTD: Sequence[Tensor], *, name: str
    ) -> dict[str, Any]: ...


class Kept(Protocol):
    """Where finished blocks are kept: stages/runtime/kept_work.py."""

    def save(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None: ...
    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None: ...


@dataclass
class CalibrationConfig:
    """How activations and moments are taken."""

    true_sequential: bool = True  # False: all modules of a block on one pass of its full-precision form
    arithmetic: str = "float64"  # float32: products of 1,024 tokens in float32, where float64 is slow
    memory_gb: float = 8.0  # of activations that a rank keeps on the host; what is past it lies in files

    def __post_init__(self):
        if self.memory_gb < 0:
            raise ValueError(f"calibration.memory_gb is {self.memory_gb}; give gigabytes, 0 to keep all in files")


@dataclass
class ModuleReport:
    """What became of a module. `error` is |(w~ - w) X|^2 / |w X|^2 on the calibration inputs, before refinement."""

    name: str
    bits: int
    group_size: int
    weights: int
    bits_per_weight: float
    tokens: int
    error: float | None
    seconds: float
    fallback: str = ""


@dataclass
class BlockReport:
    name: str
    modules: list[ModuleReport] = field(default_factory=list)
    refinement: dict[str, Any] | None = None


class Batches(NamedTuple):
    """This rank's calibration batches. `read()` yields (number among those of all ranks, batch), each time anew."""

    numbers: list[int]
    read: Callable[[], Iterable[tuple[int, Any]]]


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

    def run(self, parts: Sequence[Part], batches: Batches, *, targets: Mapping[str, Target]) -> list[BlockReport]:
        """Quantise the modules that `targets` names, which lie in blocks of `parts`, and report on every block."""
        spans = [(part, span) for part in parts if (span := touched(part, targets))]
        # The full-precision stream starts before anything is quantised, in all parts.
        exact = {part.name: self._stream(part, span, batches, "exact") for part, span in spans} if self.refine else {}
        reports: list[BlockReport] = []
        for part, span in spans:
            stream = self._stream(part, span, batches, "quantised")
            for block in span:
                reports.append(self._block(block, stream, exact.get(part.name), _within(targets, block)))
                self.on_block(reports[-1])
            for finished in (stream, exact.get(part.name)):
                if finished is not None:
                    finished.store.clear()
        self.ranks.barrier()
        if self.ranks.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        return reports

    # ---- activations

    def _stream(self, part: Part, span: list[str], batches: Batches, name: str) -> _Stream:
        """Take every batch to the door of a part."""
        # Rank 0 refines on all ranks' activations, which it finds in files.
        shared = self.refine is not None and self.ranks.size > 1
        limit = 0.0 if shared else self.cfg.memory_gb * 1e9 / (4 if self.refine else 1)
        store = ActivationStore(self.folder, f"{part.name}-{name}", limit_bytes=limit)
        around: dict[str, list] = {block: [] for block in span}
        with torch.no_grad():
            for number, batch in batches.read():
                captured = capture(self.model, span, part.start(batch))
                store.put(number, captured.hidden_BTD)
                for block in span:
                    around[block].append(captured.surroundings[block])
        return _Stream(store, list(batches.numbers), around)

    def _inputs(self, block: str, stream: _Stream) -> StoredInputs:
        device = device_of(self.model.get_submodule(block))
        return StoredInputs(Stored(stream.store, stream.numbers, device=device), stream.around[block])

    def _advance(self, block: str, stream: _Stream) -> None:
        """Send a stream through a block."""
        module, inputs = self.model.get_submodule(block), self._inputs(block, stream)
        with torch.no_grad():
            for at, number in enumerate(stream.numbers):
                given = inputs[at]
                stream.store.put(number, hidden_of(module(*given.args, **given.kwargs)))

    # ---- one block

    def _block(self, block: str, stream: _Stream, exact: _Stream | None, targets: Mapping[str, Target]) -> BlockReport:
        if exact is not None:
            self._advance(block, exact)
        found = self.kept.load(block) if self.kept is not None else None
        if found is not None:
            tensors, facts = found
            install_block(self.model, block, tensors, facts["packed"], scale_dtype=self.scale_dtype)
            report = read_report(facts["report"])
        else:
            report = BlockReport(block, self._quantise(block, stream, targets))
            if self.refine is not None and report.modules:
                assert exact is not None
                report.refinement = self._refine(block, stream, exact)
            if self.kept is not None and self.ranks.rank == 0:
                tensors, packed = packed_block(self.model, block)
                self.kept.save(block, tensors, packed=packed, report=asdict(report))
            self.ranks.barrier()
        self._advance(block, stream)
        return report

    def _quantise(self, block: str, stream: _Stream, targets: Mapping[str, Target]) -> list[ModuleReport]:
        if not targets:
            return []
        module, inputs = self.model.get_submodule(block), self._inputs(block, stream)
        modules = {name: one for name, one in quantisable(self.model, block).items() if name in targets}
        groups = shared_groups(module, modules, inputs, self.ranks)
        for name in set(modules) - {name for group in groups for name in group.names}:
            log.warning("%s: no calibration batch calls it; it stays in full precision", name)
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
                replace(self.model, name, one)
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
            replace(self.model, name, packed)
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
                errors.append(error_terms(solution.dequantised_NK(), problem.weight_NK, H_KK))
            return solution

        packed, fallbacks = quantise_experts(
            experts,
            ReplayedCalls(block, experts, inputs),
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

    def _refine(self, block: str, stream: _Stream, exact: _Stream) -> dict[str, Any]:
        """Refine a block on rank 0, with the batches of all ranks in their order, and give the others what it made."""
        assert self.refine is not None
        if self.ranks.size > 1:
            stream, exact = self._everyones(block, stream), self._everyones(block, exact)
        made = None
        if self.ranks.rank == 0:
            module, device = self.model.get_submodule(block), device_of(self.model.get_submodule(block))
            targets = Stored(exact.store, exact.numbers, device=device)
            report = self.refine(module, self._inputs(block, stream), targets, name=block)
            made = report, {key: value.cpu() for key, value in module.state_dict().items()}
        report, state = self.ranks.gather(made)[0]
        self.model.get_submodule(block).load_state_dict(state)
        return report

    def _everyones(self, block: str, stream: _Stream) -> _Stream:
        """Return a stream of all ranks' batches, whose activations all lie in files."""
        shares = self.ranks.gather((stream.numbers, stream.around[block]))
        every = sorted((pair for share in shares for pair in zip(*share)), key=lambda pair: pair[0])
        return _Stream(stream.store, [number for number, _ in every], {block: [around for _, around in every]})


class _Stream(NamedTuple):
    """Where the batches of this rank stand, and what each block is called with beside them, batch by batch."""

    store: ActivationStore
    numbers: list[int]
    around: dict[str, list]


def touched(part: Part, targets: Mapping[str, Target]) -> list[str]:
    """Return a part's blocks from the first to the last that has something to quantise."""
    having = [at for at, block in enumerate(part.blocks) if _within(targets, block)]
    return part.blocks[having[0] : having[-1] + 1] if having else []


def _within(targets: Mapping[str, Target], block: str) -> dict[str, Target]:
    return {name: target for name, target in targets.items() if name == block or name.startswith(f"{block}.")}


def shared_groups(
    block: nn.Module, modules: Mapping[str, nn.Module], inputs: Sequence, ranks: Ranks
) -> list[InputGroup]:
    """Return the same groups on all ranks: those of rank 0, and what only other ranks' batches reach after them."""
    groups, known = [], set()
    for share in ranks.gather(input_groups(block, modules, inputs)):
        for group in share:
            names = tuple(name for name in group.names if name not in known)
            known |= set(names)
            groups += [InputGroup(names, group.once)] if names else []
    return groups


class _Enough(Exception):
    """Ends a pass of a block where nothing behind is needed."""


def block_moments(
    block: nn.Module,
    groups: Sequence[InputGroup],
    modules: Mapping[str, nn.Module],
    inputs: StoredInputs,
    *,
    arithmetic: str,
    ranks: Ranks,
) -> dict[str, InputMoments]:
    """Return the moments of each group's input, by the group's first name, from one pass over the batches."""
    moments = {
        group.names[0]: InputMoments(
            modules[group.names[0]].in_features,
            name=group.names[0],
            device=modules[group.names[0]].weight.device,
            arithmetic=arithmetic,
        )
        for group in groups
    }
    last = groups[-1].names[0] if len(groups) == 1 and groups[0].once else None
    if groups:
        _take_moments(block, moments, modules, inputs, last=last)
    for one in moments.values():
        one.merge(ranks)
    return moments


@torch.no_grad()
def _take_moments(
    block: nn.Module,
    moments: Mapping[str, InputMoments],
    modules: Mapping[str, nn.Module],
    inputs: StoredInputs,
    *,
    last: str | None,
) -> None:
    now: dict[str, Any] = {}

    def listener(name: str) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_input(args, kwargs)
            moments[name].add(x, _mask_of(x, now["valid_BT"], name), batch=now["number"])
            if name == last:
                raise _Enough

        return listen

    hooks = [modules[name].register_forward_pre_hook(listener(name), with_kwargs=True) for name in moments]
    try:
        for number, given in zip(inputs.batches, _each(inputs)):
            now |= {"number": number, "valid_BT": given.valid_BT}
            try:
                block(*given.args, **given.kwargs)
            except _Enough:
                pass
    finally:
        for hook in hooks:
            hook.remove()


def _each(inputs: StoredInputs) -> Iterator:
    return (inputs[at] for at in range(len(inputs)))


def _mask_of(x: Tensor, valid_BT: Tensor | None, name: str) -> Tensor | None:
    """Return which rows of x count. x is [B, T, K], or [B * T, K] as experts and routers see it."""
    if valid_BT is None or x.shape[:-1] == valid_BT.shape:
        return valid_BT
    if x.dim() == 2 and len(x) == valid_BT.numel():
        return valid_BT.reshape(-1)
    raise ValueError(
        f"{name}: its inputs {list(x.shape)} do not lie as its block's positions {list(valid_BT.shape)}, so that "
        "padding cannot be told apart; leave the module out with a rule of bits=16"
    )


def error_terms(quantised_NK: Tensor, weight_NK: Tensor, H_KK: Tensor) -> tuple[float, float]:
    """Return |(w~ - w) X|^2 / n and |w X|^2 / n."""
    weight_NK, H_KK = weight_NK.detach().float(), H_KK.float()
    difference_NK = quantised_NK.float().to(weight_NK.device) - weight_NK
    lost, whole = ((rows_NK @ H_KK * rows_NK).sum(dtype=torch.float64) for rows_NK in (difference_NK, weight_NK))
    return float(lost), float(whole)


def relative_error(quantised_NK: Tensor, weight_NK: Tensor, H_KK: Tensor) -> float:
    """Return |(w~ - w) X|^2 / |w X|^2; 0 where the layer gives nothing at all."""
    lost, whole = error_terms(quantised_NK, weight_NK, H_KK)
    return lost / whole if whole > 0 else 0.0


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def read_report(values: dict[str, Any]) -> BlockReport:
    """Return a report that was kept as JSON."""
    return BlockReport(**{**values, "modules": [ModuleReport(**one) for one in values["modules"]]})
