"""quant_finetune on the spoken toy language: only what may learn learns, integers are those of the input, it recovers
what rounding has cost, and what does not fit together is one line."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from packed_layers import make_recogniser, pack_all
from tiny_packed import make_packed

from seedling import load
from seedling.kernels.head_kl import head_kl
from seedling.launch.cli import main
from seedling.launch.stage_lookup import load_stage_config
from seedling.model import distillation
from seedling.model.audio_llm import AudioLLM
from seedling.quant.packed_model import codes_hash, packed_modules, tune
from seedling.stages.quant_finetune import QuantFinetune
from seedling.stages.runtime.artifacts import lineage, load_artifact
from seedling.stages.runtime.trainer import Trainer
from seedling.stages.runtime.world import init_world


@pytest.fixture(scope="module")
def packed(tmp_path_factory, sft_run):
    """The recogniser that learnt the corpus by heart at 2 bits, rounded to nearest: it has forgotten a lot."""
    return make_packed(tmp_path_factory.mktemp("packed"), sft_run / "artifact", bits=2, group_size=32)


@pytest.fixture
def given(shards, packed, sft_run) -> list[str]:
    """Three steps of the packed recogniser under its teacher."""
    inputs = [f"inputs.acllm={packed}", f"inputs.teacher={sft_run}/artifact"]
    return [f"data.train=[{shards}]", *inputs, "train.max_steps=3", "train.save_every=3"]


@pytest.fixture
def trainer(given, tmp_path):
    """make(*overrides) -> Trainer, not started"""

    def make(*more: str, teacher: bool = True) -> Trainer:
        config = tiny_runs.write_yaml(tmp_path / "quant_finetune.yaml", tiny_runs.QUANT_FINETUNE)
        mine = [text for text in given if teacher or not text.startswith("inputs.teacher")]
        _, loaded = load_stage_config("quant_finetune", config, overrides=[f"run_dir={tmp_path}/run", *mine, *more])
        (tmp_path / "run").mkdir(exist_ok=True)
        return Trainer(QuantFinetune(), loaded.config, run_dir=tmp_path / "run", world=init_world())

    return make


def batches(trainer: Trainer) -> list:
    steps = trainer.data.plan.steps(epochs=1)
    return [trainer.data.dataset[micro_batch] for step in steps for micro_batch in step.micro_batches]


def codes(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tiny_runs.weights(folder).items() if tensor.dtype == torch.uint8}


# ---- what learns


def test_scales_norms_and_biases_learn_and_nothing_else(trainer, packed):
    trained = trainer()
    before = {name: p.detach().clone() for name, p in trained.engine.model.named_parameters()}
    trained.fit()
    after = dict(trained.engine.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, p in after.items() if p.requires_grad}
    kinds = {trained.stage.trainable(name) for name in changed}
    assert kinds == {"scales", "norms", "biases"}
    for name in set(after) - changed:
        assert "norm" not in name and not name.rpartition(".")[2].startswith(("scale", "centre")), name
    owners = {name.rpartition(".")[0] for name in changed if trained.stage.trainable(name) == "scales"}
    assert owners == set(packed_modules(AudioLLM.from_pretrained(packed)))


def test_the_integers_of_the_artifact_are_those_of_the_input_and_scales_are_not(trainer, packed, sft_run):
    trained = trainer()
    trained.fit()
    path = trained.export().path
    assert codes(packed) and not tiny_runs.differing(codes(packed), codes(path))
    changed = tiny_runs.differing(tiny_runs.weights(packed), tiny_runs.weights(path))
    assert any(name.endswith("scale_zero") for name in changed)
    before, after = tiny_runs.weights(packed), tiny_runs.weights(path)
    assert all(before[name].dtype == after[name].dtype for name in before)
    artifact = load_artifact(path, kind="acllm")
    assert [a.stage for a in lineage(path)][:2] == ["quant_finetune", "quantize"]
    assert artifact.facts["codes"] == codes_hash(AudioLLM.from_pretrained(packed))
    metrics = artifact.metrics
    matrices = {name.removesuffix(".codes") for name in codes(path)}
    held = sum(t.nbytes for name, t in after.items() if name.rpartition(".")[0] in matrices and "bias" not in name)
    weights = sum(tiny_runs.weights(sft_run)[f"{name}.weight"].numel() for name in matrices)
    assert metrics["quant/bits_per_weight"] == pytest.approx(8 * held / weights)
    assert 0 < metrics["quant/rounding_mean"] <= metrics["quant/rounding_max"] < 0.05
    assert 0 < metrics["quant/scale_change_mean"] <= metrics["quant/scale_change_max"] < 0.1


def test_a_learning_rate_of_zero_leaves_every_byte_as_it_was(trainer, packed):
    trained = trainer("train.lr={scales: 0, norms: 0, biases: 0}")
    trained.fit()
    path = trained.export().path
    assert (path / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    assert trained.stage.trainable("llm.model.norm.weight") == "norms"


@pytest.mark.parametrize(
    ("setting", "groups"),
    [
        ("train_norms=false", {"scales", "biases"}),
        ("train_biases=false", {"scales", "norms"}),
        ("also_train=[converter.*]", {"scales", "norms", "biases", "converter"}),
        ("also_train=[ctc_head.proj.weight,llm.model.embed*]", {"scales", "norms", "biases", "ctc_head", "llm"}),
    ],
)
def test_settings_say_what_else_learns(trainer, setting, groups):
    trained = trainer(setting, *(f"train.lr.{group}=1e-3" for group in groups))
    assert set(trained.engine.groups) == groups
    assert all(group["weight_decay"] == 0 for group in trained.engine.ds.optimizer.param_groups)


# ---- the loss


def test_the_loss_is_the_sum_of_its_parts(trainer):
    trained = trainer("kl_weight=0.7", "temperature=2", "encoder_weight=0.3", "ctc_weight=0.5")
    stage, model = trained.stage, trained.engine.model
    batch = batches(trained)[0]
    found = stage.loss(model, batch)
    parts = {name: float(total) for name, (total, _) in found.metrics.items()}
    wanted = parts["nll"] + 0.5 * parts["ctc_loss"] + 0.7 * parts["kl"] + 0.3 * parts["encoder_error"]
    assert float(found.loss_sum.detach()) == pytest.approx(wanted, rel=1e-5)
    # The divergence, from the two recognisers as files.
    out = [
        heard(batch.waveforms_BN, batch.lengths_B, stage.transcripts(batch), return_logits=True)
        for heard in (
            AudioLLM.from_pretrained(load_artifact(trained.inputs[name].path).path).eval()
            for name in ("teacher", "acllm")
        )
    ]
    teacher, student = ((one.logits_NV.detach().double() / 2).log_softmax(-1) for one in out)
    kl = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum")
    assert parts["kl"] == pytest.approx(4 * float(kl), rel=1e-4)
    teacher, student = (one.speech.encoder_BTD.detach().double() for one in out)
    tokens = [len(ids) + 1 for ids in stage.transcripts(batch)]
    error = sum(
        n * float((student[b, :T] - teacher[b, :T]).square().sum() / teacher[b, :T].square().sum())
        for b, (n, T) in enumerate(zip(tokens, out[0].speech.encoder_lengths_B.tolist()))
    )
    assert parts["encoder_error"] == pytest.approx(error, rel=1e-4)


def test_by_chunks_the_divergence_and_its_gradients_are_those_of_all_logits(monkeypatch):
    """Of a recogniser with random weights and its packed form: one hears three tokens' logits at a time."""
    teacher, student = make_recogniser("llama"), make_recogniser("llama")
    pack_all(student)
    tune(student)
    stage = QuantFinetune()
    stage.cfg = SimpleNamespace(kl_weight=0.5, encoder_weight=0.0, temperature=2.0)
    draws = torch.Generator().manual_seed(0)
    heard = 0.1 * torch.randn(2, 16000, generator=draws), torch.tensor([16000, 11000]), [[5, 9, 7, 6, 5], [8, 2]]
    leaves = [p for name, p in student.named_parameters() if name.startswith("llm.model.layers") and p.requires_grad]

    def distances(**asked) -> list[torch.Tensor]:
        with torch.no_grad():
            taught = teacher(*heard, **asked)
        kl = stage._distances(taught, student(*heard, **asked))["kl"]
        return [kl.detach(), *torch.autograd.grad(kl, leaves, allow_unused=True)]

    wanted = distances(return_logits=True)
    calls = []
    chunked = partial(head_kl, impl="chunked", chunk_logits=3 * 60)
    monkeypatch.setattr(distillation, "head_kl", lambda *given, **how: calls.append(given) or chunked(*given, **how))
    found = distances(return_product=True)
    assert len(calls) == 1 and float(wanted[0]) > 0.01
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kl_weight", "encoder_weight"), [(0.5, 0.0), (0.0, 2.0), (0.5, 2.0)])
def test_a_distance_without_weight_is_measured_and_sends_no_gradient(trainer, kl_weight, encoder_weight):
    trained = trainer(f"kl_weight={kl_weight}", f"encoder_weight={encoder_weight}")
    stage, batch = trained.stage, batches(trained)[0]
    prompts = stage.prompts(batch)
    out = stage.hear(trained.engine.model, batch, prompts, return_product=True)
    sums = stage._distances(stage._taught(batch, prompts), out)
    assert {name: one.requires_grad for name, one in sums.items()} == {
        "kl": kl_weight > 0,
        "encoder_error": encoder_weight > 0,
    }
    assert all(float(one.detach()) > 0 for one in sums.values())


def test_frames_of_another_encoder_have_no_error_at_all(trainer):
    trained = trainer()
    stage, batch = trained.stage, batches(trained)[0]
    taught = stage._taught(batch, stage.prompts(batch))
    narrow = taught.speech._replace(encoder_BTD=taught.speech.encoder_BTD[..., :-1])
    stage._taught = lambda *_: taught._replace(speech=narrow)
    metrics = stage.loss(trained.engine.model, batch).metrics
    assert "kl" in metrics and "encoder_error" not in metrics


def test_the_teacher_stays_out_of_the_model_its_checkpoints_and_its_gradients(trainer, tmp_path, sft_run):
    trained = trainer()
    teacher = trained.stage.teacher
    assert teacher is not None and not teacher.training
    own = {id(p) for p in trained.engine.module.parameters()}
    assert not any(id(p) in own for p in teacher.parameters())
    trained.fit()
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    kept = tiny_runs.weights(sft_run)
    state = teacher.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())


def test_it_recovers_what_rounding_has_cost(trainer, shards, packed, sft_run):
    """Held out are the same sentences in other noise, which is what the teacher knows by heart."""
    trained = trainer(
        f"data.valid.dev={shards}",
        "train.max_steps=60",
        "train.micro_batch_seconds=12",
        "train.global_batch_seconds=12",
        "train.eval_first=true",
        "train.eval_every=20",
        "train.keep_best=valid/dev/kl",
        "train.save_every=0",
    )
    trained.fit()
    artifact = trained.export()
    lines = tiny_runs.read_lines(trained.run_dir / "metrics.jsonl")
    first = next(line for line in lines if "valid/dev/kl" in line)
    for name in ("loss", "kl"):
        assert artifact.metrics[f"valid/dev/{name}"] < 0.5 * first[f"valid/dev/{name}"], name
    texts = [text for _, text in zip(range(12), dict.fromkeys(tiny_runs.sentences(12, seed=1)))]
    waves = [tiny_runs.speak(text, seed=500 + i) for i, text in enumerate(texts)]
    right = {
        folder: sum(heard.text == text for heard, text in zip(load(folder).transcribe(waves), texts))
        for folder in (packed, artifact.path)
    }
    assert right[artifact.path] > right[packed], right


def test_the_encoder_learns_its_frames_from_the_teacher(trainer):
    trained = trainer("kl_weight=0", "encoder_weight=10", "ctc_weight=0", "train.max_steps=30", "train.save_every=0")
    trained.fit()
    curve = tiny_runs.curve(trained.run_dir, "train/encoder_error")
    assert sum(curve[-4:]) < 0.7 * sum(curve[:4]), curve


def test_contexts_stand_in_the_prompts_of_both(trainer, shards, tmp_path):
    from seedling.data.contexts.sidecar import UtteranceContext

    def lists(text: str) -> list[UtteranceContext]:
        words = tuple(dict.fromkeys(text.split()))
        return [UtteranceContext("relevant", ", ".join(words), words)]

    sidecar = tiny_runs.make_contexts(tmp_path / "contexts", shards, lists)
    trained = trainer(f"contexts=[{sidecar}]", "context.share=1", "context.max_tokens=40")
    stage, batch = trained.stage, batches(trained)[0]
    metrics = stage.loss(trained.engine.model, batch).metrics
    assert float(metrics["triple_frac"][0]) == len(batch)
    stage.teacher = trained.engine.model  # who teaches itself has nothing to learn, contexts or not
    assert float(stage.loss(trained.engine.model, batch).metrics["kl"][0]) == pytest.approx(0, abs=1e-4)
    trained.fit()
    assert load(trained.export().path).processor.prompts.context_tokens == 40


def test_without_a_teacher_it_is_cross_entropy_alone(trainer):
    trained = trainer("kl_weight=0", teacher=False)
    metrics = trained.stage.loss(trained.engine.model, batches(trained)[0]).metrics
    assert "kl" not in metrics and trained.stage.teacher is None
    trained.fit()


# ---- precision


def test_in_autocast_scales_keep_changes_that_bfloat16_would_round_away(trainer):
    trained = trainer("train.precision=autocast", "train.lr={scales: 1e-4, norms: 1e-4, biases: 1e-4}")
    trained.fit()
    scales = [p for name, p in trained.engine.model.named_parameters() if trained.stage.trainable(name) == "scales"]
    assert all(p.dtype == torch.float32 for p in scales)
    ratios = [p for p in scales if (p.detach() - 1).abs().max() < 0.1]
    assert any(0 < float((p.detach() - 1).abs().max()) < 2**-9 for p in ratios)
    lines = [line for line in tiny_runs.read_lines(trained.run_dir / "metrics.jsonl") if "train/loss" in line]
    assert all(math.isfinite(line["train/loss"]) for line in lines)


# ---- looking before leaping


def test_check_builds_and_reads_everything_and_trains_nothing(given, tmp_path, capsys):
    config = tiny_runs.write_yaml(tmp_path / "c.yaml", tiny_runs.QUANT_FINETUNE)
    arguments = [f"run_dir={tmp_path}/run", *given]
    assert main(["check", "quant_finetune", "--config", str(config), *arguments, "ctc_weight=0"]) == 0
    out = capsys.readouterr().out
    assert "scales" in out and "48 utterances" in out
    assert "shapes: all fit, from the dearest micro-batch to the loss" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["inputs.acllm=SFT"], "holds no packed weights: run stage quantize on it first; the control"),
        (["NO_TEACHER"], "kl_weight is 0.5 and encoder_weight 0.0, and there is no teacher; set inputs.teacher"),
        (["kl_weight=0"], "so inputs.teacher has no effect"),
        (["inputs.teacher=PACKED"], "is packed itself"),
        (["inputs.teacher=OTHER"], "has prompts"),
        (["encoder_training=frozen"], "encoder_training is 'frozen'"),
        (["llm_training=full"], "llm_training is 'full'"),
        (["train.optimizer=muon"], "train.optimizer is muon"),
        (["train.weight_decay=0.1"], "would pull every scale towards 0"),
        (["train.precision=bf16"], "train.precision is bf16, in which a scale moves by 0.4 % or not at all"),
        (["temperature=0"], "temperature is 0"),
        (["kl_weight=-1"], "kl_weight is -1"),
        (
            ["kl_weight=0", "encoder_weight=1", "temperature=2"],
            "temperature is 2.0 and kl_weight 0, so it has no effect",
        ),
        (["also_train=[decoder.*]"], "also_train has 'decoder.*', which no parameter is called; parts are encoder.*"),
        (["also_train=[converter.*]"], "set train.lr.converter"),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_exit_2(given, sft_run, packed, tmp_path, capsys, more, said):
    other = tmp_path / "other"
    if "OTHER" in more[0]:
        manifest = json.loads((sft_run / "artifact" / "manifest.json").read_text())
        other.mkdir()  # the same files, under facts of its own
        for file in (sft_run / "artifact").iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        manifest["facts"]["prompts"] = "0123456789abcdef"
        (other / "manifest.json").write_text(json.dumps(manifest))
    places = {"SFT": sft_run / "artifact", "PACKED": packed, "OTHER": other}
    for name, place in places.items():
        more = [text.replace(name, str(place)) for text in more]
    config = tiny_runs.write_yaml(tmp_path / "c.yaml", tiny_runs.QUANT_FINETUNE)
    if "NO_TEACHER" in more:
        given, more = [text for text in given if not text.startswith("inputs.teacher")], []
    assert main(["run", "quant_finetune", "--config", str(config), f"run_dir={tmp_path}/run", *given, *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0], errors


def test_stages_that_train_weights_refuse_a_packed_recogniser(given, shards, packed, tmp_path, capsys):
    config = tiny_runs.write_yaml(tmp_path / "c.yaml", tiny_runs.SFT)
    arguments = [f"data.train=[{shards}]", f"inputs.acllm={packed}", f"run_dir={tmp_path}/run"]
    assert main(["run", "sft", "--config", str(config), *arguments]) == 2
    assert "is packed" in capsys.readouterr().err
