import pytest
import torch
from packed_layers import random_solution

from seedling.quant.solution import LayerSolution


@pytest.mark.parametrize("group_size", [-1, 4, 16])
def test_a_weight_is_scale_times_code_plus_zero_of_its_own_group(group_size):
    solution = random_solution(3, 10, bits=2, group_size=group_size)
    found = solution.dequantised_NK()
    for r in range(3):
        for k in range(10):
            j = 0 if group_size == -1 else k // group_size
            wanted = solution.scale_NG[r, j] * int(solution.codes_NK[r, k]) + solution.zero_NG[r, j]
            assert found[r, k] == wanted


def values(*shape):
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    "codes, scale, zero, bits, group_size, said",
    [
        (values(2, 8), values(2, 1), values(2, 1), 2, -1, "must be uint8"),
        (values(2, 8).byte(), values(2, 1), values(2, 1), 5, -1, "bits is 5"),
        (values(2, 8).byte(), values(2, 2), values(2, 2), 2, 8, r"scales are torch.float32 \[2, 2\]"),
        (values(2, 8).byte(), values(2, 1), values(2, 1).double(), 2, 8, "zeros are torch.float64"),
        (values(2, 8).byte(), values(2, 1), values(2, 1), 2, 0, "group_size is 0"),
        (values(2, 0).byte(), values(2, 0), values(2, 0), 2, 8, "none empty"),
        (torch.full((2, 8), 4).byte(), values(2, 1), values(2, 1), 2, 8, "largest code is 4; 2 bits hold 0 .. 3"),
    ],
)
def test_what_does_not_fit_together_is_refused(codes, scale, zero, bits, group_size, said):
    with pytest.raises(ValueError, match=said):
        LayerSolution(codes, scale, zero, bits, group_size)
