"""What every launcher hands to its kernel: the weight and the activations as kernels read them, and where they run.

Shape letters: M tokens, N output channels, K input channels, G groups per row.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import plane_columns
from .scales import both_at_once

BITS = (2, 4)
LANE_CHANNELS = 16  # at most, that a lane loads at once


class Hardware(NamedTuple):
    """Of a device: what it can compute (90 is Hopper; 0 where there is no NVIDIA GPU), and its multiprocessors."""

    capability: int
    processors: int


def hardware_of(device: torch.device) -> Hardware:
    """Of tensors on "meta" it is the GPU that they are compiled for (kernels/ahead_of_time.py)."""
    if device.type == "meta":
        from triton.runtime import driver

        properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
        return Hardware(driver.active.get_current_target().arch, properties["multiprocessor_count"])
    return _hardware_of(device)


@cache
def _hardware_of(device: torch.device) -> Hardware:
    if device.type != "cuda":
        return Hardware(0, 4)
    properties = torch.cuda.get_device_properties(device)
    capability = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return Hardware(capability, properties.multi_processor_count)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launch where the tensor lies, whichever device is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class Weight(NamedTuple):
    """A packed weight as kernels read it."""

    codes: Tensor  # int32, four channels an element, where constants["EVEN"]; else bytes
    both_GN: Tensor  # scale and zero, scales.both_at_once
    constants: dict[str, Any]

    @classmethod
    def of(
        cls, codes: Tensor, scale_zero_GN2: Tensor, K: int, *, bits: int, group_size: int, dtype: torch.dtype
    ) -> "Weight":
        """ValueError for a width that has no kernel. `dtype` is what codes are decoded to."""
        if bits not in BITS:
            raise ValueError(f"kernels read codes of {' or '.join(map(str, BITS))} bits, not {bits}; use the reference")
        assert codes.is_contiguous(), "codes are read row by row"
        plane, even = plane_columns(group_size), codes.shape[1] % LANE_CHANNELS == 0
        both_GN, form = both_at_once(scale_zero_GN2)
        constants = {
            "BITS": bits,
            "GROUP": max(group_size, 0),  # 0 where a row is one group
            "R": plane,
            "RAGGED": bool(K % plane),
            "FORM": form,
            "FAST": hardware_of(codes.device).capability > 0 and dtype.itemsize == 2,  # by inline assembly
            "EVEN": even,
        }
        return cls(codes.view(torch.int32) if even else codes, both_GN, constants)

    @property
    def N(self) -> int:
        return self.both_GN.shape[1]

    @property
    def plane(self) -> int:
        return self.constants["R"]

    @property
    def span(self) -> int:
        return self.plane * 8 // self.constants["BITS"]


def with_rows(x_MK: Tensor) -> Tensor:
    """Return x with contiguous rows, near enough for kernels that count in 32 bits; a copy only where it must be."""
    M, K = x_MK.shape
    near = (M - 1) * x_MK.stride(0) + K < 2**31
    return x_MK if x_MK.stride(1) == 1 and near else x_MK.contiguous()
