"""Bytes that a rank sends in an optimizer step, and what that costs beside the arithmetic.

Collectives are rings: an all-gather or a reduce-scatter of n bytes sends n (R - 1) / R from each of R ranks, an
all-reduce twice that. DeepSpeed 0.19 reduces gradients by all-reduce at stages 0 to 2, at stage 2 after every
micro-batch (A of them a rank), and by reduce-scatter at stage 3, where weights are gathered for the forward and for the
backward pass of each micro-batch; recomputed layers find theirs still there. N trainable elements, F frozen ones, w
bytes an element of weights and of gradients on their way:

    stage 0   2 w N                     stage 2   2 w N A + w N
    stage 1   2 w N + w N               stage 3   (2 w (N + F) + w N) A

each times (R - 1) / R. A step takes

    t = arithmetic + (1 - overlap) (bytes / link + passes x latency)

A ring's messages follow one another: each of its passes takes 3.4 us a hop within a node and 14 us between two (NCCL's
own model of rings, src/graph/tuning.cc), for each bucket that is reduced and each group of parameters that is gathered.
Between `overlap` 0, as stages 0 to 2 have it by DeepSpeed's defaults, and 1 lies what stage 3 gets.
"""

from __future__ import annotations

from typing import NamedTuple

from ..stages.runtime.gpus import GPU
from ..stages.runtime.train_config import TrainConfig
from ..stages.runtime.zero_memory import FP32, Sizes, zero_settings

HOP_SECONDS, NODE_HOP_SECONDS = 3.4e-6, 14e-6


class Traffic(NamedTuple):
    """`sent` bytes of a rank a step, in `passes` round the ring: an all-reduce is two."""

    sent: float
    passes: int

    def seconds(self, gpu: GPU, ranks: int) -> float:
        """Return what they take with nothing else going on."""
        between = -(-ranks // gpu.per_node) - 1
        latency = between * NODE_HOP_SECONDS + (ranks - 1 - between) * HOP_SECONDS
        return self.sent / gpu.link(ranks) + self.passes * latency


def traffic(sizes: Sizes, cfg: TrainConfig, *, ranks: int, accumulation: int) -> Traffic:
    """Return what a rank sends in a step under the ZeRO stage and precision of `cfg`."""
    if ranks == 1:
        return Traffic(0, 0)
    N, everything, stage = sizes.trainable, sizes.trainable + sizes.frozen, cfg.effective_zero_stage
    settings = zero_settings(cfg, trainable=N)
    width = 2 if cfg.precision == "bf16" else FP32
    buckets = -(-N // settings.reduce_bucket_size)
    gathers = -(-N // settings.allgather_bucket_size)
    if stage == 0:
        sent, passes = 2 * width * N, 2 * buckets
    elif stage == 1:
        sent, passes = 3 * width * N, 2 * buckets + gathers
    elif stage == 2:
        sent, passes = 2 * width * N * accumulation + width * N, 2 * buckets * accumulation + gathers
    else:
        sent = (2 * width * everything + width * N) * accumulation
        fetches = -(-everything // max(1, settings.prefetch_bucket_size))
        passes = (2 * fetches + buckets) * accumulation
    return Traffic(sent * (ranks - 1) / ranks, passes)
