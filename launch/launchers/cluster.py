"""What a user says once about a cluster: the schema of configs/clusters/*.yaml, overridden by `cluster.key=value`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...stages.runtime.config import load_config
from ..stage_lookup import find_config


@dataclass
class SlurmConfig:
    """Becomes #SBATCH lines; an empty value leaves its line out. `options` are further ones, such as --exclusive."""

    account: str = ""
    partition: str = ""
    qos: str = ""
    time: str = "24:00:00"  # a longer run is requeued as often as it needs
    stop_before_seconds: int = (
        300  # before the time is up the ranks are asked for a checkpoint; Slurm counts in minutes
    )
    gres: str = ""  # "" with GPUs: gpu:NPROC
    memory: str = ""  # of a node; "0" is all of it
    options: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)  # lines of shell before the job: module load, source activate

    def __post_init__(self):
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ValueError(f"slurm.time ({self.time}) must be minutes, H:MM:SS or D-HH:MM:SS")
        if self.stop_before_seconds < 1:
            raise ValueError(f"slurm.stop_before_seconds ({self.stop_before_seconds}) must be 1 or more")


@dataclass
class KubernetesConfig:
    """Becomes a pod template. `volumes` maps persistent volume claims to the folders where pods see them."""

    kind: str = "jobset"  # or pytorchjob, one stage at a time
    image: str = ""  # has `seedling` on its PATH
    namespace: str = "default"
    queue: str = ""  # a Kueue queue, which starts all pods of a job or none
    memory: str = ""
    shared_memory: str = "16Gi"  # the default of 64 MB ends NCCL and data workers with a bus error
    volumes: dict[str, str] = field(default_factory=dict)
    working_dir: str = ""  # where relative paths of configs start; on a volume that all pods share
    node_selector: dict[str, str] = field(default_factory=dict)
    stop_seconds: int = 300  # from a request to stop to the kill: time for a checkpoint

    def __post_init__(self):
        if self.kind not in ("jobset", "pytorchjob"):
            raise ValueError(f"kubernetes.kind ({self.kind}) must be jobset or pytorchjob")


@dataclass
class ClusterConfig:
    """`nodes` machines of `nproc` processes each, one a GPU where there are any."""

    nodes: int = 1
    nproc: int = 1
    gpus: bool = True
    cpus: int = 0  # of a node, for its ranks and their data workers; 0: the cluster's default
    interface: str = ""  # network interface between nodes, where the first one found is the wrong one
    master_port: int = 29500
    environment: dict[str, str] = field(default_factory=dict)
    hostfile: str = ""  # machines to start over ssh, or with --no_ssh one at a time
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    def __post_init__(self):
        for name in ("nodes", "nproc"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be 1 or more")


PREFIX = "cluster."


def load_cluster(name: str | None, *, overrides: Sequence[str] = ()) -> tuple[ClusterConfig, list[str]]:
    """Load a cluster by path or packaged name; return it and the overrides that are not its own."""
    own = [text.lstrip("+").removeprefix(PREFIX) for text in overrides if text.lstrip("+").startswith(PREFIX)]
    rest = [text for text in overrides if not text.lstrip("+").startswith(PREFIX)]
    file = None if name is None else find_config(name, folder="clusters")
    return load_config(ClusterConfig, file, overrides=own).config, rest
