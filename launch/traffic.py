"""Bytes that a rank sends in an optimizer step, and what that costs beside the arithmetic.

An all-gather or a reduce-scatter of n bytes sends n (R - 1) / R from each of R ranks, an all-reduce twice that.
DeepSpeed 0.19 reduces gradients by all-reduce at stages 0 to 2, at stage 2 after every micro-batch (A of them a rank),
and by reduce-scatter at stage 3, where weights are gathered for the forward and for the backward pass of each
micro-batch; recomputed layers find theirs still there. N trainable elements, F frozen ones, w bytes an element of
weights and of gradients on their way:

    stage 0   2 w N                     stage 2   2 w N A + w N
    stage 1   2 w N + w N               stage 3   (2 w (N + F) + w N) A

each times (R - 1) / R. A step takes

    t = arithmetic + (1 - overlap) (bytes / link + messages x latency)

There is a message for each bucket that is reduced and each group of parameters that is gathered. NCCL reckons a time
for each way that it has and takes the shortest (src/graph/tuning.cc, whose numbers are the ones below): gathers and
reduce-scatters go round rings, whose R - 1 hops follow one another; an all-reduce may also go up and down a tree, with
log2 of the number of nodes. The protocol LL128 has the shorter hops and 92 % of the bandwidth. Reduction in switches is
left out. Between `overlap` 0, as stages 0 to 2 have it by DeepSpeed's defaults, and 1 lies what stage 3 gets.
"""

from __future__ import annotations

from math import log2
from typing import NamedTuple

from ..stages.runtime.gpus import GPU
from ..stages.runtime.train_config import TrainConfig
from ..stages.runtime.zero_memory import FP32, Sizes, zero_settings


class Way(NamedTuple):
    """One of NCCL's: seconds of a hop within a node and between two, and the share of the link that it fills."""

    hop: float
    node_hop: float
    share: float


RINGS = Way(3.4e-6, 14e-6, 1.0), Way(1.9e-6, 4e-6, 0.92)  # the protocols Simple and LL128
TREES = Way(4e-6, 14e-6, 0.92), Way(1.25e-6, 8.5e-6, 0.92 * 0.92)


class Collectives(NamedTuple):
    """Of one kind in a step: bytes that a rank sends in all of them, and how many there are."""

    sent: float = 0.0
    messages: int = 0


class Traffic(NamedTuple):
    """All-reduces of a step; gathers and reduce-scatters, which have half of their hops."""

    reduced: Collectives
    gathered: Collectives

    @property
    def sent(self) -> float:
        """Bytes of a rank."""
        return self.reduced.sent + self.gathered.sent

    def seconds(self, gpu: GPU, ranks: int) -> float:
        """Return what they take with nothing else going on."""
        nodes = -(-ranks // gpu.per_node)
        link, ring = gpu.link(ranks), (ranks - nodes, nodes - 1)
        tree = min(ranks, gpu.per_node) - 1, log2(nodes)
        ways = [*((way, ring) for way in RINGS), *((way, tree) for way in TREES)]
        reduced = min(_seconds(self.reduced, way, hops, link, passes=2) for way, hops in ways)
        return reduced + min(_seconds(self.gathered, way, ring, link, passes=1) for way in RINGS)


def _seconds(of: Collectives, way: Way, hops: tuple[float, float], link: float, *, passes: int) -> float:
    inside, between = hops
    return of.sent / (link * way.share) + of.messages * passes * (inside * way.hop + between * way.node_hop)


def traffic(sizes: Sizes, cfg: TrainConfig, *, ranks: int, accumulation: int) -> Traffic:
    """Return what a rank sends in a step under the ZeRO stage and precision of `cfg`."""
    if ranks == 1:
        return Traffic(Collectives(), Collectives())
    N, everything, stage = sizes.trainable, sizes.trainable + sizes.frozen, cfg.effective_zero_stage
    settings = zero_settings(cfg, trainable=N)
    width = (2 if cfg.precision == "bf16" else FP32) * (ranks - 1) / ranks
    buckets = -(-N // settings.reduce_bucket_size)
    if stage == 3:
        fetches = -(-everything // max(1, settings.prefetch_bucket_size))
        sent = (2 * width * everything + width * N) * accumulation
        return Traffic(Collectives(), Collectives(sent, (2 * fetches + buckets) * accumulation))
    times = accumulation if stage == 2 else 1
    reduced = Collectives(2 * width * N * times, buckets * times)
    if stage == 0:
        return Traffic(reduced, Collectives())
    return Traffic(reduced, Collectives(width * N, -(-N // settings.allgather_bucket_size)))
