"""The optimizer: AdamW, or Muon for the matrices of a network's layers and AdamW for all the rest.

Muon (https://kellerjordan.github.io/posts/muon/) steps along the momentum of a weight matrix with all its singular
values made about equal, so that rare directions are learnt as fast as common ones. Scaled as in
https://arxiv.org/abs/2502.16982 its update is as large as AdamW's, so one learning rate serves both.

torch.optim.Muon iterates one matrix at a time in bfloat16, which a CPU without bfloat16 instructions runs many times
slower than float32. Here matrices of one shape are stacked, and a CPU stays in float32.

Shape letters: K matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .train_config import TrainConfig

# A quintic whose slope at zero is the steepest that stays bounded: small singular values grow 3.4-fold a step.
QUINTIC = (3.4445, -4.7750, 2.0315)
# Values of 0.7 % of the norm and more end up within 0.7 and 1.2; a fifth step costs a quarter more and gained nothing.
NEWTON_SCHULZ_STEPS = 4
MOMENTUM = 0.95
# The root mean square of an AdamW update divided by its learning rate, by measurement of the second paper.
ADAMW_RMS = 0.2
# Layers that repeat, by the names that models give them: `layers.3.` here and in most LLMs, `h.3.` in GPT-2.
IN_A_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")


def make_optimizer(model: nn.Module, groups: list[dict], cfg: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `cfg.optimizer` over torch parameter groups of the model, at a learning rate of 0."""
    betas = (cfg.betas[0], cfg.betas[1])
    if cfg.optimizer == "muon":
        return Muon(split_groups(model, groups), betas=betas, eps=cfg.eps)
    # fused: one call for all tensors; the loop over tensors costs more than a small model's forward pass.
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=cfg.eps, fused=True)


def split_groups(model: nn.Module, groups: list[dict]) -> list[dict]:
    """Split each group into matrices within layers (`muon` True) and the rest: embeddings, heads, filters, vectors."""
    hidden = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and IN_A_LAYER.search(name)}
    parts = []
    for group in groups:
        for muon in (True, False):
            parameters = [p for p in group["params"] if (id(p) in hidden) == muon]
            if parameters:
                parts.append({**group, "params": parameters, "muon": muon})
    if not any(part["muon"] for part in parts):
        raise ValueError(
            "train.optimizer is muon and no trainable matrix lies within a layer (layers.N., h.N. or blocks.N. in its "
            "name), so it would be AdamW; set train.optimizer=adamw"
        )
    return parts


def orthogonalize(matrices_KMN: Tensor) -> Tensor:
    """Return each matrix U S V^T as about U V^T: Newton-Schulz, in bfloat16 on a GPU and in float32 on a CPU."""
    a, b, c = QUINTIC
    x_KMN = matrices_KMN.to(torch.bfloat16 if matrices_KMN.is_cuda else torch.float32)
    x_KMN = x_KMN / x_KMN.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    tall = x_KMN.shape[-2] > x_KMN.shape[-1]
    x_KMN = x_KMN.mT if tall else x_KMN  # the smaller of the two Gram matrices
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_KMM = x_KMN @ x_KMN.mT
        x_KMN = torch.baddbmm(x_KMN, torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c), x_KMN, beta=a)
    return (x_KMN.mT if tall else x_KMN).to(matrices_KMN.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for groups with `muon` True, torch's AdamW for the others; `state` and `param_groups` hold both."""

    def __init__(self, groups: list[dict], *, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False})
        self.betas, self.eps = betas, eps
        self._join_adamw()

    def _join_adamw(self) -> None:
        # The very same group dictionaries and state: a learning rate set here is AdamW's too.
        groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw = torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, fused=True) if groups else None
        if self.adamw:
            self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._join_adamw()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                by_shape: dict[torch.Size, list[nn.Parameter]] = {}
                for p in group["params"]:
                    if p.grad is not None:
                        by_shape.setdefault(p.shape, []).append(p)
                for parameters in by_shape.values():
                    self._step_matrices(parameters, lr=group["lr"], weight_decay=group["weight_decay"])
        if self.adamw:
            self.adamw.step()
        return loss

    def _step_matrices(self, parameters: list[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        momenta = []
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momenta.append(self.state[p]["momentum"])
        grads = [p.grad for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        ahead_KMN = torch.stack(torch._foreach_lerp(grads, momenta, MOMENTUM))  # Nesterov
        rms_one = max(ahead_KMN.shape[-2:]) ** 0.5  # an orthogonal matrix has a root mean square of 1 / this
        update_KMN = orthogonalize(ahead_KMN) * (ADAMW_RMS * rms_one)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, list(update_KMN.unbind()), alpha=-lr)
