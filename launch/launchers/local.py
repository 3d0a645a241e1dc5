"""This machine, or machines named in a host file: the command runs below this process, which restarts it."""

import sys
from collections.abc import Sequence

from ..placement import LOOPBACK, Placement, hosts_of
from ..remote import check_forwarded
from ..variables import environment_with, shell_lines
from .cluster import ClusterConfig
from .jobs import Job, shown
from .restarts import run_restarting


def local_placement(cluster: ClusterConfig) -> Placement:
    """Return this machine as a placement; ranks are children even if there is one, and are logged like all others."""
    if cluster.nodes > 1:
        raise ValueError(f"--on local is one machine, and nodes is {cluster.nodes}; use hostfile, slurm or k8s")
    return Placement(nproc=cluster.nproc, master_addr=LOOPBACK)


def hostfile_placement(cluster: ClusterConfig, *, node_rank: int | None) -> Placement:
    """Return the machines of a host file: all of them over ssh, or without ssh this one, number `node_rank`."""
    if not cluster.hostfile:
        raise ValueError("--on hostfile needs a file with a line `HOST slots=N` for each machine; give --hostfile FILE")
    hosts = hosts_of(cluster.hostfile)
    if node_rank is None:
        check_forwarded(cluster.environment)
        return Placement(hostfile=cluster.hostfile)
    if len(set(hosts.values())) > 1:
        raise ValueError(f"{cluster.hostfile}: without ssh every machine needs the same number of slots: {hosts}")
    first, nproc = next(iter(hosts.items()))
    port = cluster.master_port
    return Placement(nproc=nproc, nnodes=len(hosts), node_rank=node_rank, master_addr=first, master_port=port)


def command_of(job: Job, placement: Placement) -> list[str]:
    """Return what runs."""
    return [sys.executable, "-m", "seedling.launch.cli", *job.arguments, *placement.options()]


def render(job: Job, placement: Placement) -> str:
    """Return the environment and the command as a script."""
    return "\n".join([*shell_lines(job.environment), shown(command_of(job, placement))]) + "\n"


def start(job: Job, placement: Placement, *, max_restarts: int) -> int:
    """Run it to its end and return its exit code."""
    command: Sequence[str] = command_of(job, placement)
    environment = environment_with(job.environment)
    return run_restarting(command, environment=environment, max_restarts=max_restarts, checkpoints=job.checkpoints)
