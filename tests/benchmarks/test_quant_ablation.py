"""The ablation's control hears what the fine-tuned rows hear, and every row says what its weights take."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from seedling.launch.stage_lookup import load_stage_config

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "quant_ablation.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("quant_ablation", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quant_ablation"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quant_ablation"]


@pytest.mark.parametrize("domain", ["demo", "human"])
def test_the_control_is_the_same_extra_training_of_other_weights(benchmark, domain):
    asked = {"bits": [2], "groups": [64], "parts": [benchmark.WHOLE]}
    made = benchmark.pipeline(benchmark.DOMAINS[domain], Path("run"), Path("out"), **asked, more={})
    steps = {step["name"]: step for step in made["steps"]}
    tuned = next(cell.step for cell in benchmark.cells(**asked) if cell.method == benchmark.TUNED)
    configs = []
    for name in ("control", tuned):
        step = steps[name]
        overrides = [f"{key}={json.dumps(value)}" for key, value in step["set"].items()]
        inputs = [f"inputs.{key}=somewhere" for key in step["inputs"]]
        _, loaded = load_stage_config(step["stage"], step["config"], overrides=[*overrides, *inputs, "run_dir=x"])
        configs.append(loaded.config)
    control, finetuned = configs
    assert not control.specaugment.masks and not finetuned.specaugment.masks
    assert control.data.augment == finetuned.data.augment
    assert control.encoder.dropout == finetuned.encoder.dropout == 0
    for name in ("max_steps", "warmup_steps", "micro_batch_seconds", "global_batch_seconds"):
        assert getattr(control.train, name) == getattr(finetuned.train, name), name


def test_every_row_says_what_a_weight_takes_fine_tuned_ones_too(benchmark, tmp_path):
    asked = {"bits": [2], "groups": [64], "parts": list(benchmark.PARTS)}
    cells = list(benchmark.cells(**asked))
    for number, cell in enumerate(cells):
        name = "quant/bits_per_weight" if cell.method == benchmark.TUNED else "bits_per_weight"
        folder = tmp_path / cell.step / "artifact"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"metrics": {name: 2.0 + number / 100}}))
    stages = {name: {"seconds": 5.0} for name in ("control", *(cell.step for cell in cells))}
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
    said = benchmark.seconds(tmp_path, **asked)
    for number, cell in enumerate(cells):
        assert f"{cell.step}: 5 s, {2.0 + number / 100:.2f} bits a weight" in said
