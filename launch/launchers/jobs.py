"""One description of a job, for all launchers: a command after `seedling`, its nodes, its environment, its logs.

What is launched is a stage's config (its YAML says `stage:`) or a pipeline (it has `steps:`). A scheduler gets one job
a step, each after the one before, since steps need different numbers of machines.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...stages.runtime.config import read_sources
from ..pipeline_config import Pipeline, Step, load_pipeline
from ..stage_lookup import find_config, load_stage_config
from ..variables import Variable, for_ranks
from .cluster import ClusterConfig


@dataclass(frozen=True)
class Job:
    """`arguments` follow `seedling`; launchers add where the ranks run. `after` names the job that it waits for.

    `run_dir` is where its logs are, and the files that launchers write; its stages write into `checkpoints`.
    """

    name: str
    arguments: list[str]
    run_dir: Path
    checkpoints: list[Path]
    nodes: int
    nproc: int
    environment: list[Variable]
    gpus: bool = False
    after: str | None = None

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def places(self) -> bool:
        """Whether its command takes options of a placement; `prepare` and its like run on one machine as they are."""
        return self.nproc > 0


def whole_job(name: str, *, overrides: Sequence[str], cluster: ClusterConfig) -> Job:
    """Return a stage or a whole pipeline as one job, for launchers that run steps one after the other themselves."""
    loaded = _load(name, overrides)
    command = "pipeline" if isinstance(loaded, Pipeline) else "run"
    first = [name] if command == "pipeline" else [loaded[0], "--config", name]
    run_dir = loaded.run_dir if isinstance(loaded, Pipeline) else loaded[1]
    runs = [run_dir / step.name for step in loaded.steps] if isinstance(loaded, Pipeline) else [run_dir]
    checkpoints = [run / "checkpoints" for run in runs]
    environment = _environment(cluster, cluster.nproc)
    arguments = [command, *first, *overrides]
    return Job(run_dir.name, arguments, run_dir, checkpoints, cluster.nodes, cluster.nproc, environment, cluster.gpus)


def step_jobs(name: str, *, overrides: Sequence[str], cluster: ClusterConfig) -> list[Job]:
    """Return a stage as one job, or a pipeline as one job a step."""
    loaded = _load(name, overrides)
    if not isinstance(loaded, Pipeline):
        return [whole_job(name, overrides=overrides, cluster=cluster)]
    jobs: list[Job] = []
    for step in loaded.steps:
        arguments = ["pipeline", name, *overrides, "--only", step.name]
        nodes, nproc = _size(step, cluster)
        after = jobs[-1].name if jobs else None
        environment = _environment(cluster, nproc)
        gpus = cluster.gpus and "stage" in step.reads
        checkpoints = [loaded.run_dir / step.name / "checkpoints"]
        jobs.append(Job(step.name, arguments, loaded.run_dir, checkpoints, nodes, nproc, environment, gpus, after))
    return jobs


def _load(name: str, overrides: Sequence[str]) -> Pipeline | tuple[str, Path]:
    """Load and check what `name` means: a pipeline, or a stage's (name, run folder)."""
    try:
        file = find_config(name, folder="stages")
    except FileNotFoundError:
        file = find_config(name, folder="pipelines")
    values = {key: value for source in read_sources(file) for key, value in source.values.items()}
    if "steps" in values:
        pipeline = load_pipeline(name, overrides=overrides)
        for step in pipeline.steps:
            _refuse_never(step.reads.get("config", {}), of=f"{step.name}.", run_dir=pipeline.run_dir / step.name)
        return pipeline
    stage = values.get("stage")
    if not isinstance(stage, str):
        raise ValueError(f"{file}: neither a pipeline (steps:) nor a stage's config (stage: NAME); add `stage: NAME`")
    _, loaded = load_stage_config(stage, file, overrides=overrides)
    _refuse_never(loaded.values, of="", run_dir=Path(loaded.config.run_dir))
    return stage, Path(loaded.config.run_dir)


def _refuse_never(values: Mapping[str, Any], *, of: str, run_dir: Path) -> None:
    """Refuse a stage's `resume: never`: a launcher that starts it again would each time delete what it has done."""
    training = values.get("train", {}).get("resume") == "never"
    if training or values.get("resume") == "never":
        key = f"{of}{'train.' if training else ''}resume"
        raise ValueError(
            f"{key}=never: what is launched is started again after a crash or at its time limit, and each time would "
            f"delete its own checkpoints; leave it out, and delete or rename {run_dir}/checkpoints, or choose another "
            "run_dir"
        )


def _size(step: Step, cluster: ClusterConfig) -> tuple[int, int]:
    """Return (nodes, processes a node) of a step; 0 processes for a command that is no stage."""
    if step.is_spread:
        return cluster.nodes, cluster.nproc
    return 1, (step.nproc or 0) if "stage" in step.reads else 0


def _environment(cluster: ClusterConfig, nproc: int) -> list[Variable]:
    threads = cluster.cpus // nproc if nproc else 0
    return for_ranks(threads=threads, interface=cluster.interface, gpus=cluster.gpus, given=cluster.environment)


def shown(command: Sequence[str]) -> str:
    """Return a command as one may type it."""
    return shlex.join(command)
