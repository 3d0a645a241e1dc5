"""The scaling study: sizes become steps of a pipeline, and finished ones a line with intervals; no line from two."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file

from seedling.launch.cli import main
from seedling.launch.scaling import load_ladder, measure, print_study, short_count, write_study
from seedling.stages.runtime.artifacts import ArtifactWriter
from seedling.stages.runtime.config import ConfigError

STUDY = """
name: toy
run_dir: runs/toy
pretrain: {config: small.yaml, set: {train.max_steps: 5}}
probe: {set: {data.train: [corpus], data.valid: {dev: corpus}, train.lr: {ctc_head: 0.01}}}
sizes:
  - {name: a, set: {encoder.dim: 32}}
  - {name: b, set: {encoder.dim: 64}}
  - {name: c, set: {encoder: {dim: 128}, train.lr.encoder: 0.002}}
"""
SMALL = "stage: encoder_pretrain\ndata: {train: [corpus], valid: {dev: corpus}}\n"
PARAMETERS = {"a": 1000, "b": 4100, "c": 17000}
LOSSES = {"a": 5.1, "b": 4.7, "c": 4.4}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A working folder with the study of STUDY."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(STUDY)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def finish(pipeline, *, steps=None, data=None) -> None:
    """Write the artifacts that the stages would."""
    for step in pipeline.steps:
        kind, _, size = step.name.partition("_")
        pretrain = kind == "pretrain"
        writer = ArtifactWriter(step.output, kind="speech_encoder" if pretrain else "layer_probe", stage=step.kind)
        writer.start()
        if pretrain:
            tensors = {"encoder.a": torch.zeros(PARAMETERS[size] - 10), "encoder.b": torch.zeros(10)}
            save_file({**tensors, "fbank.mean_F": torch.zeros(80)}, writer.path / "model.safetensors")
            writer.metrics = {"valid/dev/loss": LOSSES[size]}
            writer.facts = {"steps": (steps or {}).get(size, 5), "data_fingerprint": (data or {}).get(size, "abc" * 20)}
        else:
            writer.metrics = {"wer": LOSSES[size] / 6, "cer": LOSSES[size] / 9, "loss": LOSSES[size] / 2}
        writer.finish()


def test_every_size_is_a_step_with_its_own_settings_and_its_probe_follows_it(study):
    _, pipeline = load_ladder("toy.yaml", overrides=["pretrain_b.train.max_steps=7", "run_dir=elsewhere"])
    assert [step.name for step in pipeline.steps] == [
        f"{kind}_{size}" for size in "abc" for kind in ("pretrain", "probe")
    ]
    configs = {step.name: step.reads["config"] for step in pipeline.steps}
    assert [configs[f"pretrain_{size}"]["encoder"]["dim"] for size in "abc"] == [32, 64, 128]
    assert [configs[f"pretrain_{size}"]["train"]["max_steps"] for size in "abc"] == [5, 7, 5]
    assert configs["probe_c"]["inputs"] == {"encoder": "elsewhere/pretrain_c/artifact"}
    assert pipeline.said == "scaling toy.yaml pretrain_b.train.max_steps=7 run_dir=elsewhere"


def test_the_report_holds_the_points_the_lines_and_their_intervals_as_scipy_has_them(study, capsys):
    cfg, pipeline = load_ladder("toy")
    finish(pipeline)
    print_study(write_study(cfg, pipeline), pipeline.run_dir)
    report = json.loads((study / "runs/toy/scaling.json").read_text())
    assert [(p["size"], p["parameters"]) for p in report["points"]] == list(PARAMETERS.items())
    xs = np.log2(list(PARAMETERS.values()))
    for name, scale in (("loss", 1), ("wer", 6), ("cer", 9), ("probe_loss", 2)):
        theirs = scipy.stats.linregress(xs, np.array(list(LOSSES.values())) / scale)
        fit, t = report["fits"][name], scipy.stats.t.ppf(0.975, 1)
        assert (fit["slope"], fit["intercept"]) == pytest.approx((theirs.slope, theirs.intercept))
        assert fit["slope_interval"] == pytest.approx(
            [theirs.slope - t * theirs.stderr, theirs.slope + t * theirs.stderr]
        )
        assert fit["points"] == 3 and fit["confidence"] == 0.95
        figure = (study / f"runs/toy/scaling_{name}.svg").read_text()
        assert ElementTree.fromstring(figure).tag.endswith("svg")
        assert ("Seed-ASR: -0.16 log2(N) + 6.31" in figure) == (name == "loss")
    assert report["paper"]["loss"] == {"slope": -0.16, "intercept": 6.31}
    out = capsys.readouterr().out
    assert "loss = " in out and "* log2(N) + " in out and "3 sizes" in out


@pytest.mark.parametrize("other", [{"steps": {"b": 6}}, {"data": {"c": "other data" * 5}}])
def test_sizes_that_were_not_trained_alike_make_no_line(study, other):
    cfg, pipeline = load_ladder("toy")
    finish(pipeline, **other)
    with pytest.raises(
        ValueError, match=r"sizes a and [bc] were not trained alike: 5 steps on data abc.*give all sizes"
    ):
        measure(cfg, pipeline)


def test_without_a_probe_only_the_loss_is_fitted(study):
    (study / "toy.yaml").write_text("\n".join(line for line in STUDY.splitlines() if not line.startswith("probe")))
    cfg, pipeline = load_ladder("toy")
    assert [step.name for step in pipeline.steps] == ["pretrain_a", "pretrain_b", "pretrain_c"]
    finish(pipeline)
    assert list(write_study(cfg, pipeline)) == ["loss"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  - {name: b, set: {encoder.dim: 64}}\n", "", "sizes has 2; a line with an interval needs at least 3 sizes"),
        ("encoder.dim: 32", "train.max_steps: 9", "size a sets train.max_steps; a size may set encoder, train.lr"),
        ("encoder.dim: 32", "encoder.dmi: 32", "step pretrain_a: override encoder.dmi=32: unknown key"),
        ("encoder.dim: 32", "encoder: {dim: 64, num_heads: 4}", "its sizes have 2 different numbers of parameters"),
        ("name: b", "name: a", "pretrain_a appears twice"),
        ("train.max_steps: 5", "data.valid: {test: corpus}", "valid = dev: pretrain has test, dev in data.valid"),
        ("pretrain:", "pretrian:", "nearest valid key: pretrain"),
        ("config: small.yaml", "config: smal.yaml", "smal.yaml: no such file"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(study, capsys, old, new, said):
    assert old in STUDY
    (study / "toy.yaml").write_text(STUDY.replace(old, new))
    if said.startswith("valid = dev"):
        (study / "small.yaml").write_text("stage: encoder_pretrain\ndata: {train: [corpus]}\n")
        said = said.replace("test, dev", "test")
    assert main(["scaling", "toy.yaml"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (study / "runs").exists()


def test_the_packaged_study_has_four_sizes_of_growing_encoders():
    cfg, pipeline = load_ladder("demo")
    assert len(cfg.sizes) == 4
    dims = [step.reads["config"]["encoder"]["dim"] for step in pipeline.steps if step.kind == "encoder_pretrain"]
    assert dims == sorted(set(dims))
    with pytest.raises((ConfigError, FileNotFoundError)):
        load_ladder("dmeo")


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (46_032, "46k"), (310_400, "310k"), (75_000_000, "75M"), (1_810_000_000, "1.81B")],
)
def test_counts_are_short(number, text):
    assert short_count(number) == text
