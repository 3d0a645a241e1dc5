"""encoder_pretrain on a spoken toy language: what it learns, counts, refuses and hands on, from audio without text."""

import logging

import numpy as np
import pytest
import tiny_runs
import torch

from seedling.data.loader import STAND_IN_KEY
from seedling.data.shards import open_shard
from seedling.launch.cli import main
from seedling.launch.stage_lookup import load_stage_config
from seedling.model.random_quantizer import RandomProjectionQuantizer
from seedling.model.speech_encoder import SpeechEncoder
from seedling.stages.encoder_pretrain import EncoderPretrain
from seedling.stages.runtime.artifacts import lineage, load_artifact
from seedling.stages.runtime.trainer import Trainer
from seedling.stages.runtime.world import init_world


@pytest.fixture(scope="module")
def mute_shards(tmp_path_factory, texts):
    """The corpus without a single text."""
    folder = tmp_path_factory.mktemp("mute")
    with open_shard(folder / "shard-000000.tar", sample_rate=tiny_runs.SAMPLE_RATE) as writer:
        for i, text in enumerate(texts):
            writer.add(f"u{i:03d}", tiny_runs.speak(text, seed=i), {})
    assert main(["index", str(folder)]) == 0
    return folder


def hum(*, seed: int) -> np.ndarray:
    """Three to five vowels of 0.4 s, each one of six spectra: what is hidden of one can be told from the rest of it.

    The words of the toy language would not do: between their tones is noise, and codes of noise are anyone's guess.
    """
    draws, time_N = np.random.default_rng(seed), np.arange(round(0.4 * tiny_runs.SAMPLE_RATE)) / tiny_runs.SAMPLE_RATE
    parts = []
    for vowel in draws.integers(0, 6, size=draws.integers(3, 6)):
        gains_db = 20 * np.random.default_rng(vowel).standard_normal(40)
        harmonics = np.sin(2 * np.pi * 180 * np.arange(1, 41)[:, None] * time_N + np.arange(40)[:, None])
        parts.append(10 ** (gains_db / 20) @ harmonics)
    wave = np.concatenate(parts)
    return (0.3 * wave / np.abs(wave).max() + 1e-4 * draws.standard_normal(len(wave))).astype(np.float32)


@pytest.fixture(scope="module")
def hums(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hums")
    with open_shard(folder / "shard-000000.tar", sample_rate=tiny_runs.SAMPLE_RATE) as writer:
        for i in range(48):
            writer.add(f"u{i:03d}", hum(seed=i), {})
    assert main(["index", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, hums):
    """A run of 150 steps on audio without text."""
    data = [f"data.train=[{hums}]", f"data.valid.dev={hums}", "encoder.dropout=0"]
    steps = ["train.max_steps=150", "train.log_every=25", "train.save_every=0", "train.micro_batch_seconds=8"]
    run_dir = tmp_path_factory.mktemp("pretrain") / "run"
    return tiny_runs.train("encoder_pretrain", run_dir, tiny_runs.PRETRAIN, *data, *steps)


@pytest.fixture
def trainer(mute_shards, tmp_path):
    """make(*overrides) -> Trainer of three steps, not started"""

    def make(*more: str) -> Trainer:
        config = tiny_runs.write_yaml(tmp_path / "pretrain.yaml", tiny_runs.PRETRAIN)
        overrides = [f"run_dir={tmp_path}/run", f"data.train=[{mute_shards}]", f"data.valid.dev={mute_shards}"]
        overrides += ["train.max_steps=3", "train.save_every=3", *more]
        _, loaded = load_stage_config("encoder_pretrain", config, overrides=overrides)
        (tmp_path / "run").mkdir(exist_ok=True)
        return Trainer(EncoderPretrain(), loaded.config, run_dir=tmp_path / "run", world=init_world())

    return make


def metrics(run_dir, name) -> list[float]:
    return [line[name] for line in tiny_runs.read_lines(run_dir / "metrics.jsonl") if name in line]


# ---- what it learns and says


def test_it_learns_more_than_to_guess_the_most_frequent_code(pretrained):
    found = load_artifact(pretrained / "artifact").metrics
    assert found["valid/dev/mask_acc"] > found["valid/dev/unigram_acc"] + 0.1, found
    assert found["valid/dev/loss"] < found["valid/dev/codebook_entropy"], found
    losses = metrics(pretrained, "train/loss")
    assert losses[-1] < 0.8 * losses[0], losses


def test_the_log_says_how_the_codes_are_used(pretrained):
    (line, *_) = tiny_runs.read_lines(pretrained / "metrics.jsonl")
    assert 1 < line["ssl/target_perplexity"] <= 24
    assert np.exp(line["ssl/codebook_entropy"]) <= line["ssl/target_perplexity"] + 1e-9  # a mean over codebooks
    assert line["ssl/code_usage"] == pytest.approx((line["ssl/code_usage/0"] + line["ssl/code_usage/1"]) / 2)
    assert 0 < line["ssl/unigram_acc"] < 1 and 0 <= line["ssl/mask_acc"] <= 1
    assert "train/ssl/mask_acc" not in line


def test_the_quantizer_and_the_features_are_bit_identical_after_training_and_saved_with_their_hash(trainer):
    trained = trainer()
    model = trained.engine.model
    before = (model.quantizer.fingerprint(), model.fbank.fingerprint())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trained.fit()
    changed = tiny_runs.differing(weights, model.state_dict())
    assert {name.split(".")[0] for name in changed} == {"encoder", "heads"}
    artifact = trained.export()
    saved = RandomProjectionQuantizer.load(artifact.path / "quantizer.safetensors")
    assert (saved.fingerprint(), artifact.facts["feature_fingerprint"]) == before
    assert artifact.facts["targets"] == before[0] and artifact.facts["num_codes"] == 24


def test_the_artifact_is_the_encoder_with_its_features_and_without_heads(pretrained):
    artifact = load_artifact(pretrained / "artifact", kind="speech_encoder")
    encoder = SpeechEncoder.from_pretrained(artifact.path)
    assert encoder.fbank.fingerprint() == artifact.facts["feature_fingerprint"]
    assert artifact.facts["encoder_frames_per_second"] == 25
    assert {name.split(".")[0] for name in tiny_runs.weights(pretrained)} == {"encoder", "fbank"}


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bfloat16_and_zero_keep_the_codes(trainer, zero_stage):
    trained = trainer("train.precision=bf16", f"train.zero_stage={zero_stage}")
    fingerprint = trained.stage.targets
    trained.fit()
    assert trained.engine.model.quantizer.fingerprint() == fingerprint
    assert SpeechEncoder.from_pretrained(trained.export().path).fbank.fingerprint()
    assert all(np.isfinite(metrics(trained.run_dir, "train/loss")))


# ---- what is masked and counted


def test_the_normaliser_counts_exactly_the_masked_label_frames(trainer):
    trained = trainer()
    stage, model = trained.stage, trained.engine.model
    (step, *_) = trained.data.plan.steps(epochs=1)
    for micro_batch in step.micro_batches:
        batch = trained.data.dataset[micro_batch]
        out = stage.loss(model, batch)
        assert stage.count(batch) == int(batch.mask_BL.sum()) == int(out.metrics["ssl/codes"].counts.sum()) // 2
        assert out.metrics["ssl/mask_acc"][1] == 2 * stage.count(batch)


def test_masks_are_the_same_for_a_micro_batch_whenever_it_is_read_and_differ_between_epochs(trainer):
    data = trainer().data
    steps = list(data.plan.steps(epochs=2))
    micro_batch = steps[0].micro_batches[0]
    first, again = data.dataset[micro_batch], data.dataset[micro_batch]
    assert torch.equal(first.mask_BL, again.mask_BL)
    later = data.dataset[micro_batch._replace(index=micro_batch.index + 1000)]
    assert later.mask_BL.shape == first.mask_BL.shape and not torch.equal(later.mask_BL, first.mask_BL)


def test_validation_says_the_same_each_time_and_leaves_the_random_numbers_alone(trainer):
    trained = trainer()
    data = trained.valid["dev"]
    batches = [data.dataset[m] for step in data.plan.steps(epochs=1) for m in step.micro_batches]
    model = trained.engine.model.eval()
    state = torch.get_rng_state()
    first = trained.stage.evaluate(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = trained.stage.evaluate(model, batches)
    assert float(first["loss"][0]) == float(again["loss"][0]) and first["loss"][1] == again["loss"][1] > 0
    assert torch.equal(first["codes"].counts, again["codes"].counts)


def test_audio_that_cannot_be_read_counts_for_nothing_in_validation(trainer):
    trained = trainer()
    data = trained.valid["dev"]
    (step, *_) = data.plan.steps(epochs=1)
    batch = data.dataset[step.micro_batches[0]._replace(utterances=())]
    assert batch.keys == [STAND_IN_KEY]
    sums = trained.stage.evaluate(trained.engine.model.eval(), [batch])
    assert sums["loss"] == (0.0, 0) and sums["codes"].counts.sum() == 0


def test_codes_that_collapse_are_said_once_with_the_remedy(trainer, caplog):
    stage = trainer("quantizer.codebook_size=2000").stage
    counts_NV = torch.zeros(2, 2000, dtype=torch.int64)
    counts_NV[0], counts_NV[1, 3] = 10, 20000
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            values = stage._describe(counts_NV, prefix="ssl/")
    (warning,) = [record.getMessage() for record in caplog.records if "collapse" in record.getMessage()]
    assert "codebook 1" in warning and "1 of its 2000 codes" in warning and "quantizer.codebook_size" in warning
    assert values["ssl/unigram_acc"] == pytest.approx((1 / 2000 + 1) / 2)


# ---- going on


def test_a_run_goes_on_from_an_encoder_with_its_features(pretrained, mute_shards, tmp_path):
    go_on = [f"data.train=[{mute_shards}]", f"inputs.encoder={pretrained}/artifact", "train.max_steps=2"]
    still = ["train.lr.encoder=0", "train.lr.heads=0"]
    again = tiny_runs.train("encoder_pretrain", tmp_path / "again", tiny_runs.PRETRAIN, *go_on, *still)
    assert not tiny_runs.differing(tiny_runs.weights(pretrained), tiny_runs.weights(again))
    assert [a.stage for a in lineage(again / "artifact")] == ["encoder_pretrain", "encoder_pretrain"]


def test_other_codes_do_not_resume_an_older_run(trainer):
    first = trainer("train.max_steps=3")
    first.fit()
    with pytest.raises(ValueError, match="labels"):
        trainer("train.max_steps=5", "quantizer.seed=9").resume()


def test_sft_starts_from_the_pretrained_encoder_with_its_features(pretrained, shards, llm_folder, tmp_path):
    data = [f"data.train=[{shards}]", f"inputs.llm={llm_folder}", f"inputs.encoder={pretrained}/artifact"]
    still = [f"train.lr.{part}=0" for part in ("encoder", "converter", "ctc_head")]
    run = tiny_runs.train("sft", tmp_path / "sft", tiny_runs.SFT, *data, *still, "train.max_steps=1")
    theirs, ours = tiny_runs.weights(pretrained), tiny_runs.weights(run)
    assert not [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    before, after = (load_artifact(d / "artifact") for d in (pretrained, run))
    assert after.facts["feature_fingerprint"] == before.facts["feature_fingerprint"]
    assert [(a.name, a.kind) for a in lineage(after.path)][1:] == [("llm", "llm"), ("encoder", "speech_encoder")]


# ---- labels of an earlier iteration


@pytest.fixture(scope="module")
def labeler(tmp_path_factory, pretrained, hums):
    """The artifact of cluster_labels: 12 clusters, with a sidecar for the corpus."""
    values = {"clusters": 12, "layer": 1, "sample_frames": 2000, "sample_share": 1.0}
    given = [f"inputs.encoder={pretrained}/artifact", f"data.train=[{hums}]"]
    run_dir = tmp_path_factory.mktemp("labels") / "run"
    return tiny_runs.train("cluster_labels", run_dir, values, *given) / "artifact"


@pytest.fixture(scope="module")
def second(hums, labeler) -> list[str]:
    """What turns PRETRAIN into a second iteration of three steps."""
    data = [f"data.train=[{hums}]", f"data.valid.dev={hums}"]
    return [*data, f"inputs.labeler={labeler}", "train.max_steps=3", "train.save_every=3"]


def test_a_second_iteration_learns_the_clusters_of_the_first(second, tmp_path):
    longer = ["train.max_steps=100", "train.micro_batch_seconds=8", "encoder.dropout=0", "train.log_every=50"]
    run = tiny_runs.train("encoder_pretrain", tmp_path / "run", tiny_runs.PRETRAIN, *second, *longer)
    artifact = load_artifact(run / "artifact")
    found = artifact.metrics
    assert found["valid/dev/mask_acc"] > found["valid/dev/unigram_acc"] + 0.1, found
    assert artifact.facts["num_codes"] == 12 and not (artifact.path / "quantizer.safetensors").exists()
    chain = [(a.name, a.stage) for a in lineage(artifact.path)]
    assert chain[1:] == [("labeler", "cluster_labels"), ("encoder", "encoder_pretrain")]


def test_labels_from_the_sidecar_and_on_the_fly_give_the_same_run_to_the_bit(second, tmp_path):
    runs = [
        tiny_runs.train("encoder_pretrain", tmp_path / labels, tiny_runs.PRETRAIN, *second, f"labels={labels}")
        for labels in ("sidecar", "on_the_fly")
    ]
    assert not tiny_runs.differing(*map(tiny_runs.weights, runs))
    for name in ("train/loss", "ssl/mask_acc", "ssl/target_perplexity", "valid/dev/loss"):
        assert metrics(runs[0], name) == metrics(runs[1], name), name


def test_on_the_fly_labels_are_float32_whatever_the_run_is_trained_in(second, tmp_path):
    entropies = []
    for precision in ("fp32", "bf16"):
        given = [*second, "labels=on_the_fly", f"train.precision={precision}", "train.max_steps=1"]
        run = tiny_runs.train("encoder_pretrain", tmp_path / precision, tiny_runs.PRETRAIN, *given)
        entropies.append(metrics(run, "valid/dev/codebook_entropy"))
    assert entropies[0] == entropies[1]


def test_noise_is_added_to_what_is_heard_and_not_to_what_is_predicted(second, hums, mute_shards, tmp_path):
    noise = [
        "data.augment.noise_probability=1",
        f"data.augment.noise_data=[{mute_shards}]",
        "data.augment.snr_db_max=5",
    ]
    runs = [
        tiny_runs.train("encoder_pretrain", tmp_path / str(len(more)), tiny_runs.PRETRAIN, *second, *more)
        for more in ([], noise)
    ]
    assert metrics(runs[0], "ssl/codebook_entropy") == metrics(runs[1], "ssl/codebook_entropy")
    assert metrics(runs[0], "train/loss") != metrics(runs[1], "train/loss")


def test_audio_that_cannot_be_read_has_no_label_and_no_loss(second, tmp_path):
    config = tiny_runs.write_yaml(tmp_path / "pretrain.yaml", tiny_runs.PRETRAIN)
    _, loaded = load_stage_config("encoder_pretrain", config, overrides=[f"run_dir={tmp_path}/run", *second])
    (tmp_path / "run").mkdir()
    trained = Trainer(EncoderPretrain(), loaded.config, run_dir=tmp_path / "run", world=init_world())
    (step, *_) = trained.data.plan.steps(epochs=1)
    batch = trained.data.dataset[step.micro_batches[0]._replace(utterances=())]
    assert batch.keys == [STAND_IN_KEY] and trained.stage.count(batch) == 0
    assert trained.stage.loss(trained.engine.model, batch).loss_sum.item() == 0


def test_labels_of_another_frame_rate_stop_the_run(second, tmp_path, capsys):
    config = tiny_runs.write_yaml(tmp_path / "stage.yaml", tiny_runs.PRETRAIN)
    other = [*second, "features.frame_shift_ms=12.5"]
    assert main(["run", "encoder_pretrain", "--config", str(config), f"run_dir={tmp_path}/run", *other]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and "made with other features" in errors[0]


def test_labels_of_other_audio_stop_the_run(second, mute_shards, tmp_path, capsys):
    config = tiny_runs.write_yaml(tmp_path / "stage.yaml", tiny_runs.PRETRAIN)
    other = [*second, f"data.train=[{mute_shards}]"]
    assert main(["run", "encoder_pretrain", "--config", str(config), f"run_dir={tmp_path}/run", *other]) == 2
    assert "cluster_labels" in capsys.readouterr().err


# ---- what does not fit together


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        ("encoder_pretrain", ["data.augment.noise_probability=0.5", "data.augment.noise_data=[SHARDS]"], "clean"),
        ("encoder_pretrain", ["labels=beside"], "sidecar, on_the_fly"),
        ("encoder_pretrain", ["labels=on_the_fly"], "no inputs.labeler"),
        ("encoder_pretrain", ["mask.span_frames=30"], "multiple of 4"),
        ("encoder_pretrain", ["encoder.num_mel_bins=40"], "features.num_mel_bins (80)"),
        ("encoder_pretrain", ["inputs.encoder=ENCODER", "encoder.num_layers=3"], "encoder.num_layers is 3"),
        ("encoder_pretrain", ["inputs.encoder=SHARDS"], "manifest.json"),
        ("encoder_pretrain", ["inputs.labeler=ENCODER"], "expects 'frame_labeler'"),
        ("encoder_pretrain", ["data.train=[]"], "data.train is empty"),
        ("encoder_pretrain", ["inputs.labeler=LABELER", "data.augment.speed_probability=0.5"], "on_the_fly"),
        (
            "encoder_pretrain",
            [
                "inputs.labeler=LABELER",
                "labels=on_the_fly",
                "data.augment.noise_probability=1",
                "data.augment.noise_data=[SHARDS]",
            ],
            "labels=sidecar",
        ),
        ("sft", ["inputs.llm=LLM", "inputs.encoder=ENCODER", "encoder.dim=64"], "encoder.dim is 64 and the encoder"),
        ("sft", ["inputs.llm=LLM", "inputs.encoder=ENCODER", "features.sample_rate=8000"], "leave it out"),
        ("sft", ["inputs.encoder=ENCODER"], "sft needs an LLM"),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_exit_2(
    pretrained, labeler, shards, llm_folder, tmp_path, capsys, stage, given, said
):
    values = tiny_runs.PRETRAIN if stage == "encoder_pretrain" else tiny_runs.SFT
    folders = {"ENCODER": pretrained / "artifact", "LABELER": labeler, "SHARDS": shards, "LLM": llm_folder}
    for name, folder in folders.items():
        given = [text.replace(name, str(folder)) for text in given]
    config = tiny_runs.write_yaml(tmp_path / "stage.yaml", values)
    data = [f"data.train=[{shards}]", "train.max_steps=1"]
    assert main(["run", stage, "--config", str(config), f"run_dir={tmp_path}/run", *data, *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0], errors
    assert not (tmp_path / "run" / "artifact").exists()


@pytest.mark.parametrize("more", [[], ["inputs.labeler=LABELER"], ["inputs.labeler=LABELER", "labels=on_the_fly"]])
def test_check_builds_without_weights_and_shows_the_parts(hums, labeler, tmp_path, capsys, more):
    config = tiny_runs.write_yaml(tmp_path / "pretrain.yaml", tiny_runs.PRETRAIN)
    arguments = [f"run_dir={tmp_path}/run", f"data.train=[{hums}]"]
    arguments += [text.replace("LABELER", str(labeler)) for text in more]
    assert main(["check", "encoder_pretrain", "--config", str(config), *arguments]) == 0
    out = capsys.readouterr().out
    assert "48 utterances" in out and {"encoder", "heads"} <= {line.split()[0] for line in out.splitlines() if line}


def test_check_of_going_on_from_an_encoder_needs_no_weights(pretrained, hums, tmp_path, capsys):
    config = tiny_runs.write_yaml(tmp_path / "pretrain.yaml", tiny_runs.PRETRAIN)
    arguments = [f"run_dir={tmp_path}/run", f"data.train=[{hums}]", f"inputs.encoder={pretrained}/artifact"]
    assert main(["check", "encoder_pretrain", "--config", str(config), *arguments]) == 0
    assert "48 utterances" in capsys.readouterr().out
