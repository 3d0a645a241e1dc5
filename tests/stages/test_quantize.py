"""quantize: an artifact that loads and transcribes, true reports, the same on any ranks, and plain mistakes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from seedling.data.contexts.draw import ContextConfig
from seedling.data.contexts.sidecar import UtteranceContext
from seedling.data.index import Corpus
from seedling.launch.cli import main
from seedling.model.audio_llm import AudioLLM, acllm_facts
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import codes_hash, packed_modules
from seedling.quant.sensitivity import Sensitivity
from seedling.quant.targets import Target
from seedling.stages.quantize import Quantize, QuantizeConfig, within_budget
from seedling.stages.runtime.artifacts import lineage, load_artifact
from seedling.stages.runtime.world import init_world

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
    folder = quantize(
        "bits=2", "budget=5.0", "candidates=[2,4,8]", "rules=[{pattern: '*.down_proj', bits: 3}]", "refine=null"
    )
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
    shutil.rmtree(run_dir / "artifact")  # only what is kept of its blocks is left
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
        (["budget=1.0", "bits=2"], "budget is 1 bits per weight, and the fewest bits cost"),
        (["seconds=0"], "seconds is 0"),
        (["data.train=[]"], "data.train is empty"),
        (["data.augment.speed_probability=0.5"], "calibration is on audio as it will come"),
        (["data.valid.dev=somewhere"], "data.valid takes no effect"),
        (["scale_dtype=float32"], "scale_dtype"),
        (["batch_seconds=0"], "batch_seconds is 0"),
        (["max_bad_fraction=1.5"], "max_bad_fraction is 1.5"),
        (["calibration.arithmetic=bfloat16"], "calibration.arithmetic is 'bfloat16'; choose one of float64, float32"),
        (["budget=3.0"], "bits is 4 and budget 3, which deals out candidates instead"),
        (["candidates=[2,4]"], "candidates is [2, 4] and has no effect without a budget"),
        (["budget_method=rtn"], "budget_method is rtn and has no effect without a budget"),
        (["refine=null", "calibration.full_share=0.5"], "calibration.full_share is 0.5 and says what refinement aims"),
        (["contexts=[somewhere]"], "this recogniser has not been trained with any"),
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


def broken_copy(shards, folder, utterances: int):
    """A corpus whose first utterances, so many of them, cannot be decoded."""
    copy = shutil.copytree(shards, folder)
    corpus = Corpus.open(str(copy))
    every = [(shard, at) for shard in range(len(corpus.shards)) for at in corpus.index(shard)]
    for shard, at in every[:utterances]:
        with corpus.shards[shard].open("r+b") as handle:
            handle.seek(int(at["audio_offset"]))
            handle.write(bytes(int(at["audio_size"])))
    return copy


def test_audio_that_cannot_be_read_is_an_error_before_any_block_is_kept(given, shards, tmp_path, capsys, caplog):
    config = tiny_runs.write_yaml(tmp_path / "quantize.yaml", QUANTIZE)
    start = ["run", "quantize", "--config", str(config), given[0], "refine=null", "seconds=1000"]
    for count, more, said in (
        (48, [], "no calibration audio could be read: all of 48 utterances"),
        (48, ["max_bad_fraction=1"], "no calibration audio could be read: all of 48 utterances"),
        (2, [], "2 of 48 utterances for calibration were unusable, more than max_bad_fraction=0.01"),
    ):
        broken = broken_copy(shards, tmp_path / f"broken{len(caplog.records)}", count)
        run_dir = tmp_path / f"run{len(caplog.records)}"
        assert main([*start, f"run_dir={run_dir}", f"data.train=[{broken}]", *more]) == 2
        assert said in capsys.readouterr().err
        assert not list((run_dir / "checkpoints").glob("*layers*"))
    assert main([*start, f"run_dir={run_dir}", f"data.train=[{broken}]", "max_bad_fraction=0.1"]) == 0


def test_what_no_batch_calls_is_left_out_of_the_budget_with_a_warning(caplog):
    targets = {name: Target(2, 64) for name in ("a.called", "a.never")}
    measured = [Sensitivity("a.called", 100, {2: 0.5, 4: 0.1}, {2: 2.5, 4: 4.5})]
    cfg = QuantizeConfig(stage="quantize", run_dir="run", inputs={}, budget=4.5, candidates=[2, 4])
    assert within_budget(cfg, targets, measured) == {"a.called": Target(4, 64)}
    assert "a.never: no calibration batch calls it; it stays in full precision" in caplog.text


@pytest.mark.parametrize("keep", [False, True])
def test_contexts_are_cut_to_what_the_recogniser_takes_and_keep_what_is_said(sft_run, shards, tmp_path, keep):
    """The last of five phrases is said by every utterance; a prompt has room for one or two."""
    model = AudioLLM.from_pretrained(sft_run / "artifact")
    model.set_prompts(replace(model.processor.prompts, context_tokens=16))
    model.config.reads_contexts = True

    def contexts_of(text):
        phrases = ("wrong one", "wrong two", "wrong three", "wrong four", text.split()[-1])
        return [UtteranceContext("relevant", ", ".join(phrases), phrases)]

    sidecar = tiny_runs.make_contexts(tmp_path / "contexts", shards, contexts_of)
    cfg = QuantizeConfig(
        stage="quantize", run_dir="run", inputs={}, seconds=5, batch_seconds=6, contexts=[str(sidecar)]
    )
    cfg.data.train, cfg.context = [str(shards)], ContextConfig(share=1.0, keep_relevant=keep)
    stage = Quantize()
    stage.cfg, stage.world = cfg, init_world()
    data = stage._data(model)
    batch = data.dataset[data.first_seconds(5)[0]]
    prompts = stage._prompts(model, batch)
    assert len(prompts.contexts_ids) == len(batch) > 1
    for ids, text in zip(prompts.contexts_ids, batch.texts):
        assert 0 < len(ids) <= 16
        assert (text.split()[-1] in model.processor.decode(ids)) == keep


def test_a_context_length_that_is_not_the_recognisers_is_refused(sft_run, shards):
    model = AudioLLM.from_pretrained(sft_run / "artifact")
    model.config.reads_contexts = True
    takes = model.processor.prompts.context_tokens
    cfg = QuantizeConfig(
        stage="quantize", run_dir="run", inputs={}, contexts=["somewhere"], context=ContextConfig(max_tokens=takes + 7)
    )
    cfg.data.train = [str(shards)]
    stage = Quantize()
    stage.cfg, stage.world = cfg, init_world()
    with pytest.raises(
        ValueError, match=f"context.max_tokens is {takes + 7}, and this recogniser takes {takes} tokens"
    ):
        stage._data(model)
