"""The table of tiles: a tile for every shape, and enough blocks."""

import pytest

pytest.importorskip("triton")

from seedling.kernels.w2a16.launch import Hardware
from seedling.kernels.w2a16.settings import middle_tile, regime, small_tile

H200 = Hardware(90, 132)


def test_regimes_follow_the_number_of_tokens():
    assert [regime(M) for M in (0, 1, 16, 17, 256, 257, 4096)] == [*["small"] * 3, *["middle"] * 2, *["large"] * 2]


@pytest.mark.parametrize("capability", [0, 80, 90, 100])
def test_tiles_hold_their_tokens_and_parts_are_no_more_than_there_are_rounds(capability):
    hardware = Hardware(capability, 132)
    for N, K in [(1, 1), (17, 300), (4096, 4096), (11008, 4096), (28672, 8192), (4096, 14336)]:
        for M in (1, 8, 9, 16):
            tile = small_tile(M, N, K, span=256, hardware=hardware)
            assert tile.tokens >= M and 1 <= tile.split <= max(1, -(-K // (256 * tile.warps)))
        for M in (17, 64, 256):
            assert 1 <= middle_tile(M, N, K, span=256, hardware=hardware).split <= -(-K // 256)


def test_small_layers_are_split_until_multiprocessors_have_work():
    tile = small_tile(1, 4096, 4096, span=256, hardware=H200)
    assert 4096 // (8 * tile.channels) * tile.split >= 132
    assert small_tile(1, 28672, 8192, span=256, hardware=H200).split == 1
