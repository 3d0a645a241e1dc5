"""Block-wise refinement: the floats of a quantised block learn to give what the block gave in full precision.

    loss = mean over valid positions and channels of (block(x) - target)^2                       (decoupleQ, section 3)

The integers are frozen; scales, centres, norms and biases learn, in float32, at rates relative to their sizes. Two
copies of the block are made: one learns, and the other, folded to the bits that would be stored, is judged on held-out
sequences after every epoch. The best of these is kept where it beats the block as it came, which stays bit for bit as
it was otherwise. Losses are divided by that of the block as it came, and gradients are clipped against each other:
scaling the activations changes nothing.
Shape letters: B sequences, T positions, D width, n valid positions; targets may have no T.
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activations import device_of, hidden_of
from .block_input import BlockInput
from .held_out import Split, split_sequences
from .packed_model import packed_modules, tune, tuned_modules
from .relative_rates import relative_groups

log = logging.getLogger(__name__)


@dataclass
class RefineConfig:
    """Learning rates are relative to the size of what they move: 1e-2 moves a scale by about 1 % a step.

    On two blocks of a small LM at 2 bits (docs/log.md), 66 steps lowered the held-out error by 29 and 14 % at 1e-2, by
    26 and 11 % at 3e-3, by 16 and 4 % at 3e-4 and by 2 and 0.2 % at 3e-5. Higher rates went further still (20 % at 3e-2
    and 1e-1 on a third block, 17 % at 1e-2); 1e-2 is the cautious choice for blocks and step counts not measured.
    """

    epochs: int = 3
    lr: float = 1e-2  # of scales, centres and biases
    norm_lr: float = 1e-2
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.05
    held_out: float = 0.1  # of the batches, or of the sequences where batches are few; at least one
    patience: int = 2  # epochs without a better held-out loss
    grad_clip: float = 2.0  # a gradient longer than so many times the mean of those before is cut; 0: none is
    batch: int = 4  # sequences a step, at least: calibration batches are gathered until they have as many
    train_norms: bool = True
    train_biases: bool = True
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "patience", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"refine.{name} is {getattr(self, name)}; it counts from 1")
        for name in ("lr", "norm_lr", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"refine.{name} is {getattr(self, name)}; give a number from 0 up")
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"refine.{name} is {getattr(self, name)}; give a share from 0 to 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"refine.held_out is {self.held_out}; give a share between 0 and 1, both excluded")


@dataclass
class RefineReport:
    """What became of a block. Losses are those of the held-out sequences, folded to 16 bits.

    They are mean squared errors over `variance`, that of the held-out targets in the units of the activations (where
    it is 0, over 1), so that they compare between blocks.
    """

    before: float
    after: float  # of the block as it now is
    variance: float
    epoch_losses: list[float]
    best_epoch: int
    kept: bool  # False: the block stayed bit for bit as it came
    steps: int
    stopped: str  # why
    held_out_positions: int


def refine_block(
    block: nn.Module, inputs: Sequence[BlockInput], targets_BTD: Sequence[Tensor], *, cfg: RefineConfig, name: str
) -> RefineReport:
    """Refine `block`, whose packed modules stay the same objects, towards one target for each input.

    Batches are taken one at a time, each `epochs` times, and moved to the block's device. Masks and whatever else the
    block is called with reach it as they are, in float32 where they are floats. ValueError, naming the block, where
    nothing in it is packed, inputs and targets do not fit, or a loss is not finite before anything was trained.
    """
    data = _Data(inputs, targets_BTD, device_of(block), cfg=cfg, name=name)
    own = _Held(block)
    if not packed_modules(own):
        raise ValueError(f"{name}: nothing in this block is packed; quantise it before refining it")
    judge, learner = copy.deepcopy(own).float().eval(), copy.deepcopy(own)
    tune(learner)
    learner.float().eval()
    before, variance = data.held_out_loss(judge), data.held_out_variance()
    if not math.isfinite(before) or not math.isfinite(variance):
        raise ValueError(
            f"{name}: the held-out loss is {before} before refinement, the variance of its targets {variance}; the "
            "calibration activations or the block's scales are not finite"
        )
    run = _Run(own, learner, judge, data, before, cfg, name)
    stopped = run.train() if before > 0 else "the loss is 0"
    if run.best_state is not None:
        own.load_state_dict(run.best_state, strict=False)
    else:
        log.warning("%s: refinement did not lower the held-out loss (%s); the block stays as it was", name, stopped)
    losses = [loss / (variance or 1.0) for loss in (before, *run.losses)]
    return RefineReport(
        before=losses[0],
        after=losses[run.best_epoch],
        variance=variance,
        epoch_losses=losses[1:],
        best_epoch=run.best_epoch,
        kept=run.best_epoch > 0,
        steps=run.steps,
        stopped=stopped,
        held_out_positions=data.held_out_positions,
    )


class _Held(nn.Module):
    """Holds a block, which may be a packed layer itself, so that its packed modules all have a name and a parent."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block


class _Run:
    """The training of one block; `best_state` is what is to be stored of it after its best epoch, if one was better."""

    def __init__(
        self, own: _Held, learner: _Held, judge: _Held, data: "_Data", before: float, cfg: RefineConfig, name: str
    ):
        self.own, self.learner, self.judge, self.data, self.before, self.cfg = own, learner, judge, data, before, cfg
        groups = relative_groups(
            learner, lr=cfg.lr, norm_lr=cfg.norm_lr, norms=cfg.train_norms, biases=cfg.train_biases, name=name
        )
        self.parameters = [one for group in groups for one in group["params"]]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-8)
        self.rates = [group["lr"] for group in groups]
        self.mean_norm: Tensor | None = None
        self.steps, self.losses = 0, []  # held-out loss after each epoch
        self.best_epoch, self.best_state = 0, None

    def train(self) -> str:
        """Run the epochs and return why they ended."""
        generator = torch.Generator().manual_seed(self.cfg.seed)
        plan = [self.data.steps(self.cfg.batch, generator) for _ in range(self.cfg.epochs)]
        total = sum(map(len, plan))
        for epoch, steps in enumerate(plan, 1):
            for batches in steps:
                if not self._step(batches, total):
                    return f"the loss of step {self.steps + 1} is not finite"
            try:
                state = folded_state(self.learner, self.own)
            except ValueError as error:
                return f"epoch {epoch}: {error}"
            self.judge.load_state_dict(state, strict=False)
            loss = self.data.held_out_loss(self.judge)
            if not math.isfinite(loss):
                return f"the held-out loss of epoch {epoch} is not finite"
            if loss < min([self.before, *self.losses]):
                self.best_epoch, self.best_state = epoch, state
            self.losses.append(loss)
            if epoch - 1 - self.losses.index(min(self.losses)) >= self.cfg.patience:
                return f"no better for {self.cfg.patience} epochs"
        return "all epochs done"

    def _step(self, batches: Sequence[int], total: int) -> bool:
        """Take one step on the mean over all valid positions of `batches`; False where their loss is not finite."""
        with torch.enable_grad():
            loss_sum, count = 0.0, 0
            for at in batches:
                errors_nD = self.data.errors(self.learner, at, self.data.split.train[at])
                # Over the width here and over the positions of all batches below: their number is not known yet.
                loss = errors_nD.square().mean(1).sum() / self.before
                loss.backward()
                loss_sum, count = loss_sum + loss.detach(), count + len(errors_nD)
        if not bool(torch.isfinite(loss_sum)):
            return False
        gradients = [one.grad for one in self.parameters if one.grad is not None]
        torch._foreach_div_(gradients, float(count))
        self._clip(gradients)
        share = rate_share(self.steps, total, warmup_ratio=self.cfg.warmup_ratio, min_lr_ratio=self.cfg.min_lr_ratio)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return True

    def _clip(self, gradients: list[Tensor]) -> None:
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        if self.mean_norm is not None and self.cfg.grad_clip:
            share = (self.cfg.grad_clip * self.mean_norm / norm).clamp(max=1.0).nan_to_num(1.0)
            torch._foreach_mul_(gradients, share)
            norm = norm * share
        self.mean_norm = norm if self.mean_norm is None else torch.lerp(self.mean_norm, norm, 0.1)


def rate_share(step: int, total: int, *, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Return the share of the learning rate in step 0 .. total - 1: up in a line, down along a cosine."""
    warmup = round(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def folded_state(learner: nn.Module, own: nn.Module) -> dict[str, Tensor]:
    """Return what has been trained as it would be stored in `own`: in 16 bits, and in the types of its parameters.

    Codes are not among it. ValueError names the module whose scales do not fit.
    """
    state, types = {}, {key: value.dtype for key, value in own.state_dict().items()}
    for path, module in tuned_modules(learner).items():
        try:
            packed = module.packed()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        state |= {f"{path}.{key}": value for key, value in packed.state_dict().items() if not _is_codes(key)}
    trained = {key: one for key, one in learner.named_parameters() if one.requires_grad and key in types}
    state |= {key: one for key, one in trained.items() if key not in state}
    return {key: value.detach().to(types[key]).clone() for key, value in state.items()}


def _is_codes(key: str) -> bool:
    return key.rpartition(".")[2] == "codes"


class _Batch(NamedTuple):
    given: BlockInput
    target_BTD: Tensor


class _Data:
    """Batches with their targets, which sequences of them are held out, and losses over them."""

    def __init__(
        self,
        inputs: Sequence[BlockInput],
        targets_BTD: Sequence[Tensor],
        device: torch.device,
        *,
        cfg: RefineConfig,
        name: str,
    ):
        if len(inputs) != len(targets_BTD) or not len(inputs):
            raise ValueError(f"{name}: {len(inputs)} calibration batches and {len(targets_BTD)} targets; give one each")
        self.inputs, self.targets, self.device, self.name = inputs, targets_BTD, device, name
        usable = [self._usable(at) for at in range(len(inputs))]
        self.split: Split = split_sequences(usable, fraction=cfg.held_out, seed=cfg.seed, name=name)
        self.held_out = [at for at, held_B in enumerate(self.split.held_out) if held_B.any()]
        self.held_out_positions = 0

    def steps(self, batch: int, generator: torch.Generator) -> list[list[int]]:
        """Return the batches of each step of an epoch, shuffled; the last step has what is left."""
        sizes = [int(train_B.sum()) for train_B in self.split.train]
        steps, now = [], []
        for at in torch.randperm(len(sizes), generator=generator).tolist():
            if sizes[at]:
                now.append(at)
                if sum(sizes[i] for i in now) >= batch:
                    steps, now = [*steps, now], []
        return [*steps, now] if now else steps

    def errors(self, model: _Held, at: int, sequences_B: Tensor) -> Tensor:
        """Return errors_nD of a batch at the valid positions of some of its sequences."""
        given, target_BTD = self._batch(at)
        # Autocast would compute in 16 bits what is to be exact.
        with torch.autocast(self.device.type, enabled=False):
            output_BTD = hidden_of(model.block(*given.args, **given.kwargs))
        if output_BTD.shape != target_BTD.shape:
            raise ValueError(
                f"{self.name}: the block gives {list(output_BTD.shape)} in batch {at}, its target is "
                f"{list(target_BTD.shape)}"
            )
        counts = self._counts(given, target_BTD, sequences_B)
        return output_BTD[counts] - target_BTD[counts]

    @torch.no_grad()
    def held_out_loss(self, model: _Held) -> float:
        """Return the mean squared error of the held-out sequences."""
        total, count = 0.0, 0
        for at in self.held_out:
            errors_nD = self.errors(model, at, self.split.held_out[at])
            total, count = total + errors_nD.double().square().sum(), count + errors_nD.numel()
        self.held_out_positions = count // errors_nD.shape[1]
        return float(total) / count

    def held_out_variance(self) -> float:
        """Return the variance of the held-out targets around the mean of each channel."""
        sums_D, squares, count = 0.0, 0.0, 0
        for at in self.held_out:
            given, target_BTD = self._batch(at)
            target_nD = target_BTD[self._counts(given, target_BTD, self.split.held_out[at])].double()
            sums_D, squares, count = (
                sums_D + target_nD.sum(0),
                squares + target_nD.square().sum(),
                count + len(target_nD),
            )
        return max(0.0, float((squares - (sums_D / count).square().sum() * count) / (count * len(sums_D))))

    def _batch(self, at: int) -> _Batch:
        args, kwargs, valid_BT = self.inputs[at]
        given = BlockInput(
            _in_float32(args, self.device),
            _in_float32(kwargs, self.device),
            None if valid_BT is None else valid_BT.to(self.device),
        )
        return _Batch(given, self.targets[at].to(self.device, torch.float32))

    def _usable(self, at: int) -> Tensor:
        """Return which sequences have valid positions, boolean [B]; ValueError where mask and target do not fit."""
        valid_BT, target_BTD = self.inputs[at].valid_BT, self.targets[at]
        if valid_BT is None:
            return torch.ones(len(target_BTD), dtype=torch.bool)
        if valid_BT.dtype != torch.bool or valid_BT.shape != target_BTD.shape[:-1]:
            raise ValueError(
                f"{self.name}: the mask of batch {at} is {valid_BT.dtype} {list(valid_BT.shape)}; for targets "
                f"{list(target_BTD.shape)} it must be boolean {list(target_BTD.shape[:-1])}"
            )
        return valid_BT.flatten(1).any(1).cpu() if valid_BT.dim() > 1 else valid_BT.cpu()

    def _counts(self, given: BlockInput, target_BTD: Tensor, sequences_B: Tensor) -> Tensor:
        """Return the mask of the positions that count."""
        shape = target_BTD.shape[:-1]
        counts = sequences_B.to(self.device).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        return counts if given.valid_BT is None else counts & given.valid_BT


def _in_float32(value: Any, device: torch.device) -> Any:
    """Return nested tuples, lists and dicts with every tensor on `device`, floats of 16 bits in float32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):
        return {key: _in_float32(one, device) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_in_float32(one, device) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(_in_float32(one, device) for one in value)
    return value
