from typing import NamedTuple


class SmallTile(NamedTuple):
    tokens: int
    warps: int
    channels: int
    split: int
    stages: int


def small_tile(M, N, K, *, bits, plane, hardware):
    return SmallTile(8 if M <= 8 else 16, 4, 8, 2, 3)
