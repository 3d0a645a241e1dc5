"""Keyed random numbers: functions of their key, uniform, and unrelated between neighbours, seeds and purposes."""

import numpy as np
import pytest
import scipy.stats
import torch

from seedling.model.keyed_random import keyed_uniform

IDS = torch.arange(20_000)


def test_a_number_depends_on_its_key_and_not_on_its_neighbours():
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))
    numbers = keyed_uniform(IDS, seed=3, purpose=1)
    assert torch.equal(keyed_uniform(IDS[order], seed=3, purpose=1), numbers[order])
    assert torch.equal(keyed_uniform(IDS[:1], seed=3, purpose=1), numbers[:1])


@pytest.mark.parametrize("ids", [IDS, IDS << 20, IDS - 10_000, IDS * 0x1234567])
def test_numbers_are_uniform_and_inside_the_open_interval(ids):
    numbers = keyed_uniform(ids, seed=1, purpose=0).numpy()
    assert numbers.min() > 0 and numbers.max() < 1
    assert scipy.stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("other", [{"seed": 2, "purpose": 0}, {"seed": 1, "purpose": 1}, {"seed": 0, "purpose": 1}])
def test_seeds_and_purposes_give_unrelated_numbers(other):
    a, b = keyed_uniform(IDS, seed=1, purpose=0).numpy(), keyed_uniform(IDS, **other).numpy()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
