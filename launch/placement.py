"""On which machines a job's ranks run, as options of `run` and `pipeline`, and DeepSpeed's command that starts them.

    --nproc 8                                                    on this machine
    --nproc 8 --nnodes 4 --node_rank 2 --master_addr A           this machine's part of four; each is started like this
    --hostfile F                                                 all machines of F, over ssh, from here

Slurm and Kubernetes start the second form on every node, so that one code path runs everywhere.
"""

import argparse
import base64
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..stages.runtime.rendezvous import free_port

JOB_MODULE = "seedling.launch.job"
LOOPBACK = "127.0.0.1"
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Placement:
    """Processes a node, the number of nodes, which of them this is, and where rank 0 listens."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 0
    hostfile: str = ""

    def __post_init__(self):
        if self.nproc < 1:
            raise ValueError(f"--nproc is {self.nproc}; give the number of processes, 1 or more")
        if self.nnodes < 1:
            raise ValueError(f"--nnodes is {self.nnodes}; give the number of machines, 1 or more")
        if not 0 <= self.node_rank < self.nnodes:
            last = self.nnodes - 1
            raise ValueError(f"--node_rank is {self.node_rank}; with --nnodes {self.nnodes} it is 0 to {last}")
        if self.nnodes > 1 and not (self.master_addr and self.master_port):
            raise ValueError("--nnodes: machines meet at --master_addr ADDRESS --master_port PORT of node 0; give both")
        if self.hostfile and self.nnodes > 1:
            raise ValueError("--hostfile names the machines already; leave --nnodes out")

    @property
    def size(self) -> int:
        """The number of ranks."""
        return sum(hosts_of(self.hostfile).values()) if self.hostfile else self.nproc * self.nnodes

    @property
    def slots(self) -> int:
        """The most ranks on one machine."""
        return max(hosts_of(self.hostfile).values()) if self.hostfile else self.nproc

    @property
    def here(self) -> range:
        """The ranks below this machine's launcher; over ssh there are none, since each machine has a launcher."""
        return range(0) if self.hostfile else range(self.node_rank * self.nproc, (self.node_rank + 1) * self.nproc)

    @property
    def in_this_process(self) -> bool:
        """Whether the only rank is the process that was started; with an address to meet at it is always a child."""
        return self.size == 1 and not (self.hostfile or self.master_addr)

    @property
    def is_first(self) -> bool:
        """Whether this is the machine, of those started like it, that does what is to be done once."""
        return self.node_rank == 0

    def options(self) -> list[str]:
        """Return the options that say this placement again, to a child."""
        there = ["--hostfile", self.hostfile] if self.hostfile else ["--nproc", str(self.nproc)]
        if self.nnodes > 1:
            there += ["--nnodes", str(self.nnodes), "--node_rank", str(self.node_rank)]
        there += ["--master_addr", self.master_addr] if self.master_addr else []
        return there + (["--master_port", str(self.master_port)] if self.master_port else [])


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Add the options of a placement; torchrun's and DeepSpeed's spellings both work."""
    where = parser.add_argument_group("where its ranks run")
    where.add_argument("--nproc", type=int, help="processes a machine (default 1)")
    where.add_argument("--nnodes", type=int, default=1, help="machines; start this command on each of them (default 1)")
    where.add_argument("--node_rank", "--node-rank", type=int, default=0, help="number of this machine, from 0")
    where.add_argument("--master_addr", "--master-addr", default="", help="address of machine 0")
    where.add_argument("--master_port", "--master-port", type=int, default=0, help="a free port of machine 0")
    where.add_argument("--hostfile", default="", metavar="H", help="start all machines of H (`host slots=8`) over ssh")


def placement_of(arguments: argparse.Namespace, *, nproc: int = 1) -> Placement:
    """Return the placement that parsed options say; `nproc` where they do not say it."""
    return Placement(
        nproc=nproc if arguments.nproc is None else arguments.nproc,
        nnodes=arguments.nnodes,
        node_rank=arguments.node_rank,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        hostfile=arguments.hostfile,
    )


def hosts_of(hostfile: str | Path) -> dict[str, int]:
    """Read a host file, `HOST slots=N` a line, into {host: processes}, in its order."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(Path(hostfile).read_text(encoding="utf-8").splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        said = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line)
        if said is None or said[1] in hosts:
            problem = "appears twice" if said else "expected HOST slots=N"
            raise ValueError(f"{hostfile}: line {number}: {line}: {problem}")
        hosts[said[1]] = int(said[2])
    if not hosts:
        raise ValueError(f"{hostfile}: no host in it; write a line `HOST slots=N` for each machine")
    return hosts


def visible_devices(nproc: int) -> list[str]:
    """Return what DeepSpeed's launcher shows to the ranks of this machine: as many of CUDA_VISIBLE_DEVICES.

    These may be numbers or names (GPU-..., MIG-...). What hides all devices goes on hiding them.
    """
    said = os.environ.get(DEVICES)
    if said is None:
        return [str(number) for number in range(nproc)]
    devices = _devices_in(said)
    if devices and len(devices) < nproc:
        raise ValueError(
            f"{DEVICES}={said} shows {len(devices)} GPUs, and --nproc is {nproc}; start one process a GPU, or let it "
            "show more"
        )
    return devices[:nproc] or ["-1"] * nproc


def _devices_in(said: str) -> list[str]:
    # CUDA's own rule: the first entry that is no device hides what comes after it.
    return list(takewhile(re.compile(r"\d+|(GPU|MIG)-\S+").fullmatch, map(str.strip, said.split(","))))


def _refuse_devices_over_ssh() -> None:
    """Refuse a choice of GPUs that would not reach the machines of a host file."""
    said = os.environ.get(DEVICES, "")
    chosen = _devices_in(said)
    if chosen != [str(number) for number in range(len(chosen))]:
        raise ValueError(
            f"{DEVICES}={said} does not reach the machines of --hostfile, which use their first GPUs; unset it, or "
            "start each machine by itself (--no_ssh, or --nnodes and --node_rank)"
        )


def deepspeed_command(placement: Placement, job_arguments: Sequence[str]) -> list[str]:
    """Return the command that starts a placement's ranks of JOB_MODULE: DeepSpeed's launcher.

    On this machine that is its part for one machine; the outer one (`deepspeed`) only adds ssh and a second start of
    Python, and does not die with its parent.
    """
    port = str(placement.master_port or free_port())
    what = ["--no_local_rank", "--module", JOB_MODULE, *job_arguments]
    if placement.hostfile:
        _refuse_devices_over_ssh()
        # The first host is where rank 0 runs; without an address DeepSpeed takes whatever `hostname -I` names first.
        address = placement.master_addr or next(iter(hosts_of(placement.hostfile)))
        there = ["--hostfile", placement.hostfile, "--force_multi", "--master_addr", address, "--master_port", port]
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", *there, *what]
    # Of the other machines only the number of devices counts here.
    world = {f"node{node}": [str(device) for device in range(placement.nproc)] for node in range(placement.nnodes)}
    world[f"node{placement.node_rank}"] = visible_devices(placement.nproc)
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    there = [f"--world_info={encoded}", f"--node_rank={placement.node_rank}"]
    there += [f"--master_addr={placement.master_addr or LOOPBACK}", f"--master_port={port}"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", "--log_level", "warning", *there, *what]
