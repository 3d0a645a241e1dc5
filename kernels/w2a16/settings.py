"""Which kernel takes a product, and with which tiles: the one table of this folder.

No entry is measured yet: this was written without a GPU. Tiles are modelled: registers from ahead-of-time compilation
(no spills), bytes in flight, and blocks enough for the multiprocessors. The bounds between regimes come from the
roofline of an H200 (4.3 TB/s, 790 TFLOP/s): a fused product is limited by decoding and tensor cores from about 30
tokens, and the dequantised weight's way through the L2 pays from about 512. To measure an entry, call small_batch and
middle_batch with `tile=`, at the shapes of benchmarks/w2a16.py, and put the fastest here with the GPU's name.

Shape letters: M tokens, N output channels, K input channels.
"""

from typing import NamedTuple

from .launch import Hardware

SMALL_TOKENS, MIDDLE_TOKENS = 16, 256  # at most: modelled
SCRATCH_BYTES = 20 << 20  # of dequantised weight at a time, of the 40 to 60 MB of an L2: modelled
DEQUANTISE_WARPS, DEQUANTISE_CHANNELS = 4, 4  # modelled


class SmallTile(NamedTuple):
    tokens: int
    warps: int  # each with columns of its own
    channels: int  # of a lane: a block has 8 times as many
    split: int  # blocks that share the columns
    stages: int
    step: int  # decode.tile_rows: as the compiler lays operands out, for speed alone


class MiddleTile(NamedTuple):
    tokens: int
    warps: int  # each with channels of its own
    channels: int  # of a lane: a block has 8 * warps times as many
    split: int  # blocks that share the columns
    stages: int
    step: int  # decode.tile_rows: as the compiler lays operands out, for speed alone


def regime(M: int) -> str:
    """Return "small", "middle" or "large"."""
    return "small" if M <= SMALL_TOKENS else "middle" if M <= MIDDLE_TOKENS else "large"


def small_tile(M: int, N: int, K: int, *, span: int, hardware: Hardware) -> SmallTile:
    tokens, channels = (8, 8) if M <= 8 else (16, 4)
    warps = 4
    blocks = -(-N // (8 * channels))
    # Two blocks a multiprocessor keep loads in flight; a part that has less than a span a warp would idle.
    split = _split(blocks, rounds=-(-K // (span * warps)), wanted=2 * hardware.processors)
    stages = 3 if span > 128 else 2  # with planes of 32 columns a third one spills on Hopper
    return SmallTile(tokens, warps, channels, split, stages, step=2)


def middle_tile(M: int, N: int, K: int, *, span: int, hardware: Hardware) -> MiddleTile:
    warps, channels = 8, 4
    tokens = 16 if M <= 16 else 32  # 64 would spill: sums and products of a plane live beside the accumulator
    blocks = -(-N // (8 * warps * channels)) * -(-M // tokens)
    split = _split(blocks, rounds=-(-K // span), wanted=hardware.processors)
    # Warp groups of Hopper take the left operand two columns a lane.
    step = 8 if hardware.capability == 90 else 2
    return MiddleTile(tokens, warps, channels, split, stages=2, step=step)


def _split(blocks: int, *, rounds: int, wanted: int) -> int:
    """Return how many share the columns so that there are about `wanted` blocks, each with a round of its own."""
    return max(1, min(wanted // blocks, rounds, 16))
