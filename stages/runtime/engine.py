"""One optimizer step on DeepSpeed: this file alone knows how DeepSpeed averages, clips, skips and gathers.

DeepSpeed averages gradients over the R ranks. The loss's normaliser N (tokens, frames) is known before the forward pass
and summed over ranks, so each micro-batch is backpropagated as loss_sum * R / N, and the average over ranks is the
exact gradient of sum(loss) / N whatever each rank got.

A step that must not happen is poisoned instead of vetoed: a non-finite loss becomes a NaN gradient, the gradient norm
that DeepSpeed sums over ranks becomes NaN on all of them, and every rank drops the step together, without another round
of messages.

CPU time of a step of 4 micro-batches, 2 M parameters in 384 tensors, hardly any audio: plain torch 139 ms, ZeRO 0 170,
ZeRO 1 242, ZeRO 2 349, ZeRO 3 1226. Small models on one process want stage 0.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .deferring_writer import errors_deferred
from .ds_config import deepspeed_config
from .metrics import Metrics, add_metrics
from .optimizer import make_optimizer
from .parameters import digest, freeze_others, numel, optimizer_groups
from .recut import load_recut
from .seeds import seed_forward
from .shards import Shards
from .stage import TrainingStage
from .stopwatch import Stopwatch
from .train_config import TrainConfig
from .whole_weights import whole_weights
from .world import World, import_deepspeed


class StepResult(NamedTuple):
    """`loss_sum` and the sums in `metrics` are this rank's, on its device; `grad_norm` is global, before clipping."""

    loss_sum: Tensor
    metrics: Metrics
    grad_norm: float
    applied: bool


class Blame(NamedTuple):
    """Where a non-finite number came from: the loss or a parameter's gradient, in the micro-batch of these keys."""

    where: str
    keys: list[str]


class StageLoss(nn.Module):
    """The stage's loss as one module call, because DeepSpeed hooks what happens inside the engine's forward.

    Under bf16 the parameters are bf16 and buffers stay as built; autocast lets fp32 features meet bf16 weights. Under
    autocast the parameters are fp32 as well.
    """

    def __init__(self, stage: TrainingStage, model: nn.Module, *, bf16: bool):
        super().__init__()
        self.model = model
        self.stage = stage
        self.bf16 = bf16
        self.metrics: Metrics = {}
        self.register_state_dict_post_hook(_leave_out_frozen)

    def autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def forward(self, batch: Any, device: torch.device) -> Tensor:
        """Return loss_sum; the metrics, which carry no gradient, wait in `self.metrics`."""
        with self.autocast(device):
            output = self.stage.loss(self.model, batch)
        self.metrics = output.metrics
        return output.loss_sum.float()


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    """Take frozen parameters out of a state dict by all their names: DeepSpeed does not see that of a tied head."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


class Engine:
    """A model under DeepSpeed; the learning rate is the caller's to set before each step."""

    def __init__(self, stage: TrainingStage, model: nn.Module, cfg: TrainConfig, *, world: World, seed: int):
        deepspeed = import_deepspeed()
        self.cfg, self.world, self.seed = cfg, world, seed
        self.zero_stage = cfg.effective_zero_stage
        self.groups = freeze_others(model, stage.trainable)
        self.frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.trainable = [p for ps in self.groups.values() for p in ps]
        optimizer = make_optimizer(model, optimizer_groups(self.groups, cfg), cfg)
        config = deepspeed_config(
            cfg,
            accumulation_steps=cfg.accumulation_steps(world.size),
            world_size=world.size,
            trainable_numel=sum(map(numel, self.trainable)),
        )
        self.module = StageLoss(stage, model, bf16=cfg.precision != "fp32")
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed's bf16 optimizer prints its memory 14 times
            self.ds, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)
        self.ds.train()
        # Alone at stage 0 there is nobody to reduce with; DeepSpeed would still copy every gradient twice.
        self.ds.enable_backward_allreduce = world.size > 1 or self.zero_stage > 0

    @property
    def model(self) -> nn.Module:
        return self.module.model

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to its peak times `factor`."""
        for group in self.ds.optimizer.param_groups:
            group["lr"] = self.cfg.lr[group["name"]] * factor

    def step(self, batches: list[Any], total_count: float) -> StepResult:
        """Train on this rank's micro-batches of a step; `total_count` is the normaliser over all ranks and batches."""
        loss_sum = torch.zeros((), device=self.world.device)
        metrics: Metrics = {}
        scale = self.world.size / max(total_count, 1.0)
        watch = Stopwatch(self.world.device)
        for i, batch in enumerate(batches):
            loss = self._forward(batch)
            watch.lap("time/forward_s")
            self._backward(loss, scale, last=i == len(batches) - 1)
            watch.lap("time/backward_s")
            loss_sum += loss.detach()
            add_metrics(metrics, self.module.metrics)
        grad_norm, applied = self._update()
        watch.lap("time/update_s")
        return StepResult(loss_sum, metrics | watch.read(), grad_norm, applied)

    def _forward(self, batch: Any) -> Tensor:
        seed_forward(self.seed, batch.index)
        return self.ds(batch, self.world.device)

    def _backward(self, loss: Tensor, scale: float, *, last: bool) -> None:
        self.ds.set_gradient_accumulation_boundary(last)
        poison = torch.where(torch.isfinite(loss.detach()), scale, float("nan"))
        self.ds.backward(loss * poison, scale_wrt_gas=False)

    def _update(self) -> tuple[float, bool]:
        """Clip and step, or drop the step if the norm is not finite; return (norm before clipping, applied)."""
        if self.zero_stage:
            self.ds.step()
            return float(self.ds.get_global_grad_norm()), self.ds.was_step_applied()
        present = [p for p in self.trainable if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([p.grad for p in present]))
        norm = torch.linalg.vector_norm(norms)
        applied = bool(torch.isfinite(norm))
        for p, size in zip(present, norms.tolist()):
            if size == 0:
                # A part that took no part. Alone it has no gradient, among ranks DeepSpeed makes it zeros; either way
                # it must not decay nor count a step.
                p.grad = None
        if not applied:
            self.ds.zero_grad()  # AdamW passes over parameters without a gradient: weights and state stay
        elif self.cfg.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.cfg.grad_clip, norm)
        self.ds.step()
        return float(norm), applied

    def dry_run(self, batch: Any) -> float:
        """Forward and backward of `batch` without a trace in weights, optimizer or buffers; return its seconds."""
        start = time.perf_counter()
        with self._buffers_restored():
            self._backward(self._forward(batch), float("nan"), last=True)
            _, applied = self._update()
        assert not applied, "a poisoned step must be dropped"
        return time.perf_counter() - start

    def blame(self, batches: list[Any], total_count: float) -> list[Blame]:
        """Replay a dropped step with a probe on every gradient, on all ranks together. Leaves no trace, as dry_run."""
        found = []
        with self._buffers_restored(), self._probed() as bad:
            for batch in batches:
                bad.clear()
                loss = self._forward(batch)
                self._backward(loss, self.world.size / max(total_count, 1.0), last=False)
                if not torch.isfinite(loss):
                    found.append(Blame("loss", list(batch.keys)))
                elif bad:
                    found.append(Blame(f"gradient of {bad[0]}", list(batch.keys)))
        self.dry_run(batches[-1])  # ends the accumulation, and drops it
        return found

    @contextlib.contextmanager
    def _probed(self) -> Iterator[list[str]]:
        """Collect the names of parameters that receive a non-finite gradient, in the order of the backward pass."""
        bad: list[str] = []

        def probe(name: str, grad: Tensor) -> None:
            if not torch.isfinite(grad).all():
                bad.append(name)

        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        handles = [p.register_hook(lambda grad, name=name: probe(name, grad)) for name, p in named]
        try:
            yield bad
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _buffers_restored(self) -> Iterator[None]:
        """Put buffers back as they were; warn of any that a forward pass changes: ranks would disagree about it."""
        saved = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        yield
        for name, buffer in self.model.named_buffers():
            if not torch.equal(buffer, saved[name]) and buffer.isfinite().all():
                logging.getLogger(__name__).warning(
                    f"buffer {name} changes in the forward pass: statistics of one rank's batches make the result "
                    "depend on the number of ranks; prefer a norm without running statistics"
                )
            buffer.copy_(saved[name])

    def frozen_digest(self) -> str:
        """Hash of this rank's frozen parameters; also asserts that none of them has a gradient."""
        with_grad = [name for name, p in self.frozen if p.requires_grad or p.grad is not None]
        assert not with_grad, f"frozen parameter {with_grad[0]} has a gradient"
        return digest(p for _, p in self.frozen)

    def optimizer_numel(self) -> int:
        """Elements of first moments that the optimizer keeps on this rank: trainable parameters only, plus padding."""
        optimizer = getattr(self.ds.optimizer, "optimizer", self.ds.optimizer)
        moments = ("exp_avg", "momentum")  # AdamW's and Muon's
        return sum(s[name].numel() for s in optimizer.state.values() for name in moments if name in s)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the model in eval mode, without gradients."""
        self.ds.eval()
        try:
            with torch.no_grad(), self.module.autocast(self.world.device):
                yield self.model
        finally:
            self.ds.train()

    @contextlib.contextmanager
    def whole_model(self, *, everywhere: bool = True) -> Iterator[nn.Module]:
        """Yield the model in eval mode with all its weights; to be entered on all ranks together.

        Under ZeRO-3 a GPU may have no room for them: they are gathered one at a time, and the yielded model lies in the
        CPU's memory. Without `everywhere` only the main rank's has its weights.
        """
        keep = everywhere or self.world.is_main
        with whole_weights(self.model, keep=keep) if self.zero_stage == 3 else contextlib.nullcontext():
            with self.evaluating() as model:
                yield model

    def saved_shapes(self) -> dict[str, list[int]]:
        """Return {name: shape} of what a checkpoint holds of the model: what learns, and buffers."""
        state = self.module.state_dict(keep_vars=True)
        return {name.removeprefix("model."): list(getattr(t, "ds_shape", t.shape)) for name, t in state.items()}

    def save(self, folder: str, tag: str) -> None:
        """Write weights and optimizer shards; frozen weights are left out, the stage builds them again.

        A file that cannot be written raises OSError after all ranks are through with theirs.
        """
        with errors_deferred(self.ds):
            self.ds.save_checkpoint(folder, tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: str, tag: str, *, ranks: int, zero_stage: int) -> None:
        """Read what `save` wrote on so many ranks under such a stage.

        Not strict: frozen weights are not in it, and check_resumable compared the rest.
        """
        if zero_stage and (ranks, zero_stage) != (self.world.size, self.zero_stage):
            load_recut(self.ds, Shards(Path(folder) / tag), world=self.world)
            return
        path, _ = self.ds.load_checkpoint(folder, tag=tag, load_module_strict=False)
        assert path is not None, f"DeepSpeed found no checkpoint {tag} in {folder}"
