"""What every launcher hands to its kernel: the operands as kernels read them, and where they run.

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
    """Of a device: what it can compute (90 is Hopper; 0 the interpreter), and its multiprocessors."""

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


def is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether codes are decoded by inline assembly: on NVIDIA's GPUs, into numbers of 16 bits."""
    return hardware_of(device).capability > 0 and dtype in (torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    x_MK: Tensor  # rows contiguous
    codes: Tensor  # int32, four channels an element, where N is a multiple of 16; else bytes
    both_GN: Tensor  # scale and zero, scales.both_at_once
    constants: dict[str, Any]
    hardware: Hardware
    plane: int  # columns of a plane

    @classmethod
    def of(cls, x_MK: Tensor, codes: Tensor, scale_zero_GN2: Tensor, *, bits: int, group_size: int) -> "Operands":
        if bits not in BITS:
            raise ValueError(f"kernels read codes of {' or '.join(map(str, BITS))} bits, not {bits}; use the reference")
        assert codes.is_contiguous(), "codes are read row by row"
        both_GN, form = both_at_once(scale_zero_GN2)
        plane = plane_columns(group_size)
        constants = {
            "BITS": bits,
            "GROUP": max(group_size, 0),
            "R": plane,
            "RAGGED": bool(x_MK.shape[1] % plane),
            "FORM": form,
            "FAST": is_fast(x_MK.device, x_MK.dtype),
        }
        M, K = x_MK.shape
        # Kernels count in 32 bits within x.
        rows_MK = x_MK if x_MK.stride(1) == 1 and (M - 1) * x_MK.stride(0) + K < 2**31 else x_MK.contiguous()
        if codes.shape[1] % LANE_CHANNELS == 0:
            codes = codes.view(torch.int32)
        return cls(rows_MK, codes, both_GN, constants, hardware_of(x_MK.device), plane)

    @property
    def even(self) -> bool:
        return self.codes.dtype == torch.int32

    @property
    def M(self) -> int:
        return self.x_MK.shape[0]

    @property
    def N(self) -> int:
        return self.both_GN.shape[1]

    @property
    def K(self) -> int:
        return self.x_MK.shape[1]
