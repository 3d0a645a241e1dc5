"""The whole self-supervised chain, killed with SIGKILL at a random moment of a random stage and started again.

Pipeline and stage die together, as on a machine that loses its power. What comes out must be what an untouched run
made: both encoders, the labels, the choice of a layer and the last probe.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_runs

from seedling.stages.runtime.artifacts import load_artifact

STAGES = ("pretrain_1", "probe_1", "labels", "pretrain_2", "probe_2")
PROBE = {
    "train": {
        "max_steps": 12,
        "micro_batch_seconds": 4,
        "global_batch_seconds": 8,
        "lr": {"ctc_head": 2e-2},
        "log_every": 4,
        "save_every": 4,
        "wandb": {"mode": "disabled"},
    },
}
CLUSTERS = {"clusters": 20, "sample_frames": 600, "batch_seconds": 4, "iterations": 40, "tolerance": -1.0}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The file of a pipeline as configs/pipelines/ssl_demo.yaml is, without its first steps, which make the data."""
    folder = tmp_path_factory.mktemp("chain")
    shards = tiny_runs.make_shards(folder / "corpus", tiny_runs.sentences(32, seed=1))
    for name, values in (("pretrain", tiny_runs.PRETRAIN), ("probe", PROBE), ("cluster", CLUSTERS)):
        tiny_runs.write_yaml(folder / f"{name}.yaml", values)
    data = {"data.train": [str(shards)], "data.valid": {"dev": str(shards)}}
    kinds = {"pretrain": "encoder_pretrain", "probe": "layer_probe", "cluster": "cluster_labels"}
    steps = [
        {"name": name, "stage": kinds[config], "config": f"{config}.yaml", "inputs": inputs, "set": data}
        for name, config, inputs in (
            ("pretrain_1", "pretrain", {}),
            ("probe_1", "probe", {"encoder": "${pretrain_1}"}),
            ("labels", "cluster", {"encoder": "${pretrain_1}", "probe": "${probe_1}"}),
            ("pretrain_2", "pretrain", {"labeler": "${labels}"}),
            ("probe_2", "probe", {"encoder": "${pretrain_2}"}),
        )
    ]
    return tiny_runs.write_yaml(folder / "chain.yaml", {"name": "chain", "run_dir": "unset", "steps": steps})


def start(pipeline, run_dir, *, log) -> subprocess.Popen:
    """Start the pipeline in a process group of its own."""
    command = [sys.executable, "-m", "seedling.launch.cli", "pipeline", str(pipeline), f"run_dir={run_dir}"]
    with log.open("w") as out:
        return subprocess.Popen(
            command, env=tiny_runs.ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(pipeline, run_dir, *, log) -> str:
    process = start(pipeline, run_dir, log=log)
    try:
        assert process.wait(timeout=1800) == 0, log.read_text()[-3000:]
    finally:
        kill(process)
    return log.read_text()


def kill(process) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@pytest.mark.slow
def test_a_chain_killed_in_a_random_stage_and_started_again_ends_the_same(tmp_path, pipeline):
    untouched, run_dir = tmp_path / "untouched", tmp_path / "run"
    finish(pipeline, run_dir, log=tmp_path / "untouched.log")
    run_dir.rename(untouched)  # manifests name run_dir and the hashes of their inputs: both runs take place in one
    seconds = json.loads((untouched / "summary.json").read_text())["stages"]
    draw = random.SystemRandom()
    stage = draw.choice(STAGES)
    after = draw.uniform(0, 0.95) * seconds[stage]["seconds"]
    message = f"killed {after:.1f} s after the start of {stage}"

    process = start(pipeline, run_dir, log=tmp_path / "first.log")
    deadline = time.time() + 1800
    while not (run_dir / ".pipeline" / f"{stage}.json").exists():
        assert time.time() < deadline and process.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
        time.sleep(0.01)
    time.sleep(after)
    kill(process)
    said = finish(pipeline, run_dir, log=tmp_path / "again.log")

    assert said.count("unchanged since") >= STAGES.index(stage), message
    assert "starting anew" not in said, message
    for name in STAGES:
        manifests = [load_artifact(folder / name / "artifact").manifest for folder in (run_dir, untouched)]
        assert manifests[0] == manifests[1], f"{message}: {name} differs"
