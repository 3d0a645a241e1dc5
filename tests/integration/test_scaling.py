"""A scaling study in real processes: trained, fitted, drawn; after a stop it goes on and skips what is done."""

import json
import subprocess
import sys

import pytest
import tiny_runs

STUDY = {
    "name": "toy",
    "pretrain": {"config": "pretrain.yaml"},
    "sizes": [
        {"name": name, "set": {"encoder.dim": dim, "encoder.num_layers": 1}}
        for name, dim in (("a", 16), ("b", 32), ("c", 64))
    ],
}


@pytest.mark.slow
def test_a_study_stopped_by_a_failing_size_goes_on_and_skips_what_is_done(tmp_path):
    shards = tiny_runs.make_shards(tmp_path / "corpus", tiny_runs.sentences(32, seed=1))
    data = {"train": [str(shards)], "valid": {"dev": str(shards)}}
    tiny_runs.write_yaml(tmp_path / "pretrain.yaml", {**tiny_runs.PRETRAIN, "stage": "encoder_pretrain", "data": data})
    study = tiny_runs.write_yaml(tmp_path / "study.yaml", {**STUDY, "run_dir": str(tmp_path / "run")})

    def run(*overrides):
        command = [sys.executable, "-m", "seedling.launch.cli", "scaling", str(study), *overrides]
        return subprocess.run(command, env=tiny_runs.ENVIRONMENT, capture_output=True, text=True, timeout=1800)

    failed = run("pretrain_c.train.max_steps=0")
    assert failed.returncode == 2, failed.stdout[-3000:]
    assert "set exactly one of them above 0" in failed.stderr
    assert f"to go on: seedling scaling {study}" in failed.stderr and not (tmp_path / "run/scaling.json").exists()
    finished = run()
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert finished.stdout.count("unchanged since") == 2
    report = json.loads((tmp_path / "run/scaling.json").read_text())
    assert [point["size"] for point in report["points"]] == ["a", "b", "c"] and "loss" in report["fits"]
    assert "slope" in finished.stdout and (tmp_path / "run/scaling_loss.svg").read_text().startswith("<svg")
