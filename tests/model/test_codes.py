"""Numbers from counts of codes, against closed forms."""

import math

import pytest
import torch

from seedling.model.codes import code_use, collapsed


def test_equal_counts_have_the_perplexity_of_their_number_and_one_code_has_that_of_one():
    use = code_use(torch.tensor([[5, 5, 5, 5, 0, 0], [20, 0, 0, 0, 0, 0], [10, 5, 5, 0, 0, 0]]))
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert use.perplexity_N.tolist() == pytest.approx([4.0, 1.0, math.exp(entropy)])
    assert use.entropy_N.tolist() == pytest.approx([math.log(4), 0.0, entropy])
    assert use.usage_N.tolist() == pytest.approx([4 / 6, 1 / 6, 3 / 6])
    assert use.most_frequent_N.tolist() == pytest.approx([0.25, 1.0, 0.5])
    assert (use.frames, use.num_codes) == (20, 6)


def test_nothing_counted_is_no_nan():
    use = code_use(torch.zeros(1, 4, dtype=torch.int64))
    assert use.entropy_N.tolist() == [0.0] and use.most_frequent_N.tolist() == [0.0] and collapsed(use) == []


def test_collapse_is_judged_against_what_so_few_frames_could_show():
    few = torch.zeros(1, 8192, dtype=torch.int64)
    few[0, :200] = 1
    assert collapsed(code_use(few)) == []  # 200 frames, all with different codes
    many = torch.zeros(2, 8192, dtype=torch.int64)
    many[0, :100], many[1, :4000] = 1000, 25
    assert collapsed(code_use(many)) == [0]
