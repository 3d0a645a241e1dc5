"""What a packed linear layer can reach on a GPU: bytes, products, and the instructions that its machine code needs.

A roofline of four edges. Memory and tensor cores are those of any product; the other two are read from the compiled
loop: integer instructions (decoding) and instructions issued at all. Rates are assumptions about an H200, not measured.
Shape letters: M positions, K input channels, N output channels.
"""

from typing import NamedTuple

from seedling.kernels.machine_code import Unit

BATCHES = (1, 4, 16, 64, 256, 4096)
SHAPES = ((4096, 4096), (4096, 11008), (4096, 14336), (8192, 28672))  # K, N
# Ratio to the library's product in 16 bits, cold weights: (what must be reached, what is aimed at).
AIMS = {
    1: ((2.0, 2.8), (3.0, 4.2), (4.0, 5.2)),
    4: ((2.0, 2.7), (3.0, 4.0), (4.0, 5.0)),
    16: ((1.8, 2.4), (2.6, 3.5), (3.5, 4.5)),
    64: ((1.1, 1.5), (1.4, 1.9), (1.5, 1.9)),
    256: ((0.7, 0.9), (0.75, 0.9), (0.75, 0.9)),
    4096: ((0.85, 0.93), (0.9, 0.95), (0.9, 0.96)),
}


def aims(M: int, K: int, N: int) -> tuple[float, float] | None:
    """Return (must, target) of a shape; None where nothing is aimed at."""
    if M not in AIMS or (K, N) not in SHAPES:
        return None
    return AIMS[M][{4096 * 4096: 0, 8192 * 28672: 2}.get(K * N, 1)]


class Device(NamedTuple):
    """Rates that a kernel can achieve."""

    name: str
    bytes_per_second: float
    tensor_flops: float
    multiprocessors: int
    clock: float

    def lanes(self, unit: Unit) -> int:
        """Return how many threads of a multiprocessor execute an instruction of this unit in a clock."""
        return {Unit.INTEGER: 64, Unit.CONVERT: 16}.get(unit, 128)


H200 = Device("H200 (assumed)", 4.3e12, 790e12, 132, 1.8e9)


def weight_bits(bits: int, group_size: int, K: int) -> float:
    """Return stored bits a weight, scale and zero of 16 bits each included."""
    return bits + 32 / (K if group_size == -1 else group_size)


def moved_bytes(M: int, K: int, N: int, *, bits_a_weight: float) -> float:
    """Return bytes of weights, and of activations and outputs in 16 bits."""
    return K * N * bits_a_weight / 8 + 2 * M * (K + N)


def ideal_us(M: int, K: int, N: int, *, bits_a_weight: float, device: Device = H200) -> float:
    """Return what memory and tensor cores allow."""
    memory = moved_bytes(M, K, N, bits_a_weight=bits_a_weight) / device.bytes_per_second
    return 1e6 * max(memory, 2 * M * K * N / device.tensor_flops)


class Decode(NamedTuple):
    """What the loop of a compiled kernel spends on a weight, once for each block of positions that it takes part in."""

    integer: float  # instructions of the integer unit
    convert: float
    issued: float  # instructions of any kind
    tokens: int  # positions that share a decoded weight


class Bounds(NamedTuple):
    """Microseconds that each part needs by itself; the largest is the bound, all of them at once are never reached."""

    memory: float
    tensor: float
    integer: float
    issue: float

    @property
    def us(self) -> float:
        return max(self)

    @property
    def by(self) -> str:
        return self._fields[self.index(self.us)]


def bounds(M: int, K: int, N: int, decode: Decode, *, bits_a_weight: float, device: Device = H200) -> Bounds:
    """Return the edges of one shape: every block of `decode.tokens` positions decodes all weights anew."""
    times = -(-M // decode.tokens)
    weights_a_second = device.multiprocessors * device.clock / (K * N * times)
    convert = decode.convert / device.lanes(Unit.CONVERT)
    return Bounds(
        memory=1e6 * moved_bytes(M, K, N, bits_a_weight=bits_a_weight) / device.bytes_per_second,
        tensor=1e6 * 2 * M * K * N / device.tensor_flops,
        integer=1e6 * max(decode.integer / device.lanes(Unit.INTEGER), convert) / weights_a_second,
        issue=1e6 * decode.issued / 128 / weights_a_second,
    )
