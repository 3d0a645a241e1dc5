"""The needs of a training run before it runs: memory of a rank, work of a step, hours, bytes between ranks.

Nothing is guessed but what is said to be: activations and operations are those of the largest planned micro-batch on
fake tensors (stages/runtime/step_trace.py), what ZeRO holds is DeepSpeed's (stages/runtime/zero_memory.py), the share
of a GPU's peak that training reaches (`mfu`) and the links' speeds are the caller's. Micro-batches smaller than the
largest are taken to cost in proportion to their padded audio, which for attention is a little too much.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..data.plan import PlanSummary
from ..stages.runtime.artifacts import load_inputs
from ..stages.runtime.gpus import GPU
from ..stages.runtime.parameters import GroupRow, freeze_others, parameter_table
from ..stages.runtime.seeds import seed_forward
from ..stages.runtime.stage import LATE
from ..stages.runtime.step_trace import StepTrace, trace_step
from ..stages.runtime.train_config import ZERO_STAGES, TrainConfig
from ..stages.runtime.zero_memory import Memory, Sizes, model_sizes, rank_memory
from .generation_memory import generation_bytes
from .traffic import Traffic, traffic


class RunPlan(NamedTuple):
    """What is known of a run whatever its ranks and ZeRO stage."""

    stage: Any  # as built
    cfg: Any
    groups: list[GroupRow]
    sizes: Sizes
    trace: StepTrace  # of the largest micro-batch
    trace_3: StepTrace  # the same under ZeRO 3, whose linear layers save more; as many operations
    generation: int  # bytes of keys and values while hypotheses are made, 0 where none are
    largest: str  # what is in that micro-batch, in words
    targets: int  # what its loss is normalised by
    epoch: PlanSummary
    amount: str  # of an epoch, in words
    steps: int
    typical: float  # cost of a micro-batch on average, of the largest one
    size_setting: str  # which setting says how large a micro-batch is

    @property
    def train(self) -> TrainConfig:
        return self.cfg.train

    def with_train(self, **changes: Any) -> RunPlan:
        """Return the plan under other values of `train`; ValueError where the config refuses them."""
        return self._replace(cfg=replace(self.cfg, train=replace(self.train, **changes)))

    def trace_under(self, zero_stage: int) -> StepTrace:
        return self.trace_3 if zero_stage == 3 else self.trace

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

    def traced(*, zero_3: bool) -> StepTrace:
        with torch.random.fork_rng():
            seed_forward(cfg.seed, batch.index)  # what a loss draws is the same each time
            return trace_step(stage, model, batch, precision=cfg.train.precision, zero_3=zero_3)

    return RunPlan(
        stage=stage,
        cfg=cfg,
        groups=groups,
        sizes=sizes,
        trace=traced(zero_3=False),
        trace_3=traced(zero_3=True),
        generation=generation_bytes(stage, model, cfg, batch),
        largest=batch.amount,
        targets=stage.count(batch),
        epoch=epoch,
        amount=planned.plan.amount(epoch),
        steps=cfg.train.max_steps or epoch.steps * cfg.train.epochs,
        typical=_typical_cost(epoch, batch),
        size_setting=planned.plan.size_setting,
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
        run.sizes,
        run.trace_under(train.effective_zero_stage),
        train,
        ranks=ranks,
        accumulation=accumulation,
        generation=run.generation,
        gloo=gloo,
    )
    return Setting(
        train.effective_zero_stage,
        ranks,
        accumulation,
        memory,
        traffic(run.sizes, train, ranks=ranks, accumulation=accumulation),
    )


def settings(run: RunPlan, ranks: list[int]) -> list[Setting]:
    """Return every ZeRO stage that the run's config may have, on each number of ranks."""
    return [setting(run, zero_stage=zero_stage, ranks=R) for R in ranks for zero_stage in allowed_stages(run)]


def allowed_stages(run: RunPlan) -> list[int]:
    """Return the ZeRO stages that the run's config does not refuse."""
    allowed = set()
    for zero_stage in ZERO_STAGES:
        with suppress(ValueError):
            allowed.add(run.with_train(zero_stage=zero_stage).train.effective_zero_stage)
    return sorted(allowed)


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
    return Pace(flops / (gpu.peak(run.train.precision) * mfu), at.traffic.seconds(gpu, at.ranks))


# What the plan reads of train.deepspeed_extra.zero_optimization, with and without the prefix stage3_.
KNOWN = (
    "allgather_bucket_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "sub_group_size",
)


def left_out(run: RunPlan) -> list[str]:
    """Say what of the config takes or spares memory and time that the plan does not know, a line each."""
    extra = dict(run.train.deepspeed_extra)
    zero = {
        name: v for name, v in extra.pop("zero_optimization", {}).items() if name.removeprefix("stage3_") not in KNOWN
    }
    unknown = [*(f"zero_optimization.{name}" for name in zero), *extra]
    said = [
        f"train.deepspeed_extra.{name} is not in the plan: its memory, bytes and hours are those without it"
        for name in unknown
    ]
    if workers := getattr(getattr(run.cfg, "generation", None), "workers", 0):
        said.append(
            f"generation.workers={workers} is not in the plan: each holds the whole model and its cache on a rank's GPU"
        )
    return said


def plan_memory(stage: Any, cfg: Any, *, ranks: int) -> Memory:
    """Return the peak memory of a rank of the run that `cfg` describes, on CPUs."""
    cfg.train.accumulation_steps(ranks)
    return setting(plan_run(stage, cfg), zero_stage=cfg.train.zero_stage, ranks=ranks, gloo=True).memory
