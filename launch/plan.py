"""The needs of a training run before it runs: memory of a rank, work of a step, hours, bytes between ranks.

Nothing is guessed but what is said to be: activations and operations are those of the largest planned micro-batch on
fake tensors (stages/runtime/step_trace.py), what ZeRO holds is DeepSpeed's (stages/runtime/zero_memory.py), the share
of a GPU's peak that training reaches (`mfu`) and the links' speeds are the caller's. Micro-batches smaller than the
largest are taken to cost in proportion to their padded audio, which for attention is a little too much.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..data.plan import PlanSummary
from ..stages.runtime.artifacts import load_inputs
from ..stages.runtime.gpus import GPU
from ..stages.runtime.parameters import GroupRow, freeze_others, parameter_table
from ..stages.runtime.stage import LATE
from ..stages.runtime.step_trace import StepTrace, trace_step
from ..stages.runtime.train_config import ZERO_STAGES, TrainConfig
from ..stages.runtime.zero_memory import Memory, Sizes, model_sizes, rank_memory
from .generation_memory import generation_bytes
from .traffic import Traffic, traffic


class RunPlan(NamedTuple):
    """What is known of a run whatever its ranks and ZeRO stage."""

    train: TrainConfig
    groups: list[GroupRow]
    sizes: Sizes
    trace: StepTrace  # of the largest micro-batch
    generation: int  # bytes of keys and values while hypotheses are made, 0 where none are
    largest: str  # what is in that micro-batch, in words
    targets: int  # what its loss is normalised by
    epoch: PlanSummary
    amount: str  # of an epoch, in words
    steps: int
    typical: float  # cost of a micro-batch on average, of the largest one

    @property
    def step_flops(self) -> float:
        """Operations of an optimizer step over all ranks, recomputing left out."""
        return self.trace.flops.model * self.train.micro_batches * self.typical


class Setting(NamedTuple):
    """A ZeRO stage on a number of ranks. `accumulation` is rounded up where the ranks do not divide a step."""

    zero_stage: int
    ranks: int
    accumulation: int
    memory: Memory
    traffic: Traffic

    def fits(self, gpu: GPU) -> bool:
        return self.memory.total <= gpu.usable


def plan_run(stage: Any, cfg: Any) -> RunPlan:
    """Build a stage's model on meta, plan its first epoch, and trace its largest micro-batch."""
    inputs = load_inputs(stage.consumes, cfg.inputs, stage=cfg.stage)
    with torch.device("meta"):
        model = stage.build(cfg, inputs)
    sizes = model_sizes(stage, model, cfg.train)
    groups = parameter_table(model, freeze_others(model, stage.trainable), cfg.train.lr)
    planned = stage.batches(cfg, "train")
    epoch = planned.plan.summary(0)
    batch = planned.dataset[epoch.largest._replace(index=LATE)]
    trace = trace_step(stage, model, batch, precision=cfg.train.precision)
    return RunPlan(
        train=cfg.train,
        groups=groups,
        sizes=sizes,
        trace=trace,
        generation=generation_bytes(model, cfg, batch),
        largest=batch.amount,
        targets=stage.count(batch),
        epoch=epoch,
        amount=planned.plan.amount(epoch),
        steps=cfg.train.max_steps or epoch.steps * cfg.train.epochs,
        typical=_typical_cost(epoch, batch),
    )


def _typical_cost(epoch: PlanSummary, batch: Any) -> float:
    """Return the mean size of a micro-batch, padding included, over that of the largest; 1 where there is no audio."""
    if not batch.padded_seconds:
        return 1.0
    mean = epoch.seconds / (1 - epoch.padding_fraction) / epoch.micro_batches
    return min(1.0, mean / batch.padded_seconds)


def setting(run: RunPlan, *, zero_stage: int, ranks: int, gloo: bool = False) -> Setting:
    """Return what a rank needs under a ZeRO stage, the rest of the config as it is; `gloo`: on CPUs."""
    train = replace(run.train, zero_stage=zero_stage)
    accumulation = -(-train.micro_batches // ranks)
    memory = rank_memory(
        run.sizes, run.trace, train, ranks=ranks, accumulation=accumulation, generation=run.generation, gloo=gloo
    )
    return Setting(
        train.effective_zero_stage,
        ranks,
        accumulation,
        memory,
        traffic(run.sizes, train, ranks=ranks, accumulation=accumulation),
    )


def settings(run: RunPlan, ranks: list[int]) -> list[Setting]:
    """Return every ZeRO stage that the run may have, on each number of ranks."""
    lowest = 1 if run.train.precision == "bf16" else 0
    stages = [0] if run.train.optimizer == "muon" else [z for z in ZERO_STAGES if z >= lowest]
    return [setting(run, zero_stage=zero_stage, ranks=R) for R in ranks for zero_stage in stages]


class Pace(NamedTuple):
    """Seconds of a step: `arithmetic` at the stated MFU, and `between` ranks, which may lie beneath it or beside it."""

    arithmetic: float
    between: float

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of a step that is arithmetic, with all communication beside it and with all beneath it."""
        return self.arithmetic / (self.arithmetic + self.between), min(1.0, self.arithmetic / max(self.between, 1e-12))

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: communication beside the arithmetic, and beneath it."""
        return self.arithmetic + self.between, max(self.arithmetic, self.between)


def pace(run: RunPlan, at: Setting, gpu: GPU, *, mfu: float) -> Pace:
    """Return how long a step takes; a rank has `accumulation` micro-batches in it."""
    flops = run.trace.flops.model * run.typical * at.accumulation
    return Pace(flops / (gpu.flops * mfu), at.traffic.seconds(gpu, at.ranks))


def nearest_fit(run: RunPlan, gpu: GPU, *, ranks: int) -> str:
    """Say what to set so that the run fits on so many ranks: the least change that does; "" where it fits as it is."""
    if setting(run, zero_stage=run.train.zero_stage, ranks=ranks).fits(gpu):
        return ""
    known = settings(run, [ranks])
    for at in known:
        if at.fits(gpu):
            return f"train.zero_stage={at.zero_stage}"
    least = min(known, key=lambda at: at.memory.total)
    rest = least.memory.total - least.memory.activations
    if least.memory.activations and rest < gpu.usable:
        seconds = run.train.micro_batch_seconds * (gpu.usable - rest) / least.memory.activations
        return (
            f"train.zero_stage={least.zero_stage} with train.micro_batch_seconds={seconds:.0f}, or "
            "encoder.activation_checkpointing=true where it is off"
        )
    more = ranks
    while more < 2**16:
        more *= 2
        if (at := setting(run, zero_stage=least.zero_stage, ranks=more)).fits(gpu):
            return f"train.zero_stage={at.zero_stage} on {more} ranks"
    return "none: what a rank holds alone is more than the GPU has; take another GPU or a smaller model"


def plan_memory(stage: Any, cfg: Any, *, ranks: int) -> Memory:
    """Return the peak memory of a rank of the run that `cfg` describes, on CPUs."""
    cfg.train.accumulation_steps(ranks)
    return setting(plan_run(stage, cfg), zero_stage=cfg.train.zero_stage, ranks=ranks, gloo=True).memory
