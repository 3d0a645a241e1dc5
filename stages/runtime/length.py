"""How many optimizer steps a run has."""

from __future__ import annotations

from typing import NamedTuple

from ...data.plan import Plan, PlanSummary
from .train_config import TrainConfig


class Length(NamedTuple):
    """`estimated`: of epochs too long to be counted beforehand. They end where the plan does, whatever `steps` says."""

    steps: int
    estimated: bool


def run_length(plan: Plan, first_epoch: PlanSummary, cfg: TrainConfig) -> Length:
    """Return the length of a run; ValueError unless exactly one of max_steps and epochs says it."""
    if bool(cfg.max_steps) == bool(cfg.epochs):
        raise ValueError(
            f"train.max_steps is {cfg.max_steps} and train.epochs is {cfg.epochs}; set exactly one of them above 0"
        )
    if cfg.max_steps:
        return Length(cfg.max_steps, False)
    if first_epoch.sampled_windows:
        return Length(cfg.epochs * first_epoch.steps, True)
    return Length(first_epoch.steps + sum(plan.summary(epoch).steps for epoch in range(1, cfg.epochs)), False)
