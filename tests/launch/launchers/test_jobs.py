"""One description of a job: what is launched is told from its file, and each step gets the machines that it can use."""

from pathlib import Path

import pytest

from seedling.launch.launchers.cluster import ClusterConfig
from seedling.launch.launchers.jobs import step_jobs, whole_job

CLUSTER = ClusterConfig(nodes=3, nproc=4, cpus=16, gpus=False)


def test_steps_run_one_after_the_other_on_the_machines_that_they_can_use(folder):
    jobs = step_jobs("toy", overrides=["spread.number=2"], cluster=CLUSTER)
    assert [(job.name, job.nodes, job.nproc, job.after) for job in jobs] == [
        ("shards", 1, 0, None),
        ("spread", 3, 4, "shards"),
        ("alone", 1, 2, "spread"),
    ]
    assert jobs[1].arguments == ["pipeline", "toy", "spread.number=2", "--only", "spread"]
    threads = [{v.name: v.value for v in job.environment}.get("OMP_NUM_THREADS") for job in jobs]
    assert threads == [None, "4", "8"]
    assert not jobs[0].places and jobs[1].places


def test_a_stages_config_is_one_job_with_its_folder(folder):
    (job,) = step_jobs("count.yaml", overrides=["number=2", "run_dir=runs/other"], cluster=CLUSTER)
    assert job.arguments == ["run", "toy_stages:Count", "--config", "count.yaml", "number=2", "run_dir=runs/other"]
    assert (job.name, job.logs, job.nodes, job.nproc) == ("other", Path("runs/other/logs"), 3, 4)


def test_a_whole_pipeline_is_one_job(folder):
    job = whole_job("toy", overrides=[], cluster=CLUSTER)
    assert job.arguments == ["pipeline", "toy"] and job.run_dir == Path("runs/toy")


@pytest.mark.parametrize(
    "name, overrides, said",
    [
        ("count", ["resume=never"], r"^resume=never: .* rename runs/count/checkpoints"),
        ("train", ["train.resume=never"], r"^train\.resume=never: .* rename runs/train/checkpoints"),
        ("toy", ["spread.resume=never"], r"^spread\.resume=never: .* rename runs/toy/spread/checkpoints"),
    ],
)
def test_what_may_be_started_again_may_not_delete_its_checkpoints_each_time(folder, monkeypatch, name, overrides, said):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "stages/runtime"))
    Path("train.yaml").write_text(
        "stage: toy_stage:ToyStage\nrun_dir: runs/train\ntrain: {lr: {body: 0.001, head: 0.001}, max_steps: 3}\n"
    )
    assert step_jobs(name, overrides=[], cluster=CLUSTER)
    for describe in (step_jobs, whole_job):
        with pytest.raises(ValueError, match=said):
            describe(name, overrides=overrides, cluster=CLUSTER)


@pytest.mark.parametrize(
    "name, overrides, said",
    [
        ("toy", ["spraed.number=2"], "nearest step: spread"),
        ("count", ["numbr=2"], "nearest valid key: number"),
        ("neither", [], "neither a pipeline"),
        ("nowhere", [], "no such file"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(folder, name, overrides, said):
    Path("neither.yaml").write_text("run_dir: x\n")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        step_jobs(name, overrides=overrides, cluster=CLUSTER)
