"""sft on a spoken toy language: the frozen LLM stays as it was, what should learn learns, and what comes out loads."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_runs
import torch

from seedling import load
from seedling.launch.cli import main
from seedling.launch.stage_lookup import load_stage_config
from seedling.model.audio_llm import AudioLLM
from seedling.model.converter import Converter
from seedling.model.decoding import DecodeConfig
from seedling.stages.runtime.artifacts import lineage, load_artifact, load_inputs
from seedling.stages.runtime.trainer import Trainer
from seedling.stages.runtime.world import init_world
from seedling.stages.sft import SFT


@pytest.fixture
def short(shards) -> list[str]:
    """Three steps on the corpus."""
    return [f"data.train=[{shards}]", "train.max_steps=3", "train.save_every=3"]


@pytest.fixture
def trainer(short, llm_folder, tmp_path):
    """make(*overrides) -> Trainer of three steps, not started"""

    def make(*more: str) -> Trainer:
        config = tiny_runs.write_yaml(tmp_path / "sft.yaml", tiny_runs.SFT)
        overrides = [f"run_dir={tmp_path}/run", f"inputs.llm={llm_folder}", *short, *more]
        _, loaded = load_stage_config("sft", config, overrides=overrides)
        (tmp_path / "run").mkdir()
        return Trainer(SFT(), loaded.config, run_dir=tmp_path / "run", world=init_world())

    return make


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def optimizer_ids(trainer: Trainer) -> set[int]:
    optimizer = getattr(trainer.engine.ds.optimizer, "optimizer", trainer.engine.ds.optimizer)
    return {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in optimizer.state}


# ---- what learns


def test_the_frozen_llm_is_bit_identical_without_gradient_and_without_optimizer_state(trainer, llm_folder, tmp_path):
    trained = trainer()
    llm, before = trained.engine.model.llm, state(trained.engine.model)
    trained.fit()
    changed = tiny_runs.differing(before, trained.engine.model.state_dict())
    assert {name.split(".")[0] for name in changed} == {"encoder", "converter", "ctc_head"}
    assert all(p.grad is None and not p.requires_grad for p in llm.parameters())
    assert not optimizer_ids(trained) & {id(p) for p in llm.parameters()}
    learning = sum(p.numel() for name, p in trained.engine.model.named_parameters() if not name.startswith("llm."))
    assert trained.engine.optimizer_numel() == learning
    shard = torch.load(tmp_path / "run/checkpoints/step_000003/shards/mp_rank_00_model_states.pt", weights_only=False)
    # Not under the name of the tied head either.
    assert {name.split(".")[1] for name in shard["module"]} == {"encoder", "converter", "ctc_head", "fbank"}
    artifact = trained.export()
    kept, original = tiny_runs.weights(artifact.path), tiny_runs.weights(llm_folder)
    assert not [name for name, value in original.items() if not torch.equal(value, kept[f"llm.{name}"])]
    assert artifact.facts["trainable_parameters"] == learning < artifact.facts["parameters"]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_frozen_llm_stays_as_it_was_under_zero_and_bfloat16(trainer, llm_folder, zero_stage):
    trained = trainer("train.precision=bf16", f"train.zero_stage={zero_stage}")
    trained.fit()
    kept, original = tiny_runs.weights(trained.export().path), tiny_runs.weights(llm_folder)
    for name, value in original.items():
        assert torch.equal(kept[f"llm.{name}"].float(), value.bfloat16().float()), name
    losses = [line["train/loss"] for line in tiny_runs.read_lines(trained.run_dir / "metrics.jsonl")]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses


def test_lora_trains_only_adapters_in_the_llm_and_exports_them_merged(trainer, shards, llm_folder):
    trained = trainer("llm_training=lora", "lora.r=4", "lora.lora_dropout=0.1")
    model, before = trained.engine.model, state(trained.engine.model)
    trained.fit()
    changed = [name for name in tiny_runs.differing(before, model.state_dict()) if name.startswith("llm.")]
    assert changed and all("lora_" in name for name in changed)
    assert trained.engine.groups.keys() == {"encoder", "converter", "ctc_head", "lora"}
    artifact = trained.export().path
    kept, original = tiny_runs.weights(artifact), tiny_runs.weights(llm_folder)
    assert kept.keys() >= {f"llm.{name}" for name in original} and not [name for name in kept if "lora" in name]
    moved = {name for name, value in original.items() if not torch.equal(value, kept[f"llm.{name}"])}
    assert moved == {name for name in original if name.endswith("_proj.weight")}
    same_answers(model.eval(), AudioLLM.from_pretrained(artifact).eval())


def test_full_training_moves_every_part_and_its_export_is_what_was_trained(trainer, llm_folder):
    trained = trainer("llm_training=full")
    trained.fit()
    assert trained.engine.groups.keys() == {"encoder", "converter", "ctc_head", "llm"}
    artifact = trained.export().path
    kept, original = tiny_runs.weights(artifact), tiny_runs.weights(llm_folder)
    assert not [name for name, value in original.items() if torch.equal(value, kept[f"llm.{name}"])]
    same_answers(trained.engine.model.eval(), AudioLLM.from_pretrained(artifact).eval())


def test_a_frozen_encoder_keeps_its_bits_while_what_stands_on_it_learns(trainer, capsys):
    trained = trainer("encoder_training=frozen")
    before = state(trained.engine.model)
    trained.fit()
    changed = tiny_runs.differing(before, trained.engine.model.state_dict())
    assert {name.split(".")[0] for name in changed} == {"converter", "ctc_head"} == trained.engine.groups.keys()
    assert "train.lr.encoder has no effect" in capsys.readouterr().out


@torch.no_grad()
def same_answers(a: AudioLLM, b: AudioLLM) -> None:
    wave = torch.from_numpy(tiny_runs.speak("call Marc stop"))[None]
    losses = [model(wave, torch.tensor([wave.shape[1]]), [[20, 21, 22]]).nll_N for model in (a, b)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_without_ctc_there_is_no_head_and_its_learning_rate_is_said_to_have_no_effect(trainer, capsys):
    trained = trainer("ctc_weight=0", "train.max_steps=1")
    assert trained.engine.model.ctc_head is None
    trained.fit()
    assert "train.lr.ctc_head has no effect" in capsys.readouterr().out
    (line,) = [line for line in tiny_runs.read_lines(trained.run_dir / "metrics.jsonl") if "train/loss" in line]
    assert not [name for name in line if "ctc" in name]


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize(
    ("ctc_steps", "learnt"), [(3, {"encoder", "ctc_head"}), (2, {*["encoder", "ctc_head", "converter", "llm"]})]
)
def test_steps_of_ctc_alone_leave_converter_and_llm_as_they_are(trainer, zero_stage, ctc_steps, learnt):
    # Under ZeRO the optimizer sees flat pieces: what has no gradient there still decays.
    decay = 0.0 if zero_stage else 0.5
    trained = trainer(
        f"ctc_steps={ctc_steps}", "llm_training=full", f"train.weight_decay={decay}", f"train.zero_stage={zero_stage}"
    )
    before = state(trained.engine.model)
    trained.fit()
    changed = tiny_runs.differing(before, trained.engine.model.state_dict())
    assert {name.split(".")[0] for name in changed} == learnt
    lines = [line for line in tiny_runs.read_lines(trained.run_dir / "metrics.jsonl") if "train/loss" in line]
    assert ["train/nll" in line for line in lines] == [step >= ctc_steps for step in range(len(lines))]


def test_the_recogniser_keeps_its_own_settings_of_the_search(trainer):
    trained = trainer("train.max_steps=1", "decode.beam_size=3", "decode.ctc_weight=0.4")
    trained.fit()
    model = AudioLLM.from_pretrained(trained.export().path).eval()
    assert (model.decode_config.beam_size, model.decode_config.ctc_weight) == (3, 0.4)
    wave = torch.from_numpy(tiny_runs.speak("call Marc stop"))[None]
    own, same, greedy = (
        model.transcribe_ids(wave, torch.tensor([wave.shape[1]]), config=config)[0]
        for config in (None, DecodeConfig(beam_size=3, ctc_weight=0.4), DecodeConfig())
    )
    assert own == same != greedy


def test_the_normaliser_counts_exactly_the_tokens_that_have_a_loss(trainer):
    trained = trainer()
    stage, model = trained.stage, trained.engine.model
    (step, *_) = trained.data.plan.steps(epochs=1)
    for micro_batch in step.micro_batches:
        batch = trained.data.dataset[micro_batch]
        out = stage.loss(model, batch)
        tokens = sum(len(stage.tokenizer(text).input_ids) + 1 for text in batch.texts)
        assert stage.count(batch) == int(out.metrics["nll"][1]) == tokens
        weighted = out.metrics["nll"][0] + 0.5 * out.metrics["ctc_loss"][0]
        assert float(out.loss_sum.detach()) == pytest.approx(float(weighted), rel=1e-5)


def test_a_validation_set_of_one_utterance_is_scored_and_nothing_else_is(trainer, tmp_path):
    """A step takes two micro-batches: the second is empty, and what stands in for it does not count."""
    alone = tiny_runs.make_shards(tmp_path / "alone", ["call Marc stop"])
    trained = trainer(f"data.valid.alone={alone}", "train.max_steps=1")
    trained.fit()
    planned = trained.valid["alone"]
    batch, _ = map(planned.dataset.__getitem__, next(planned.plan.steps()).micro_batches)
    with trained.engine.evaluating() as model:
        loss_sum, count = trained.stage.evaluate(model, [batch])["loss"]
    assert count == trained.stage.count(batch)
    assert trained.latest_metrics["valid/alone/loss"] == pytest.approx(loss_sum / count, rel=1e-5)


# ---- how well it learns, and what comes out


def test_it_learns_a_small_corpus_by_heart(sft_run):
    lines = tiny_runs.read_lines(sft_run / "metrics.jsonl")
    losses = [line["train/nll"] for line in lines if "train/nll" in line]
    assert all(0 <= line["train/padding_frac_text"] < 0.5 for line in lines if "train/nll" in line)
    assert losses[-1] < 0.2 * losses[0], losses
    metrics = load_artifact(sft_run / "artifact").metrics
    assert metrics["valid/dev/wer"] < 0.1
    assert metrics["valid/dev/ctc_cer"] <= metrics["valid/dev/ctc_wer"] < 0.5, "what the encoder hears without the LLM"


def test_other_noise_does_not_change_what_it_hears(sft_run, texts):
    waves = [tiny_runs.speak(text, seed=900 + i) for i, text in enumerate(texts)]
    heard = [transcript.text for transcript in load(sft_run).transcribe(waves)]
    assert sum(a == b for a, b in zip(heard, texts)) >= 0.8 * len(texts), heard


def test_the_manifest_leads_back_to_the_llm_and_holds_the_features_fingerprint(sft_run, lm_run):
    artifact = load_artifact(sft_run / "artifact", kind="acllm")
    model = AudioLLM.from_pretrained(artifact.path)
    assert artifact.facts["feature_fingerprint"] == model.fbank.fingerprint()
    assert [(a.name, a.kind, a.stage, a.problem) for a in lineage(artifact.path)] == [
        ("", "acllm", "sft", ""),
        ("llm", "llm", "lm_pretrain", ""),
    ]


def test_the_artifact_loads_with_the_auto_classes_and_says_the_same_as_our_recogniser(sft_run, texts, tmp_path):
    code = (
        "import json, sys, seedling, numpy as np\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "folder, wave = sys.argv[1], np.load(sys.argv[2])\n"
        "model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)\n"
        "ids = model.generate(**processor(audio=[wave], sampling_rate=16000))\n"
        "print(json.dumps(processor.batch_decode(ids)))"
    )
    wave = tiny_runs.speak(texts[0], seed=77)
    np.save(tmp_path / "wave.npy", wave)
    command = [sys.executable, "-c", code, str(sft_run / "artifact"), str(tmp_path / "wave.npy")]
    ended = subprocess.run(
        command, env=tiny_runs.ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (ours,) = load(sft_run).transcribe(wave)
    assert json.loads(ended.stdout.splitlines()[-1]) == [ours.text] == [texts[0]]


# ---- going on from a finished recogniser


def test_going_on_from_a_recogniser_starts_with_what_it_knew(sft_run, shards, tmp_path):
    go_on = [f"data.train=[{shards}]", f"data.valid.dev={shards}", f"inputs.acllm={sft_run}/artifact"]
    # A learning rate of nothing: what comes out is what went in, but for the steps it took.
    still = [f"train.lr.{part}=0" for part in ("encoder", "converter", "ctc_head")]
    again = tiny_runs.train("sft", tmp_path / "again", tiny_runs.SFT, *go_on, *still, "train.max_steps=2")
    assert not tiny_runs.differing(tiny_runs.weights(sft_run), tiny_runs.weights(again))
    before, after = (load_artifact(run / "artifact") for run in (sft_run, again))
    assert after.metrics == pytest.approx(before.metrics, abs=1e-5)
    assert after.facts["feature_fingerprint"] == before.facts["feature_fingerprint"]
    assert [a.stage for a in lineage(after.path)] == ["sft", "sft", "lm_pretrain"]


def test_lora_can_be_trained_on_a_recogniser_and_gone_on_from_again(sft_run, shards, tmp_path):
    data, start = [f"data.train=[{shards}]", "llm_training=lora", "train.max_steps=2"], sft_run
    for round_ in range(2):
        go_on = [*data, f"inputs.acllm={start}/artifact"]
        start_weights, run_dir = tiny_runs.weights(start), tmp_path / f"round{round_}"
        start = tiny_runs.train("sft", run_dir, tiny_runs.SFT, *go_on)
        changed = tiny_runs.differing(start_weights, tiny_runs.weights(start))
        assert {name.split(".")[0] for name in changed} == {"encoder", "converter", "ctc_head", "llm"}


def test_a_run_that_goes_on_brings_its_own_masks_and_dropout_and_may_leave_the_ctc_head_alone(
    sft_run, shards, tmp_path
):
    go_on = [f"data.train=[{shards}]", f"inputs.acllm={sft_run}/artifact", "train.max_steps=1"]
    own = ["specaugment.max_freq_bins=5", "encoder.dropout=0.25", "ctc_weight=0"]
    again = tiny_runs.train("sft", tmp_path / "again", tiny_runs.SFT, *go_on, *own)
    config = AudioLLM.from_pretrained(again / "artifact").config
    assert (config.specaugment_config["max_freq_bins"], config.audio_config["dropout"]) == (5, 0.25)
    changed = tiny_runs.differing(tiny_runs.weights(sft_run), tiny_runs.weights(again))
    assert {name.split(".")[0] for name in changed} == {"encoder", "converter"}


@pytest.mark.parametrize("first", ["fp32", "bf16"])
def test_a_run_goes_on_in_its_own_precision_whatever_the_recogniser_was_trained_in(short, llm_folder, tmp_path, first):
    second = {"fp32": "bf16", "bf16": "fp32"}[first]
    start = [*short, f"inputs.llm={llm_folder}", f"train.precision={first}", "train.max_steps=1"]
    start = tiny_runs.train("sft", tmp_path / "start", tiny_runs.SFT, *start)
    go_on = [*short, f"inputs.acllm={start}/artifact", f"train.precision={second}", "train.max_steps=2"]
    again = tiny_runs.train("sft", tmp_path / "again", tiny_runs.SFT, *go_on)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[second]
    found = {name: value.dtype for name, value in tiny_runs.weights(again).items() if not name.startswith("fbank.")}
    assert set(found.values()) == {dtype}, found
    assert all(math.isfinite(line["train/loss"]) for line in tiny_runs.read_lines(again / "metrics.jsonl"))


def test_audio_is_resampled_to_the_rate_of_the_recogniser_gone_on_from(short, llm_folder, tmp_path):
    start = [*short, f"inputs.llm={llm_folder}", "features.sample_rate=8000", "train.max_steps=1"]
    start = tiny_runs.train("sft", tmp_path / "start", tiny_runs.SFT, *start)
    stage, config = SFT(), tiny_runs.write_yaml(tmp_path / "again.yaml", tiny_runs.SFT)
    go_on = [f"run_dir={tmp_path}/again", *short, f"inputs.acllm={start}/artifact"]
    _, loaded = load_stage_config("sft", config, overrides=go_on)
    stage.build(loaded.config, load_inputs(stage.consumes, loaded.config.inputs, stage="sft"))
    planned = stage.batches(loaded.config, "train")
    assert planned.dataset[planned.plan.summary().largest].sample_rate == 8000


# ---- what does not fit together


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "sft needs an LLM"),
        (["inputs.llm=LLM", "inputs.acllm=ACLLM"], "leave out inputs.llm"),
        (["inputs.llm=ACLLM"], "expects 'llm'"),
        (["inputs.acllm=LLM"], "manifest.json"),
        (["inputs.llm=/nowhere"], "/nowhere"),
        (["inputs.llm=SHARDS"], "not a Hugging Face model folder"),
        (["inputs.lm=LLM"], "nearest: inputs.llm"),
        (["inputs.llm=LLM", "llm_training=some"], "frozen, lora, full"),
        (["inputs.llm=LLM", "encoder_training=lora"], "frozen, full"),
        (["llm_training=lora", "lora.r=0"], "lora.r is 0"),
        (["inputs.llm=LLM", "ctc_weight=0", "ctc_steps=3"], "ctc_steps is 3"),
        (["inputs.llm=LLM", "ctc_weight=0", "decode.ctc_weight=0.3"], "decode.ctc_weight is 0.3"),
        (["inputs.llm=LLM", "data.train=[]"], "data.train is empty"),
        (["inputs.llm=LLM", "data.train=[/nowhere]"], "/nowhere"),
        (["inputs.llm=LLM", "train.micro_batch_seconds=0.3", "train.global_batch_seconds=0.6"], "within the limits"),
        (["inputs.llm=LLM", "encoder.num_mel_bins=40"], "features.num_mel_bins (80)"),
        (["inputs.llm=LLM", "llm_training=lora", "lora.target_modules=[query]"], "lora.target_modules"),
        (
            ["inputs.llm=LLM", "llm_training=full", "train.lr={encoder: 1e-3, converter: 1e-3, ctc_head: 1e-3}"],
            "lr.llm",
        ),
        (["inputs.acllm=ACLLM", "features.sample_rate=8000"], "features.sample_rate is 8000"),
        (["inputs.acllm=ACLLM", "encoder.num_layers=2"], "encoder.num_layers is 2"),
        (["inputs.acllm=ACLLM", "prompts.instruction=Listen"], "prompts.instruction is 'Listen'"),
        (["inputs.acllm=NO_CTC"], "ctc_weight"),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_exit_2(
    short, sft_run, shards, llm_folder, no_ctc, tmp_path, capsys, given, said
):
    values = tiny_runs.SFT
    if any(text.startswith("train.lr=") for text in given):  # a mapping in an override adds to the file's
        values = values | {"train": values["train"] | {"lr": {}}}
    folders = {"NO_CTC": no_ctc, "ACLLM": sft_run / "artifact", "SHARDS": shards, "LLM": llm_folder}
    for name, folder in folders.items():
        given = [text.replace(name, str(folder)) for text in given]
    config = tiny_runs.write_yaml(tmp_path / "sft.yaml", values)
    assert main(["run", "sft", "--config", str(config), f"run_dir={tmp_path}/run", *short, *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0], errors
    assert not (tmp_path / "run" / "artifact").exists()


@pytest.fixture(scope="module")
def no_ctc(tmp_path_factory, shards, llm_folder):
    """A recogniser without a CTC head."""
    given = [f"data.train=[{shards}]", f"inputs.llm={llm_folder}", "ctc_weight=0", "train.max_steps=1"]
    return tiny_runs.train("sft", tmp_path_factory.mktemp("no_ctc") / "run", tiny_runs.SFT, *given) / "artifact"


# ---- looking before leaping


def test_check_needs_no_weights_trains_nothing_and_tells_the_frozen_from_the_learning(
    short, llm_folder, tmp_path, capsys
):
    hollow = tmp_path / "hollow"
    shutil.copytree(llm_folder, hollow, ignore=shutil.ignore_patterns("*.safetensors"))
    config = tiny_runs.write_yaml(tmp_path / "sft.yaml", tiny_runs.SFT)
    arguments = [f"run_dir={tmp_path}/run", *short, f"inputs.llm={hollow}"]
    assert main(["check", "sft", "--config", str(config), *arguments]) == 0
    out = capsys.readouterr().out
    size = sum(value.numel() for value in tiny_runs.weights(llm_folder).values())
    (frozen,) = [line for line in out.splitlines() if line.startswith("frozen")]
    assert f"{size:,}" in frozen and "48 utterances" in out and "0 bad" in out
    assert "shapes: all fit as far as aten._ctc_loss" in out  # the last but one: whatever meets a weight comes before
    assert not (tmp_path / "run").exists()


def test_check_finds_a_shape_that_does_not_fit_without_any_weights(short, llm_folder, tmp_path, capsys, monkeypatch):
    config = tiny_runs.write_yaml(tmp_path / "sft.yaml", tiny_runs.SFT)
    arguments = ["check", "sft", "--config", str(config), f"run_dir={tmp_path}/run", *short, f"inputs.llm={llm_folder}"]
    for more in (["ctc_weight=0"], ["ctc_weight=0", "train.precision=bf16", "llm_training=lora"]):
        assert main([*arguments, *more]) == 0
        assert "shapes: all fit, from the dearest micro-batch to the loss" in capsys.readouterr().out
    # Frames of width 48 where the projection wants two of them stacked.
    monkeypatch.setattr(Converter, "forward", lambda self, h_BTD, lengths_B: (self.proj(h_BTD), lengths_B))
    with pytest.raises(RuntimeError, match=r"\b48\b.*\b96\b"):
        main(arguments)


def test_check_opens_the_validation_sets_and_says_what_is_in_them(short, shards, llm_folder, tmp_path, capsys):
    config = tiny_runs.write_yaml(tmp_path / "sft.yaml", tiny_runs.SFT)
    arguments = ["check", "sft", "--config", str(config), f"run_dir={tmp_path}/run", *short, f"inputs.llm={llm_folder}"]
    alone = tiny_runs.make_shards(tmp_path / "alone", ["call Marc stop"])
    assert main([*arguments, f"data.valid.dev={shards}", f"data.valid.alone={alone}"]) == 0
    out = capsys.readouterr().out
    assert "validation set dev: " in out and out.count("of 48 utterances") == 2
    assert "validation set alone: 1 steps, 2 micro-batches\n  of 1 utterances" in out
    assert main([*arguments, "data.valid.dev=/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_check_of_going_on_from_a_recogniser_shows_its_parts(sft_run, shards, tmp_path, capsys):
    config = tiny_runs.write_yaml(tmp_path / "sft.yaml", tiny_runs.SFT)
    arguments = [f"run_dir={tmp_path}/run", f"data.train=[{shards}]", f"inputs.acllm={sft_run}/artifact"]
    assert main(["check", "sft", "--config", str(config), *arguments]) == 0
    facts, out = load_artifact(sft_run / "artifact").facts, capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[0] in ("encoder", "converter", "ctc_head")]
    assert sum(int(row[2].replace(",", "")) for row in rows) == facts["trainable_parameters"]
