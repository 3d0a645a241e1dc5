"""Means over seeds: scipy's interval."""

import math

import numpy as np
import pytest
from scipy import stats

from seedling.data.scoring.over_seeds import Estimate


def test_the_interval_is_students():
    values = np.random.default_rng(0).normal(3, 2, size=4).tolist()
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    estimate = Estimate.of(values)
    assert estimate.mean == pytest.approx(np.mean(values))
    assert (estimate.mean - estimate.half_width, estimate.mean + estimate.half_width) == pytest.approx((low, high))


def test_one_seed_says_nothing_of_how_sure_it_is():
    estimate = Estimate.of([0.25])
    assert math.isnan(estimate.half_width) and estimate.shown(percent=True) == "25.0"


def test_what_is_shown():
    assert Estimate(0.1234, 0.02).shown(percent=True) == "12.3 [10.3, 14.3]"
    assert Estimate(-0.01, 0.02).shown(signed=True) == "-0.010 [-0.030, +0.010]"
