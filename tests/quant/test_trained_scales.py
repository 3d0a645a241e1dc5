"""What is said of trained scales, against what was done to them."""

import pytest
import torch
from torch import nn

from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import fold, tune
from seedling.quant.solution import LayerSolution
from seedling.quant.trained_scales import TrainedScales, tuned_matrices


@pytest.fixture
def model() -> nn.Module:
    """Two packed matrices, of 40 columns in groups of 16 and per channel, whose scales and zeros bfloat16 holds."""

    def packed(group_size: int, G: int) -> PackedLinear:
        draws = torch.Generator().manual_seed(G)
        solution = LayerSolution(
            codes_NK=torch.randint(0, 4, (6, 40), generator=draws).to(torch.uint8),
            scale_NG=torch.full((6, G), -0.25),
            zero_NG=torch.full((6, G), 0.5),
            bits=2,
            group_size=group_size,
        )
        return PackedLinear.from_solution(solution, bias=torch.zeros(6), scale_dtype=torch.bfloat16)

    made = nn.Sequential(packed(16, 3), nn.Sequential(packed(-1, 1)), nn.Linear(6, 2))
    tune(made)
    return made


def test_untrained_scales_have_not_moved(model):
    assert list(tuned_matrices(model)) == ["0", "1.0"]
    trained = TrainedScales.of(model)
    fold(model)
    assert trained.moved(model) == dict.fromkeys(
        ("scale_change_mean", "scale_change_max", "rounding_mean", "rounding_max"), 0.0
    )


def test_changes_are_relative_and_roundings_in_scales(model):
    """24 groups. One scale grows by 2^-4, which bfloat16 holds; a zero moves by what it does not."""
    with torch.no_grad():
        model[0].scale_ratio_NG[2, 1] += 2**-4
        model[1][0].centre_shift_NG[3, 0] += 2**-9  # zero: 0.5 + 2^-11; bfloat16 steps there by 2^-8
    trained = TrainedScales.of(model)
    fold(model)
    moved = trained.moved(model)
    assert moved["scale_change_max"] == 2**-4 and moved["scale_change_mean"] == pytest.approx(2**-4 / 24)
    # z' = m - 1.5 s: 0.5 + 1.5 * 0.25 / 16 = 0.5234375 = 134 / 256 is held as well.
    assert moved["rounding_max"] == pytest.approx(2**-9) and moved["rounding_mean"] == pytest.approx(2**-9 / 48)
