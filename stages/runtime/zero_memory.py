"""What a rank holds beside activations under each ZeRO stage: read from DeepSpeed's code, checked by running it.

N trainable and F frozen elements on R ranks; w bytes an element of the weights, 2 in bf16 and else 4; b elements of a
bucket, all of N or DeepSpeed's limit; p of the largest parameter. Bytes that stay from step to step, and what comes on
top at a time (peaks, not sums):

    stage     weights        masters  gradients      moments  buffers  in backward   reducing          stepping
    0         4 (N + F)      -        as they come   8 N      -        4 N           4 N, 4 b if R > 1
    1 fp32    4 (N + F)      4 N / R  as they come   8 N / R  -        4 N, 4 b      4 N, 4 b          8 N / R
    1 bf16    2 (N + F)      4 N / R  4 N + 2 N      8 N / R  -        -             4 b + 2 b         -
    2 fp32    4 (N + F)      4 N / R  4 N / R *      8 N / R  -        4 b           4 b twice         8 N / R
    2 bf16    2 (N + F)      4 N / R  4 N / R *      8 N / R  -        2 b, 4 N / R  2 b twice, 4 p    4 N / R
    3         w (N + F) / R  4 N / R  4 N / R        8 N / R  w b      gathered      w b, bf16 4 b / R 4 N / R
    * from the second micro-batch of a step on

Parameters that ZeRO-3 has gathered stay while they are used again soon (`max_reuse_distance`, forward and backward
together), so a model below half of it is whole on every rank in the middle of a step, frozen parameters too. Those of
at most `param_persistence_threshold` elements are whole all the time, beside their parts. Not counted: the message out
of which gathered parameters were copied, which stays until the last of them is used. The moments are AdamW's; Muon
keeps one for a matrix. Before training starts DeepSpeed has the whole model on each rank, under ZeRO-3 too; for export
and for generation workers the weights are gathered one at a time into the CPU's memory (engine.py). A second model that
a stage holds (`another`) counts among the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from .ds_config import deepspeed_config
from .optimizer import make_optimizer
from .parameters import freeze_others, optimizer_groups
from .stage import TrainingStage, another_model
from .step_trace import StepTrace
from .train_config import TrainConfig

FP32 = 4
# DeepSpeed's engine at stage 0 reduces so many elements at once (MEMORY_OPT_ALLREDUCE_SIZE), flattened into a copy.
STAGE_0_BUCKET = 500_000_000


class Sizes(NamedTuple):
    """Elements of a model, and what DeepSpeed cuts them by."""

    trainable: int
    frozen: int
    largest_group: int  # of the optimizer's groups: ZeRO 1 and 2 step one at a time
    largest: int  # parameter
    persistent: int  # in parameters so small that ZeRO-3 keeps them whole beside their parts
    muon: int  # in matrices that Muon steps, which has one moment
    workspace: int  # bytes of the optimizer's step itself
    buffers: int  # bytes
    another: int = 0  # bytes of a second model, which a stage holds whole on each rank


class Memory(NamedTuple):
    """Bytes on one rank at its peak, by part; `moment` says when that is."""

    weights: int
    masters: int
    gradients: int
    moments: int
    buffers: int
    activations: int
    moment: str

    @property
    def total(self) -> int:
        return sum(self[:6])


def model_sizes(stage: TrainingStage, model: nn.Module, cfg: TrainConfig) -> Sizes:
    """Measure a model, which may be on the meta device; sets requires_grad as training does."""
    groups = optimizer_groups(freeze_others(model, stage.trainable), cfg)
    optimizer = make_optimizer(model, groups, cfg)
    numels = [p.numel() for p in model.parameters()]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    threshold, another = zero_settings(cfg).param_persistence_threshold, another_model(stage)
    of_groups = [
        (group.get("muon", False), sum(p.numel() for p in group["params"])) for group in optimizer.param_groups
    ]
    return Sizes(
        trainable=trainable,
        frozen=sum(numels) - trainable,
        largest_group=max(count for _, count in of_groups),
        largest=max(numels),
        persistent=sum(numel for numel in numels if numel <= threshold),
        muon=sum(count for is_muon, count in of_groups if is_muon),
        workspace=max((_muon_workspace(g["params"]) for g in optimizer.param_groups if g.get("muon")), default=0),
        buffers=_bytes(model.buffers()),
        another=_bytes([*another.parameters(), *another.buffers()]) if another is not None else 0,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _muon_workspace(parameters: list[nn.Parameter]) -> int:
    """Bytes that Muon takes for the matrices of a shape, K of M by N: the momenta ahead, an iterate of Newton-Schulz
    and the next one, and two Gram matrices."""
    by_shape = Counter(tuple(p.shape) for p in parameters)
    return max(FP32 * K * (3 * M * N + 2 * min(M, N) ** 2) for (M, N), K in by_shape.items())


def zero_settings(cfg: TrainConfig, *, trainable: int = 1):
    """Return DeepSpeed's own settings of the run, its defaults and `train.deepspeed_extra` included."""
    from .world import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = deepspeed_config(cfg, accumulation_steps=1, world_size=1, trainable_numel=trainable)
    return DeepSpeedZeroConfig(**config["zero_optimization"])


def rank_memory(
    sizes: Sizes,
    trace: StepTrace,
    cfg: TrainConfig,
    *,
    ranks: int,
    accumulation: int,
    generation: int = 0,
    gloo: bool = False,
) -> Memory:
    """Return the peak of one rank in the middle of a run, under the ZeRO stage and precision of `cfg`.

    `trace` is of the largest micro-batch, and all micro-batches of a step are taken to be as large. `generation` bytes
    are keys and values of hypotheses that are made in the forward pass, at most beside all that it saves. `gloo`: on a
    CPU, where a reduce-scatter works on a copy.
    """
    held = _Held(sizes, cfg, ranks=ranks, accumulates=accumulation > 1)
    inputs = accumulation * trace.batch + sizes.buffers
    moments = [held.at("forward", 0, trace.forward_peak + inputs)]
    if generation:
        moments.append(held.at("generation", 0, trace.saved + generation + inputs))
    ready = 0
    for segment in trace.segments:
        moments.append(held.at("backward", ready, segment.peak + inputs))
        ready += segment.gradient
    moments += [held.reducing(inputs, gloo=gloo), held.stepping(inputs), held.starting(gloo=gloo)]
    return max(moments, key=lambda memory: memory.total)


class _Held:
    """The table at the head of this file."""

    def __init__(self, sizes: Sizes, cfg: TrainConfig, *, ranks: int, accumulates: bool):
        self.sizes, self.ranks, self.accumulates = sizes, ranks, accumulates
        self.stage, self.bf16 = cfg.effective_zero_stage, cfg.precision == "bf16"
        self.settings = zero_settings(cfg, trainable=sizes.trainable)
        self.width = 2 if self.bf16 else FP32
        self.bucket = min(sizes.trainable, self.settings.reduce_bucket_size)
        N = sizes.trainable
        self.share = -(-N // ranks) if self.stage else N
        self.moments = FP32 * (2 * N - sizes.muon) * self.share // N
        self.masters = FP32 * self.share if self.stage else 0
        everything = N + sizes.frozen
        persistent = sizes.persistent if ranks > 1 else 0
        self.weights = self.width * (-(-everything // ranks) + persistent if self.stage == 3 else everything)
        self.weights += sizes.another
        self.whole = self.width * everything
        # What stays from one micro-batch to the next.
        self.kept = {0: 0, 1: 6 * N if self.bf16 else 0, 2: 0, 3: FP32 * self.share}[self.stage]
        if accumulates:
            self.kept += {0: FP32 * N, 1: 0 if self.bf16 else FP32 * N, 2: FP32 * self.share, 3: 0}[self.stage]

    def at(self, moment: str, ready: int, activations: int) -> Memory:
        """While activations live; `ready` elements of the gradients are whole."""
        gradients = self.kept
        if self.stage == 0 or (self.stage == 1 and not self.bf16):
            gradients = max(gradients, FP32 * ready)
        elif self.stage == 2 and ready > self.bucket:
            gradients = max(gradients, FP32 * self.share)  # a full bucket has been reduced
        buffers = self.live_parameters
        if self.stage == 3 or (self.stage in (1, 2) and ready and not (self.stage == 1 and self.bf16)):
            # A bucket that fills up before the end is reduced in the middle, by way of a copy.
            buffers += self.width * self.bucket * (1 + (self.stage > 1 and ready > self.bucket))
        return self._memory(gradients, buffers, activations, moment)

    def reducing(self, inputs: int, *, gloo: bool) -> Memory:
        """At the end of the last backward pass, with what its buckets hold on their way."""
        N, bucket, share = self.sizes.trainable, self.width * self.bucket, FP32 * self.share
        if self.stage == 0:
            return self._memory(FP32 * N, FP32 * min(N, STAGE_0_BUCKET) * (self.ranks > 1), inputs, "reduction")
        if self.stage == 1 and self.bf16:
            # The sums of a group are one tensor: one that is larger than a bucket is reduced alone, without a copy.
            sent = 6 * N if N <= STAGE_0_BUCKET else 2 * self.sizes.largest_group
            return self._memory(self.kept, sent, inputs, "reduction")
        if self.stage == 1:
            return self._memory(FP32 * N, bucket, inputs, "reduction")
        if self.stage == 2 and self.bf16:
            return self._memory(share, 2 * bucket + FP32 * self.sizes.largest, inputs, "reduction")
        if self.stage == 2:
            copied = bucket if self.ranks > 1 else 0
            return self._memory(self.kept, bucket + max(copied, share), inputs, "reduction")
        summed = FP32 * -(-self.bucket // self.ranks) if self.bf16 else 0
        on_the_way = bucket + max(summed, bucket if gloo else 0)
        # Of the gathered parameters the last used is left: tied embeddings, which are the largest, come first and last.
        left = min(self.live_parameters, self.width * self.sizes.largest)
        return self._memory(self.kept, bucket + on_the_way + left, inputs, "reduction")

    def stepping(self, inputs: int) -> Memory:
        """In the optimizer's step."""
        N, share = self.sizes.trainable, FP32 * self.share
        if self.stage == 0:
            return self._memory(FP32 * N, self.sizes.workspace, inputs, "optimizer step")
        if self.stage == 1 and self.bf16:
            return self._memory(self.kept, 0, inputs, "optimizer step")
        if self.stage == 3:
            copied = FP32 * min(self.share, -(-self.settings.sub_group_size // self.ranks))
            return self._memory(self.kept, copied + self.width * self.bucket, inputs, "optimizer step")
        copied = 0 if self.bf16 else FP32 * -(-self.sizes.largest_group // self.ranks)
        return self._memory(share, copied, inputs, "optimizer step")

    def starting(self, *, gloo: bool) -> Memory:
        """When DeepSpeed takes the model over: whole on every rank, and under ZeRO 1 and 2 a group of it twice.

        A second model follows to a GPU with the first loss.
        """
        twice = self.width * self.sizes.largest_group if self.stage in (1, 2) else 0
        weights = self.whole + (self.sizes.another if gloo else 0)
        return Memory(weights, 0, 0, 0, twice, self.sizes.buffers, "start")

    @property
    def live_parameters(self) -> int:
        """Bytes of parameters that ZeRO-3 has gathered, at most."""
        if self.stage != 3 or self.ranks == 1:
            return 0
        settings, sizes = self.settings, self.sizes
        cut = sizes.trainable + sizes.frozen - sizes.persistent
        reused = min(settings.max_reuse_distance // 2, settings.max_live_parameters)
        return self.width * min(cut, reused + settings.prefetch_bucket_size + sizes.largest)

    def _memory(self, gradients: int, buffers: int, activations: int, moment: str) -> Memory:
        return Memory(self.weights, self.masters, gradients, self.moments, buffers, activations, moment)
