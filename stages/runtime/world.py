"""The processes of one job: who am I, on which device, and how small facts travel between ranks.

Gradients go through DeepSpeed (NCCL on GPUs). Counts, stop requests and names go through gloo on the CPU, so that
agreeing on a step never makes the host wait for the GPU's queue.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .rendezvous import free_port


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`; `control` is the gloo group for small facts, None for a process on its own."""

    rank: int
    size: int
    device: torch.device
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Return the element-wise sum over ranks (float64: exact for counts)."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def sum_integers(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise sum over ranks of int64 values on the CPU: exact, in whatever order they meet."""
        if self.size > 1:
            assert values.dtype == torch.int64 and values.device.type == "cpu"
            values = values.clone()
            dist.all_reduce(values, group=self.control)
        return values

    def sum_floats(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise sum over ranks of float64 values on the CPU; the same bits on every rank."""
        if self.size > 1:
            assert values.dtype == torch.float64 and values.device.type == "cpu"
            values = values.clone()
            dist.all_reduce(values, group=self.control)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def ranks_here(self) -> int:
        """Return how many ranks share this one's machine, itself among them; every rank must ask."""
        here = socket.gethostname()
        return self.gather(here).count(here)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


def local_device() -> torch.device:
    """Return the device on which this process trains."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def init_world() -> World:
    """Join the job that RANK and WORLD_SIZE describe, or be one of one. Further calls return the same group."""
    if "RANK" not in os.environ:
        # DeepSpeed asks for mpi4py when these are missing.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({**alone, "MASTER_PORT": str(free_port())})
    device = local_device()
    if cuda := device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    size = dist.get_world_size()
    return World(dist.get_rank(), size, device, _control_group() if size > 1 else None)


def leave_world() -> None:
    """Take the process group down; call it last, on a rank that has finished its work.

    Its threads let go of the last messages whenever they come to it. One that does so while Python shuts down takes the
    whole process with it (exit code -6).
    """
    if dist.is_initialized():
        _CONTROL.clear()
        dist.destroy_process_group()


_CONTROL: list[Any] = []


def _control_group() -> Any:
    if not _CONTROL:
        _CONTROL.append(dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"))
    return _CONTROL[0]


def import_deepspeed() -> Any:
    """Import DeepSpeed without its greetings, and without the op for serving that it would compile for a minute."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with _stderr_silenced():  # it links test programs to see which ops could be built, and the linker complains
        import deepspeed
        from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed still calls collectives by their old names: a warning per call site that no user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Send what this process and its children write to file descriptor 2 nowhere; exceptions still show."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
