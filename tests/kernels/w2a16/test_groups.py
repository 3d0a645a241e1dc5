import pytest
import torch

from seedling.kernels.w2a16.groups import group_columns, group_count, group_sums


@pytest.mark.parametrize("K, group_size, groups", [(1, 64, 1), (64, 64, 1), (65, 64, 2), (129, 64, 3), (500, -1, 1)])
def test_groups_are_counted_with_the_short_one(K, group_size, groups):
    assert group_count(K, group_size) == groups


@pytest.mark.parametrize("K, group_size, columns", [(200, 64, 64), (200, -1, 200), (40, 64, 64)])
def test_a_whole_group_has_the_columns_of_its_size_or_all(K, group_size, columns):
    assert group_columns(K, group_size) == columns


@pytest.mark.parametrize("K", [1, 5, 8, 9])
@pytest.mark.parametrize("group_size", [-1, 4, 8, 20])
def test_sums_over_groups_are_those_of_each_group(K, group_size):
    values = torch.randn(K, 3).double()
    wanted = torch.stack([part.sum(0) for part in values.split(K if group_size == -1 else group_size)])
    torch.testing.assert_close(group_sums(values, group_size, dim=0), wanted)
    torch.testing.assert_close(group_sums(values.T, group_size), wanted.T)
