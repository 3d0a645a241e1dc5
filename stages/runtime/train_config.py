"""What a user sets about training, as typed and validated values; `ds_config.py` turns it into DeepSpeed's JSON.

Batch sizes are seconds of audio, so they mean the same on any number of processes. One optimizer step consumes M
planned micro-batches, M = round(global_batch_seconds / micro_batch_seconds), whatever the number of ranks R (R must
divide M).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ZERO_STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")
# autocast: weights in fp32, matrix products in bf16. For the few and fine ones, as scales: bf16 has 8 bits.
TRAINING_PRECISIONS = (*PRECISIONS, "autocast")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")
RESUME_MODES = ("auto", "never")
WANDB_MODES = ("auto", "online", "offline", "disabled")


def require_choice(name: str, value: object, choices: tuple) -> None:
    """Raise ValueError naming the field, its value and what it may be."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")


@dataclass
class WandbConfig:
    """Weights & Biases: `auto` is online with WANDB_API_KEY in the environment, else offline."""

    mode: str = "auto"
    project: str = "seedling"
    name: str = ""
    group: str = ""
    init_timeout_seconds: float = 20.0

    def __post_init__(self):
        require_choice("train.wandb.mode", self.mode, WANDB_MODES)


@dataclass
class TrainConfig:
    """One training run. Exactly one of `max_steps` and `epochs` says when it ends; steps are optimizer steps."""

    max_steps: int = 0
    epochs: int = 0
    micro_batch_seconds: float = 60.0
    global_batch_seconds: float = 60.0
    zero_stage: int = 0
    precision: str = "fp32"
    optimizer: str = "adamw"  # or muon: fewer steps to the same loss; stages/runtime/optimizer.py
    lr: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 0
    schedule: str = "cosine"
    hold_ratio: float = 0.0  # of the steps after the warm-up that keep the peak before the schedule's decay begins
    min_lr_ratio: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    dry_run: bool = True
    log_every: int = 10
    eval_every: int = 0
    eval_first: bool = False  # evaluate before the first step as well: what the run began with
    save_every: int = 500  # and after the last step; 0: only when asked to stop, and of the best (keep_best)
    keep_last: int = 2
    keep_best: str = ""  # a metric, as valid/dev/loss: end with the weights of its lowest evaluation, not the last ones
    num_workers: int = 0
    max_bad_fraction: float = 0.01
    max_nonfinite_steps: int = 10
    hang_timeout: float = 1800.0  # seconds without a step, after which a rank writes its stacks and ends; 0: never
    resume: str = "auto"
    deepspeed_extra: dict[str, Any] = field(default_factory=dict)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self):
        require_choice("train.zero_stage", self.zero_stage, ZERO_STAGES)
        require_choice("train.precision", self.precision, TRAINING_PRECISIONS)
        require_choice("train.optimizer", self.optimizer, OPTIMIZERS)
        require_choice("train.schedule", self.schedule, SCHEDULES)
        require_choice("train.resume", self.resume, RESUME_MODES)
        if not 0 <= self.hold_ratio < 1:
            raise ValueError(f"train.hold_ratio is {self.hold_ratio}; it must be at least 0 and below 1")
        for name in ("micro_batch_seconds", "global_batch_seconds", "log_every", "keep_last"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be greater than 0")
        if self.hang_timeout < 0:
            raise ValueError(f"train.hang_timeout is {self.hang_timeout}; it must be seconds, or 0 to wait for ever")
        if self.global_batch_seconds < self.micro_batch_seconds:
            raise ValueError(
                f"train.global_batch_seconds ({self.global_batch_seconds}) is less than train.micro_batch_seconds "
                f"({self.micro_batch_seconds}); lower the latter to at most the former"
            )
        if self.keep_best and not self.eval_every:
            raise ValueError(
                f"train.keep_best is {self.keep_best!r} and train.eval_every is 0, so only the last weights would be "
                "evaluated; set train.eval_every"
            )
        if self.optimizer == "muon" and self.effective_zero_stage:
            raise ValueError(
                f"train.optimizer is muon, which needs whole matrices; ZeRO {self.effective_zero_stage} cuts them up "
                "(bf16 runs at 1 or more); set train.zero_stage=0 and train.precision=fp32, or train.optimizer=adamw"
            )

    @property
    def micro_batches(self) -> int:
        """M: planned micro-batches that one optimizer step consumes over all ranks."""
        return max(1, round(self.global_batch_seconds / self.micro_batch_seconds))

    @property
    def effective_zero_stage(self) -> int:
        """bf16 without ZeRO has no fp32 master weights in DeepSpeed and drifts, so it runs at stage 1."""
        return max(1, self.zero_stage) if self.precision == "bf16" else self.zero_stage

    def accumulation_steps(self, world_size: int) -> int:
        """M / R: micro-batches of a step on each of R ranks; ValueError with the way out if R does not divide M."""
        M = self.micro_batches
        if M % world_size:
            shares = ", ".join(str(r) for r in range(1, M + 1) if M % r == 0)
            whole = -(-M // world_size) * world_size
            raise ValueError(
                f"train.global_batch_seconds ({self.global_batch_seconds:g}) / train.micro_batch_seconds "
                f"({self.micro_batch_seconds:g}) = {M} micro-batches per step, which {world_size} processes cannot "
                f"share evenly; start {shares} processes, or set train.global_batch_seconds="
                f"{whole * self.micro_batch_seconds:g} ({whole} micro-batches)"
            )
        return M // world_size
