import pytest
import torch

from seedling.kernels.w2a16 import layout as layout_module
from seedling.kernels.w2a16.layout import Layout
from seedling.kernels.w2a16.packing import span

GROUPS = (-1, 32, 64, 96, 128, 512)


@pytest.mark.parametrize("N", [1, 7, 5000])
@pytest.mark.parametrize("K", [1, 64, 1000])
@pytest.mark.parametrize("group_size", GROUPS)
def test_tiles_cover_every_column_once_and_hold_whole_groups_or_one(N, K, group_size, monkeypatch):
    monkeypatch.setattr(layout_module, "TILE_ELEMENTS", 4096)
    layout = Layout(N, K, 2, group_size)
    tiles = list(layout.tiles())
    assert [first for first, _ in tiles] == [0, *(last for _, last in tiles[:-1])] and tiles[-1][1] == K
    for first, last in tiles:
        groups = layout.groups(first, last)
        assert first % span(2, group_size) == 0
        whole = group_size != -1 and first % group_size == 0 and (last % group_size == 0 or last == K)
        assert whole or groups.stop - groups.start == 1


@pytest.mark.parametrize(
    "codes, scale_zero, said",
    [
        ((64, 6), (4, 5, 2), r"scale_zero has shape \[4, 5, 2\]; a weight of 6 outputs and 200.*has \[4, 6, 2\]"),
        ((50, 6), (4, 6, 2), r"codes has shape \[50, 6\].*has \[64, 6\]"),
    ],
)
def test_tensors_of_another_weight_are_refused(codes, scale_zero, said):
    with pytest.raises(ValueError, match=said):
        Layout(6, 200, 2, 64).check(torch.empty(codes), torch.empty(scale_zero))
