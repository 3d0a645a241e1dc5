"""Learning rate over steps, as a factor of each group's peak."""

from __future__ import annotations

import math

from .train_config import TrainConfig


def lr_factor(step: int, *, total_steps: int, cfg: TrainConfig) -> float:
    """Return the factor for step `step` (from 0): linear warm-up, then cosine, linear or constant to `min_lr_ratio`.

    Step 0 already learns: its factor is 1 / warmup_steps. The peak is held for `hold_ratio` of the steps that follow
    the warm-up before it falls.
    """
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    after = max(1, total_steps - cfg.warmup_steps)
    held = cfg.hold_ratio * after
    progress = min(1.0, max(0.0, step - cfg.warmup_steps - held) / (after - held))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decay
