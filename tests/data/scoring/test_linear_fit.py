"""The line fit against scipy's."""

import numpy as np
import pytest
import scipy.stats

from seedling.data.scoring.linear_fit import fit_line, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31, 100])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_quantiles_are_students(freedom, confidence):
    assert t_quantile(confidence, freedom=freedom) == pytest.approx(
        scipy.stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9
    )


@pytest.mark.parametrize("points", [3, 4, 7, 40])
def test_slope_intercept_and_intervals_are_those_of_scipy(points):
    draws = np.random.default_rng(points)
    xs = np.sort(draws.uniform(15, 32, points))
    ys = -0.16 * xs + 6.31 + 0.05 * draws.standard_normal(points)
    found, theirs = fit_line(xs.tolist(), ys.tolist()), scipy.stats.linregress(xs, ys)
    assert (found.slope, found.intercept) == pytest.approx((theirs.slope, theirs.intercept), rel=1e-9)
    t = scipy.stats.t.ppf(0.975, points - 2)
    for interval, middle, error in (
        (found.slope_interval, theirs.slope, theirs.stderr),
        (found.intercept_interval, theirs.intercept, theirs.intercept_stderr),
    ):
        assert interval == pytest.approx((middle - t * error, middle + t * error), rel=1e-8)


def test_the_band_holds_the_true_line_as_often_as_it_says():
    draws, inside = np.random.default_rng(0), 0
    xs = [16.0, 18.0, 20.0, 22.0]
    for _ in range(2000):
        fit = fit_line(xs, [-0.2 * x + 5 + 0.1 * draws.standard_normal() for x in xs])
        inside += abs(fit.at(23.0) - (-0.2 * 23 + 5)) < fit.half_width(23.0)
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_points_on_a_line_have_no_width():
    fit = fit_line([1, 2, 4], [3, 5, 9])
    assert (fit.slope, fit.intercept) == pytest.approx((2, 1)) and fit.half_width(10) < 1e-9


@pytest.mark.parametrize("xs", [[], [1.0], [1.0, 2.0], [1.0, 2.0, 2.0]])
def test_fewer_than_three_sizes_are_refused(xs):
    with pytest.raises(ValueError, match=f"a line through {len(set(xs))} points .* at least 3 different sizes"):
        fit_line(xs, xs)
