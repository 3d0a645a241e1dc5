"""Bootstrap: against the textbook form, against closed forms, and repeatable."""

import numpy as np
import pytest

from seedling.data.scoring.bootstrap import bootstrap_interval, paired_bootstrap, paired_statistic, ratio_of_sums


def corpus(count, *, seed, rate=0.1):
    generator = np.random.default_rng(seed)
    lengths_N = generator.integers(1, 25, size=count)
    return generator.binomial(lengths_N, rate), lengths_N


def test_the_interval_agrees_with_drawing_utterances_one_by_one():
    errors_N, lengths_N = corpus(400, seed=0)
    index_RN = np.random.default_rng(5).integers(0, 400, size=(20_000, 400))
    drawn_R = errors_N[index_RN].sum(axis=1) / lengths_N[index_RN].sum(axis=1)
    ours = bootstrap_interval(errors_N, lengths_N, seed=1, replicates=20_000)
    spread = drawn_R.std()
    assert abs(ours.low - np.quantile(drawn_R, 0.025)) < 0.05 * spread
    assert abs(ours.high - np.quantile(drawn_R, 0.975)) < 0.05 * spread


def test_the_interval_of_independent_errors_is_the_binomial_one():
    generator = np.random.default_rng(2)
    errors_N = generator.binomial(1, 0.2, size=5_000)
    low, high, *_ = bootstrap_interval(errors_N, np.ones_like(errors_N), seed=0, replicates=4_000)
    rate = errors_N.mean()
    half = 1.96 * np.sqrt(rate * (1 - rate) / 5_000)
    assert low == pytest.approx(rate - half, abs=0.05 * half) and high == pytest.approx(rate + half, abs=0.05 * half)


def test_the_same_seed_gives_the_same_interval_in_any_order_of_utterances():
    errors_N, lengths_N = corpus(300, seed=3)
    order_N = np.random.default_rng(0).permutation(300)
    first = bootstrap_interval(errors_N, lengths_N, seed=7)
    assert first == bootstrap_interval(errors_N[order_N], lengths_N[order_N], seed=7)
    assert first != bootstrap_interval(errors_N, lengths_N, seed=8)


def test_blocks_of_draws_do_not_change_the_interval(monkeypatch):
    errors_N, lengths_N = corpus(300, seed=3)
    whole = bootstrap_interval(errors_N, lengths_N, seed=7)
    monkeypatch.setattr("seedling.data.scoring.bootstrap.BLOCK", 1_000)
    assert bootstrap_interval(errors_N, lengths_N, seed=7) == whole


def test_nothing_is_claimed_about_one_utterance_or_an_empty_reference():
    assert bootstrap_interval(np.array([1]), np.array([5]), seed=0) is None
    assert bootstrap_interval(np.array([1, 2]), np.array([0, 0]), seed=0) is None


def test_the_paired_difference_is_far_narrower_than_two_separate_intervals():
    errors_N, lengths_N = corpus(1_000, seed=4)
    better_N = np.maximum(errors_N - (np.arange(1_000) % 20 == 0), 0)
    change = paired_bootstrap(errors_N, better_N, lengths_N, seed=0)
    alone = bootstrap_interval(errors_N, lengths_N, seed=0)
    assert change.high < 0 and change.probability_of_improvement == 1.0
    assert change.high - change.low < 0.5 * (alone.high - alone.low)
    assert change.difference == pytest.approx((better_N.sum() - errors_N.sum()) / lengths_N.sum())


def test_a_system_does_not_improve_on_itself():
    errors_N, lengths_N = corpus(100, seed=5)
    assert paired_bootstrap(errors_N, errors_N, lengths_N, seed=0)[:4] == (0.0, 0.0, 0.0, 0.0)


def test_settings_out_of_range_are_refused():
    errors_N, lengths_N = corpus(10, seed=6)
    with pytest.raises(ValueError, match="replicates"):
        bootstrap_interval(errors_N, lengths_N, seed=0, replicates=0)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval(errors_N, lengths_N, seed=0, confidence=95)
    with pytest.raises(ValueError, match="two or more utterances"):
        paired_bootstrap(errors_N[:1], errors_N[:1], lengths_N[:1], seed=0)


def test_the_paired_interval_of_independent_changes_is_the_normal_one():
    """Of two proportions over the same utterances only those count that change: d is -1, 0 or 1 in each."""
    generator = np.random.default_rng(8)
    first_N, second_N = generator.binomial(1, 0.4, size=3_000), generator.binomial(1, 0.3, size=3_000)
    second_N = np.where(generator.random(3_000) < 0.7, first_N, second_N)
    ones_N = np.ones_like(first_N)
    sides = (np.stack([errors_N, ones_N], axis=1) for errors_N in (first_N, second_N))
    low, high, *_ = paired_statistic(*sides, ratio_of_sums, seed=0, replicates=4_000)
    change_N = second_N - first_N
    half = 1.96 * change_N.std() / np.sqrt(3_000)
    assert low == pytest.approx(change_N.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(change_N.mean() + half, abs=0.06 * half)


def test_paired_rates_may_be_over_different_numbers_and_need_something_on_both_sides():
    first_N2, second_N2 = np.array([[1, 2], [0, 0], [1, 1]]), np.array([[0, 1], [2, 4], [0, 0]])
    low, high, *_ = paired_statistic(first_N2, second_N2, ratio_of_sums, seed=0)
    assert -1 <= low <= 2 / 5 - 2 / 3 <= high <= 0.5
    assert paired_statistic(first_N2, second_N2 * 0, ratio_of_sums, seed=0) is None
