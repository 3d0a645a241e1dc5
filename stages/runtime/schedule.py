"""Learning rate over steps, as a factor of each group's peak."""

from __future__ import annotations

import math

from .train_config import TrainConfig


def lr_factor(step: int, *, total_steps: int, cfg: TrainConfig) -> float:
    """Return the factor for step `step` (from 0): linear warm-up, then cosine, linear or constant to `min_lr_ratio`.

    Step 0 already learns: its factor is 1 / warmup_steps.
    """
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decay
