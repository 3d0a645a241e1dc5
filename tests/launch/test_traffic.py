"""Bytes and seconds of communication, against what is known of rings."""

from seedling.launch.traffic import traffic
from seedling.stages.runtime.gpus import GPUS
from seedling.stages.runtime.train_config import TrainConfig
from seedling.stages.runtime.zero_memory import Sizes

SIZES = Sizes(
    trainable=10**9, frozen=10**10, largest_group=10**9, largest=10**8, persistent=0, muon=0, workspace=0, buffers=0
)


def config(zero_stage, precision="bf16"):
    return TrainConfig(max_steps=1, zero_stage=zero_stage, precision=precision)


def sent(zero_stage, precision="bf16", *, ranks=4, accumulation=1):
    return traffic(SIZES, config(zero_stage, precision), ranks=ranks, accumulation=accumulation).sent


def test_one_rank_sends_nothing():
    assert sent(3, ranks=1) == 0


def test_an_all_reduce_sends_twice_what_all_ranks_but_one_hold():
    assert sent(0, "fp32") == 2 * 4e9 * 3 / 4


def test_stage_2_reduces_after_each_micro_batch_and_stage_1_once():
    assert sent(1, accumulation=8) == sent(1)
    assert sent(2, accumulation=8) - sent(2, accumulation=7) == 2 * 2e9 * 3 / 4


def test_stage_3_gathers_frozen_weights_too_in_both_passes():
    assert sent(3) == (2 * 2 * 1.1e10 + 2e9) * 3 / 4


def test_a_ring_is_as_fast_as_its_slowest_link():
    h100 = GPUS["h100"]
    assert h100.link(8) == h100.node_link and h100.link(16) == h100.network
    of = {R: traffic(SIZES, config(1), ranks=R, accumulation=1).seconds(h100, R) for R in (8, 16)}
    assert of[16] > 5 * of[8]


def test_latency_grows_with_the_ranks():
    h100 = GPUS["h100"]
    of = {R: traffic(SIZES, config(3), ranks=R, accumulation=1) for R in (256, 1024)}
    more = of[1024].seconds(h100, 1024) - of[256].seconds(h100, 256)
    assert more > 1.1 * (of[1024].sent - of[256].sent) / h100.network
