"""layer_probe and cluster_labels killed with SIGKILL: started again they end as the run that nothing happened to."""

import signal
import time

import pytest
import tiny_runs
from safetensors.torch import load_file

from seedling.stages.runtime.artifacts import load_artifact

PROBE_STEPS = 12
PROBE = {
    "train": {
        "max_steps": PROBE_STEPS,
        "micro_batch_seconds": 4,
        "global_batch_seconds": 8,
        "lr": {"ctc_head": 2e-2},
        "log_every": 1,
        "save_every": 4,
        "wandb": {"mode": "disabled"},
    },
}
# Small batches and many small shards: something is always left to do. Iterations go on until told to stop.
CLUSTERS = {
    "clusters": 60,
    "layer": 2,
    "sample_frames": 600,
    "batch_seconds": 2,
    "iterations": 150,
    "tolerance": -1.0,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("toy")
    shards = tiny_runs.make_shards(folder / "corpus", tiny_runs.sentences(160, seed=1))
    encoder = tiny_runs.make_speech_encoder(folder / "encoder", num_layers=2)
    return [f"inputs.encoder={encoder}", f"data.train=[{shards}]", f"data.valid.dev={shards}"]


def start(stage: str, run_dir, values, given, *, log) -> tiny_runs.Process:
    config = tiny_runs.write_yaml(run_dir.with_suffix(".yaml"), values)
    return tiny_runs.Process(log, "run", stage, "--config", str(config), f"run_dir={run_dir}", *given)


def kill_when(process: tiny_runs.Process, seen, *, timeout: float = 900) -> None:
    """Send SIGKILL as soon as `seen()` is true of what the process has done."""
    deadline = time.time() + timeout
    while not seen():
        assert time.time() < deadline and process.process.poll() is None, process.log.read_text()[-3000:]
        time.sleep(0.001)
    process.process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def finish(process: tiny_runs.Process) -> str:
    assert process.wait() == 0, process.log.read_text()[-3000:]
    return process.log.read_text()


def described(run_dir) -> tuple[dict, dict]:
    manifest = load_artifact(run_dir / "artifact").manifest
    return manifest["files"], manifest["metrics"]


def test_a_probe_killed_and_started_again_has_the_same_heads_and_the_same_choice(tmp_path, given):
    untouched = tiny_runs.train("layer_probe", tmp_path / "untouched", PROBE, *given)
    run_dir = tmp_path / "run"
    process = start("layer_probe", run_dir, PROBE, given, log=tmp_path / "first.log")
    process.wait_for_step(run_dir, 6)
    kill_when(process, lambda: True)
    assert "resuming from" in finish(start("layer_probe", run_dir, PROBE, given, log=tmp_path / "again.log"))
    heads = [load_file(folder / "artifact/heads.safetensors") for folder in (run_dir, untouched)]
    assert not tiny_runs.differing(*heads)
    assert described(run_dir) == described(untouched)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, given):
    return tiny_runs.train("cluster_labels", tmp_path_factory.mktemp("untouched") / "run", CLUSTERS, *given)


def test_cluster_labels_killed_in_kmeans_goes_on_from_its_last_iteration(tmp_path, given, untouched):
    run_dir = tmp_path / "run"
    process = start("cluster_labels", run_dir, CLUSTERS, given, log=tmp_path / "first.log")
    kill_when(process, lambda: "k-means iteration 5:" in process.log.read_text())
    assert not list(run_dir.glob("checkpoints/labels-*")) and not (run_dir / "artifact").exists()
    said = finish(start("cluster_labels", run_dir, CLUSTERS, given, log=tmp_path / "again.log"))
    assert "k-means after " in said and "k-means iteration 5:" not in said and "k-means iteration 150:" in said
    assert described(run_dir) == described(untouched)


def test_cluster_labels_killed_while_labelling_writes_only_what_is_missing(tmp_path, given, untouched):
    run_dir = tmp_path / "run"
    process = start("cluster_labels", run_dir, CLUSTERS, given, log=tmp_path / "first.log")
    kill_when(process, lambda: list(run_dir.glob("checkpoints/labels-*/*.rows.npy")))
    written = {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoints/labels-*/*.rows.npy")}
    said = finish(start("cluster_labels", run_dir, CLUSTERS, given, log=tmp_path / "again.log"))
    assert "k-means after 150 iterations" in said and "k-means iteration" not in said
    every = list(run_dir.glob("checkpoints/labels-*/*.rows.npy"))
    assert len(every) > len(written) and all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert described(run_dir) == described(untouched)
