"""Bytes and seconds of communication, against what is known of rings and trees."""

import pytest

from seedling.launch.traffic import Collectives, Traffic, traffic
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


def test_between_nodes_all_network_cards_of_a_node_carry_a_rank_s_rings():
    h100 = GPUS["h100"]
    assert h100.link(8) == h100.node_link and h100.link(16) == 8 * h100.network == 400e9
    assert h100._replace(network=100e9).link(16) == h100.node_link  # then NVLink is what is slowest
    large = Traffic(Collectives(1e12, 1), Collectives())
    assert large.sent / large.seconds(h100, 1984) == pytest.approx(400e9, rel=0.1)


def test_an_all_reduce_of_many_nodes_goes_up_a_tree_and_a_gather_round_all_ranks():
    h100 = GPUS["h100"]
    reduced, gathered = Traffic(Collectives(0, 1), Collectives()), Traffic(Collectives(), Collectives(0, 1))
    of = {R: (reduced.seconds(h100, R), gathered.seconds(h100, R)) for R in (64, 128, 1024)}
    assert of[128][0] - of[64][0] == pytest.approx(2 * 8.5e-6)  # one more level
    assert of[1024][1] == pytest.approx(896 * 1.9e-6 + 127 * 4e-6)


def test_more_ranks_never_take_less_time():
    h100 = GPUS["h100"]
    for zero_stage in (0, 1, 2, 3):
        took = [
            traffic(SIZES, config(zero_stage, "fp32" if zero_stage == 0 else "bf16"), ranks=R, accumulation=1).seconds(
                h100, R
            )
            for R in (2, 8, 16, 64, 1024)
        ]
        assert took == sorted(took), f"ZeRO {zero_stage}: {took}"
