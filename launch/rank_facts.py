"""What one rank finds around itself: versions, devices, limits, data, and how fast it reaches the others."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")
PROBE_BYTES = 2**24
PROBES = 5


class RankFacts(NamedTuple):
    rank: int
    local_rank: int
    host: str
    versions: dict[str, str]
    cuda_build: bool
    gpus: list[str]
    environment: dict[str, str]  # what steers communication
    clock: float  # seconds, taken together
    shm_free: float
    open_files: int
    disk_free: float
    data_error: str = ""
    data_seconds: float = 0.0
    bandwidth: float = 0.0  # bytes a second that leave a rank in an all-reduce


def gather_facts(world: Any, *, run_dir: str, planned: Any = None) -> list[RankFacts]:
    """Return the facts of every rank, on every rank; `planned` are the batches to try."""
    error, seconds = read_first(planned, rank=world.rank) if planned is not None else ("", 0.0)
    speed, found = probe(world), installed()
    world.barrier()
    clock = time.time()  # of all ranks at once, as nearly as may be
    import torch

    mine = RankFacts(
        rank=world.rank,
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        host=socket.gethostname(),
        versions=found,
        cuda_build=torch.version.cuda is not None,
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
        clock=clock,
        shm_free=free_bytes("/dev/shm"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disk_free=free_bytes(run_dir),
        data_error=error,
        data_seconds=seconds,
        bandwidth=speed,
    )
    return world.gather(mine)


def installed() -> dict[str, str]:
    """Return the versions that ranks must agree on."""
    from .. import __version__

    found = {"seedling": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def free_bytes(path: str) -> float:
    """Return what is free where `path` lies or will lie; infinite where there is no such file system."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return float(shutil.disk_usage(place).free) if place.exists() else float("inf")


def read_first(planned: Any, *, rank: int) -> tuple[str, float]:
    """Read the first micro-batch of a rank; return what went wrong, "" if nothing did, and the seconds it took."""
    start = time.perf_counter()
    try:
        step = next(planned.plan.steps(epochs=1))
        batch = planned.dataset[step.micro_batches[rank % len(step.micro_batches)]]
    except (OSError, ValueError) as error:
        return " ".join(str(error).split()), time.perf_counter() - start
    unusable = f"{batch.bad[0]}, and {len(batch.bad) - 1} more" if batch.bad else ""
    return unusable, time.perf_counter() - start


def probe(world: Any) -> float:
    """Return the bytes a second that leave this rank in a ring's all-reduce of 16 MB; 0 where it is alone."""
    if world.size == 1:
        return 0.0
    import torch
    import torch.distributed as dist

    def wait() -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    tensor = torch.ones(PROBE_BYTES // 4, device=world.device)
    dist.all_reduce(tensor)  # the first one makes the connections
    wait()
    start = time.perf_counter()
    for _ in range(PROBES):
        dist.all_reduce(tensor)
    wait()
    return PROBES * 2 * PROBE_BYTES * (world.size - 1) / world.size / (time.perf_counter() - start)
