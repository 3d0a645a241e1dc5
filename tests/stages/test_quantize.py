"""quantize: an artifact that loads and transcribes, true reports, the same on any ranks, and plain mistakes."""

import json

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from seedling.launch.cli import main
from seedling.model.audio_llm import AudioLLM, acllm_facts
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import codes_hash, packed_modules
from seedling.stages.runtime.artifacts import lineage, load_artifact

QUANTIZE = {"bits": 4, "group_size": 16, "seconds": 20, "batch_seconds": 6, "refine": {"epochs": 1}}


@pytest.fixture(scope="module")
def given(sft_run, shards):
    return [f"inputs.acllm={sft_run}/artifact", f"data.train=[{shards}]"]


@pytest.fixture(scope="module")
def quantize(tmp_path_factory, given):
    """quantize(*overrides) -> the finished artifact's folder"""

    def run(*overrides):
        run_dir = tmp_path_factory.mktemp("quantize") / "run"
        return tiny_runs.train("quantize", run_dir, QUANTIZE, *given, *overrides) / "artifact"

    return run


@pytest.fixture(scope="module")
def quantised(quantize):
    return quantize()


def transcripts(folder, shards):
    from seedling.data.audio_sets import heldout
    from seedling.data.plan import PlanLimits

    model = AudioLLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = heldout(str(shards), PlanLimits(), micro_batch_seconds=12, micro_batches=1, sample_rate=16000)
    found = []
    for batch in data.first(10):
        nbests = model.transcribe_ids(batch.waveforms_BN, batch.lengths_B)
        found += [(model.processor.decode(nbest[0].ids), text) for nbest, text in zip(nbests, batch.texts)]
    return found


def errors(pairs):
    return sum(heard != said for heard, said in pairs) / len(pairs)


def test_the_artifact_is_a_packed_recogniser_that_still_hears(quantised, sft_run, shards):
    model = AudioLLM.from_pretrained(quantised)
    packed = packed_modules(model)
    assert len(packed) == 8 + 2 * 7 and all(isinstance(one, PackedLinear) and one.bits == 4 for one in packed.values())
    assert not any("converter" in name or "lm_head" in name or "subsampling" in name for name in packed)
    before, after = errors(transcripts(sft_run / "artifact", shards)), errors(transcripts(quantised, shards))
    assert before < 0.2 and after <= before + 0.2


def test_the_manifest_says_what_it_is_and_where_it_came_from(quantised, sft_run):
    artifact, source = load_artifact(quantised, kind="acllm"), load_artifact(sft_run / "artifact")
    model = AudioLLM.from_pretrained(quantised)
    artifact.require(acllm_facts(model), wanted_by="the test")
    assert artifact.facts["codes"] == codes_hash(model)
    assert [one.name for one in lineage(quantised)][:2] == ["", "acllm"]
    assert all(artifact.facts[name] == source.facts[name] for name in acllm_facts(model))
    tensors = load_file(quantised / "model.safetensors")
    packed = sum(t.nbytes for name, t in tensors.items() if name.endswith(("codes", "scale_zero")))
    weights = sum(one.in_features * one.out_features for one in packed_modules(model).values())
    assert artifact.metrics["bits_per_weight"] == pytest.approx(8 * packed / weights)
    assert artifact.metrics["packed_weights"] == weights


def test_the_report_has_every_module_and_every_block(quantised):
    report = json.loads((quantised / "quantization.json").read_text())
    modules = {one["name"]: one for block in report["blocks"] for one in block["modules"]}
    assert modules.keys() == packed_modules(AudioLLM.from_pretrained(quantised)).keys()
    assert all(0 < one["error"] < 0.1 and one["tokens"] > 50 and not one["fallback"] for one in modules.values())
    assert [block["name"] for block in report["blocks"]] == [
        "encoder.layers.0",
        "llm.model.layers.0",
        "llm.model.layers.1",
    ]
    for block in report["blocks"]:
        assert block["refinement"]["after"] <= block["refinement"]["before"]
    table = (quantised / "quantization.md").read_text()
    assert all(f"| {name} |" in table for name in modules)
    metrics = load_artifact(quantised).metrics
    assert metrics["worst_error"] == max(one["error"] for one in modules.values())


def test_rules_decide_module_by_module(quantize):
    rules = "rules=[{pattern: 'encoder.*', bits: 16}, {pattern: converter.proj, bits: 8, group_size: -1}, "
    folder = quantize(rules + "{pattern: '*.down_proj', bits: 3}]", "refine=null")
    forms = {name: (one.bits, one.group_size) for name, one in packed_modules(AudioLLM.from_pretrained(folder)).items()}
    assert forms.pop("converter.proj") == (8, -1)
    assert len(forms) == 14 and all(name.startswith("llm.") for name in forms)
    assert all(form == ((3, 16) if name.endswith("down_proj") else (4, 16)) for name, form in forms.items())


def test_a_budget_deals_out_bits_by_sensitivity(quantize):
    folder = quantize("budget=5.0", "candidates=[2,4,8]", "rules=[{pattern: '*.down_proj', bits: 3}]", "refine=null")
    artifact, model = load_artifact(folder), AudioLLM.from_pretrained(folder)
    assert 4.0 < artifact.metrics["bits_per_weight"] <= 5.0
    bits = {name: one.bits for name, one in packed_modules(model).items()}
    assert all((value == 3) == name.endswith("down_proj") for name, value in bits.items())
    assert len(set(bits.values())) >= 3
    measured = json.loads((folder / "quantization.json").read_text())["sensitivity"]
    assert {one["name"] for one in measured} == bits.keys()
    for one in measured:
        found = [one["errors"][key] for key in ("2", "3", "4", "8")]
        assert found == sorted(found, reverse=True), one["name"]


def test_two_processes_pack_the_weights_of_one(quantised, given, tmp_path):
    config = tiny_runs.write_yaml(tmp_path / "quantize.yaml", QUANTIZE)
    tiny_runs.run_ranks(tmp_path, 2, "quantize", "--config", str(config), f"run_dir={tmp_path}/run", *given)
    assert not (tmp_path / "run/checkpoints/activations").exists()
    one, two = (load_file(folder / "model.safetensors") for folder in (quantised, tmp_path / "run/artifact"))
    assert one.keys() == two.keys()
    # Sums over ranks differ by 1e-16, and H is rounded to float32 after that: a code turns only where a tie is met.
    codes = [name for name in one if name.endswith("codes")]
    differing = np.mean([float((one[name] != two[name]).float().mean()) for name in codes])
    assert differing < 1e-3
    for name in one.keys() - set(codes):
        torch.testing.assert_close(one[name].float(), two[name].float(), rtol=0.02, atol=1e-3, msg=name)


def test_a_finished_run_is_taken_over_and_other_settings_are_refused(given, tmp_path, capsys):
    run_dir = tiny_runs.train("quantize", tmp_path / "run", QUANTIZE, *given, "refine=null")
    first = (run_dir / "artifact/model.safetensors").read_bytes()
    kept = {file: file.stat().st_mtime_ns for file in (run_dir / "checkpoints").glob("*layers*")}
    tiny_runs.train("quantize", tmp_path / "run", QUANTIZE, *given, "refine=null")
    assert (run_dir / "artifact/model.safetensors").read_bytes() == first
    assert len(kept) == 3 and all(file.stat().st_mtime_ns == when for file, when in kept.items())
    arguments = ["run", "quantize", "--config", str(run_dir.with_suffix(".yaml")), f"run_dir={run_dir}", *given]
    assert main([*arguments, "refine=null", "bits=3"]) == 2
    assert "begun with settings" in capsys.readouterr().err
    assert main([*arguments, "refine=null", "bits=3", "resume=never"]) == 0
    assert (run_dir / "artifact/model.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["rules=[{pattern: 'llm.layers.*', bits: 4}]"], "llm.layers.* matches no module that can be quantised; near"),
        (["rules=[{pattern: '*', bits: 16}]"], "there is nothing to quantise"),
        (["bits=5"], "bits is 5"),
        (["group_size=24"], "group_size is 24"),
        (["method=magic"], "method is 'magic'"),
        (["budget=1.0"], "budget is 1 bits per weight, and the fewest bits cost"),
        (["seconds=0"], "seconds is 0"),
        (["data.train=[]"], "data.train is empty"),
        (["data.augment.speed_probability=0.5"], "calibration is on audio as it will come"),
        (["data.valid.dev=somewhere"], "data.valid takes no effect"),
        (["scale_dtype=float32"], "scale_dtype"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(given, tmp_path, capsys, change, said):
    config = tiny_runs.write_yaml(tmp_path / "quantize.yaml", QUANTIZE)
    assert main(["run", "quantize", "--config", str(config), f"run_dir={tmp_path}/run", *given, *change]) == 2
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(found) == 1 and said in found[0], found
    assert not (tmp_path / "run/artifact").exists()


def test_what_is_quantised_is_not_quantised_again(quantised, given, tmp_path, capsys):
    arguments = [f"run_dir={tmp_path}/run", given[1], f"inputs.acllm={quantised}"]
    assert main(["run", "quantize", *arguments]) == 2
    assert "is quantised already" in capsys.readouterr().err
