"""Charts: which lines they hold, and that odd numbers do not break them."""

import json
import math
import re
from html import unescape
from itertools import pairwise

import pytest

from seedling.data.scoring.charts import MAX_CHARTS, MAX_POINTS, chart, charts, curves, nice_ticks, short_number


def test_train_and_validation_of_one_metric_share_a_chart():
    rows = [{"step": s, "train/loss": 1 / (s + 1), "valid/dev/loss": 2.0, "train/lr": 0.1} for s in range(3)]
    found = curves(rows)
    assert list(found) == ["loss", "lr"]
    assert [line.name for line in found["loss"]] == ["train", "valid/dev"]
    assert found["loss"][0].steps == [0, 1, 2]


def test_non_finite_values_texts_and_rows_without_step_leave_no_point():
    rows = [
        {"step": 1, "train/loss": math.nan, "note": "resumed", "ok": True},
        {"train/loss": 9.0},
        {"step": 2, "train/loss": 1.0},
        {"step": 3, "train/loss": math.inf},
        {"step": 4, "train/loss": 2.0},
    ]
    assert [(line.steps, line.values) for line in curves(rows)["loss"]] == [([2, 4], [1.0, 2.0])]
    assert "ok" not in curves(rows) and "note" not in curves(rows)


def test_counters_and_single_numbers_are_no_curves():
    rows = [{"step": s, "train/epoch": s, "train/samples_seen": s} for s in range(9)] + [{"step": 9, "valid/wer": 0.1}]
    assert curves(rows) == {}


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0), (3, 3), (-2, -2), (0.1, 0.1003), (1e-9, 3e-4), (5, 90_000)])
def test_ticks_enclose_the_values_and_are_evenly_spaced(low, high):
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 8
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert steps == {1.0}


def test_long_lines_are_thinned_and_keep_their_last_step():
    rows = [{"step": s, "train/loss": math.sin(s)} for s in range(10_001)]
    drawn = chart(curves(rows)["loss"], title="loss")
    data = json.loads(unescape(re.search(r'data-points="([^"]*)"', drawn)[1]))
    assert len(data[0]["p"]) <= MAX_POINTS and data[0]["p"][-1][0] == 10_000


def test_every_coordinate_lies_inside_the_drawing():
    rows = [{"step": s, "train/loss": 1e6 if s == 50 else 1.0 + s / 100} for s in range(100)]
    drawn = charts(rows)
    for path in re.findall(r" d='M([^']*)'", drawn):
        points = [tuple(map(float, point.split())) for point in path.split("L")]
        assert points and all(0 <= x <= 360 and 0 <= y <= 210 for x, y in points)


def test_metrics_beyond_the_limit_are_named_and_names_are_escaped():
    rows = [{"step": s, **{f"m{i:02}<b>": s * i for i in range(MAX_CHARTS + 2)}} for s in range(3)]
    drawn = charts(rows)
    assert drawn.count("<figure") == MAX_CHARTS and "Not drawn: m09&lt;b&gt;, m10&lt;b&gt;" in drawn
    assert "<b>m" not in drawn.replace("<figcaption><b>", "") and "&lt;b&gt;" in drawn


def test_tick_labels_are_short():
    assert [short_number(x) for x in (0, 1500, 2_000_000, 0.0003, 0.25)] == ["0", "1.5k", "2M", "3e-4", "0.25"]
