"""Which parameters learn, in which group, and proof that the others do not.

Under ZeRO-3 a rank holds, and hashes, its own shard of each parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from .train_config import TrainConfig


class GroupRow(NamedTuple):
    """One line of the table of parameter groups; `peak_lr` is 0 for frozen parameters."""

    group: str
    tensors: int
    parameters: int
    peak_lr: float


def numel(parameter: torch.Tensor) -> int:
    """Number of elements, also of a parameter that ZeRO-3 has already cut up."""
    return getattr(parameter, "ds_numel", parameter.numel())


def freeze_others(model: nn.Module, trainable: Callable[[str], str | None]) -> dict[str, list[nn.Parameter]]:
    """Set requires_grad by `trainable(name) -> group | None` and return {group: parameters}, in the model's order."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        group = trainable(name)
        parameter.requires_grad_(group is not None)
        if group is not None:
            groups.setdefault(group, []).append(parameter)
    if not groups:
        raise ValueError("the stage freezes every parameter: nothing to train; let trainable() name a group for some")
    return groups


def optimizer_groups(groups: dict[str, list[nn.Parameter]], cfg: TrainConfig) -> list[dict]:
    """Return torch parameter groups, each named. Weight decay spares vectors (biases, norms): they do not overfit."""
    missing = sorted(set(groups) - set(cfg.lr))
    if missing:
        raise ValueError(
            f"no learning rate for parameter group {missing[0]!r} "
            f"(train.lr has {', '.join(sorted(cfg.lr)) or 'none'}); set train.lr.{missing[0]}"
        )
    result = []
    for name, parameters in groups.items():
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        for part, decay in ((matrices, cfg.weight_decay), (vectors, 0.0)):
            if part:
                result.append({"params": part, "name": name, "lr": 0.0, "weight_decay": decay})
    return result


def parameter_table(model: nn.Module, groups: dict[str, list[nn.Parameter]], lr: dict[str, float]) -> list[GroupRow]:
    """Return one row per group, then the frozen rest."""
    rows = [GroupRow(name, len(ps), sum(map(numel, ps)), lr[name]) for name, ps in groups.items()]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return [*rows, GroupRow("frozen", len(frozen), sum(map(numel, frozen)), 0.0)]


def format_table(rows: list[GroupRow]) -> str:
    lines = [f"{'group':<16}{'tensors':>9}{'parameters':>16}{'peak lr':>12}"]
    for row in rows:
        lr = f"{row.peak_lr:.3g}" if row.peak_lr else "-"
        lines.append(f"{row.group:<16}{row.tensors:>9}{row.parameters:>16,}{lr:>12}")
    return "\n".join(lines)


def digest(parameters: Iterable[torch.Tensor]) -> str:
    """Hash the bits that this rank holds of each parameter, in order."""
    state = hashlib.blake2b(digest_size=16)
    for parameter in parameters:
        local = getattr(parameter, "ds_tensor", parameter).detach()
        state.update(local.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return state.hexdigest()
