"""A rank that is busy longer than the others is named once it has been so for a while, and only once."""

import pytest
import torch

from seedling.stages.runtime.stragglers import Stragglers
from seedling.stages.runtime.world import World


class Ranks(World):
    """Rank 0, with what the other ranks would send."""

    def gather(self, value):
        return value


def compare(stragglers, *busy):
    return stragglers.compare(list(busy))


@pytest.fixture
def stragglers():
    return Stragglers(Ranks(0, 4, torch.device("cpu")))


def test_a_slow_rank_is_named_after_three_intervals(stragglers):
    said = [compare(stragglers, 1.0, 1.0, 1.5, 0.9) for _ in range(5)]
    assert [len(lines) for _, lines in said] == [0, 0, 1, 0, 0]
    assert "rank 2 is slow: busy 1.5 s a step" in said[2][1][0] and "the median rank 1 s" in said[2][1][0]
    assert said[0][0] == {"train/slowest_rank_vs_median": 1.5}


@pytest.mark.parametrize("busy", [(1.0, 1.0, 1.5, 0.9), (1e-3, 1e-3, 5e-3, 1e-3)])
def test_a_rank_that_is_slow_now_and_then_or_by_milliseconds_is_not_named(stragglers, busy):
    for i in range(9):
        even = i % 3 == 0 and busy[2] == 1.5
        assert not compare(stragglers, *((1.0,) * 4 if even else busy))[1]


def test_one_process_is_compared_with_nobody():
    assert Stragglers(World(0, 1, torch.device("cpu"))).compare(3.0) == ({}, [])
