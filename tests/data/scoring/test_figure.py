"""Figures: well-formed SVG that needs nothing else, with every point inside the drawing."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from seedling.data.scoring.figure import HEIGHT, WIDTH, Mark, svg_figure

MARKS = [
    Mark("measured <&> 'this'", [1, 2, 3], [0.9, 0.4, 0.5], kind="dots"),
    Mark("fit", [1, 3], [0.9, 0.3]),
    Mark("the paper's", [1, 3], [0.95, 0.2], kind="dashed"),
    Mark("", [1, 3], [1.0, 0.6], kind="band", lows=[0.8, 0.1], colour=1),
]


def drawn(marks=MARKS, **settings):
    return svg_figure(marks, title="error & depth", x_label="layer", y_label="WER", **settings)


def test_a_figure_is_one_well_formed_file_that_loads_nothing():
    text = drawn()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r"href|url\(|<script|@import", text) and text.count("http") == 1
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"error & depth", "layer", "WER", "measured <&> 'this'", "fit", "the paper's"} <= set(words)
    assert text.count("class='band") + text.count(" band'") == 1, "a mark without a name is not in the legend"


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6, -3.0])
def test_every_point_lies_inside_the_drawing(scale):
    marks = [Mark("a", [0, 5, 9], [scale, 2 * scale, 1.5 * scale]), Mark("b", [4], [scale], kind="dots")]
    for path in re.findall(r"line line' d='M([\d. L-]+)'", drawn(marks)):
        for point in path.split("L"):
            px, py = map(float, point.split())
            assert 0 <= px <= WIDTH and 0 <= py <= HEIGHT


def test_ticks_are_given_or_found_and_shown_in_percent():
    assert ">75M</text>" in drawn(x_ticks={1: "75M", 3: "2B"})
    assert ">60%</text>" in drawn(percent=True) and ">0.6</text>" in drawn()


def test_points_that_are_not_numbers_are_left_out_and_a_figure_without_points_is_refused():
    text = drawn([Mark("a", [1, 2, 3], [0.5, math.inf, 0.7], kind="dots")])
    assert len(re.findall(r"class='dot s", text)) == 2
    with pytest.raises(ValueError, match="no finite point"):
        drawn([Mark("a", [1], [math.nan])])
