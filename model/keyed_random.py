"""Random numbers that are a function of (seed, purpose, key): the same for a frame on any rank and device.

A generator's numbers depend on who has drawn before; these do not, so ranks that hold parts of the data agree without
speaking. The mixing function is SplitMix64's finaliser (Steele, Lea and Flood 2014) on 64-bit integers.
Shape letters: N keys.
"""

import torch
from torch import Tensor

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned word."""
    word %= WORD
    return word - WORD if word >> 63 else word


def _shifted(x_N: Tensor, bits: int) -> Tensor:
    """Shift right without dragging the sign along."""
    return (x_N >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x_N: Tensor) -> Tensor:
    x_N = (x_N ^ _shifted(x_N, 30)) * _signed(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ _shifted(x_N, 27)) * _signed(0x94D049BB133111EB)
    return x_N ^ _shifted(x_N, 31)


def keyed_uniform(keys_N: Tensor, *, seed: int, purpose: int) -> Tensor:
    """Return float64 [N] in (0, 1) for int64 keys; another purpose gives numbers unrelated to this one's."""
    seed_word = _mixed(torch.tensor(_signed((seed + 1) * GOLDEN), dtype=torch.int64))
    word = _mixed(seed_word + _signed((purpose + 1) * GOLDEN)).to(keys_N.device)
    bits_N = _shifted(_mixed(_mixed(keys_N + word) + word), 11)
    return (bits_N.double() + 0.5) * 2.0**-53
