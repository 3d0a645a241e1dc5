"""A plan of a tiny run: what is said of it agrees with what its config, its corpus and its parts say."""

from dataclasses import replace

import pytest
from tiny_runs import PRETRAIN, make_shards, sentences, write_yaml

from seedling.launch.cli import main
from seedling.launch.plan import nearest_fit, pace, plan_run, setting, settings
from seedling.launch.stage_lookup import load_stage_config
from seedling.stages.runtime.gpus import GPUS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The config file of a tiny encoder_pretrain, and the plan of it."""
    folder = tmp_path_factory.mktemp("plan")
    shards = make_shards(folder / "corpus", sentences(24, seed=1))
    values = PRETRAIN | {"run_dir": str(folder / "run"), "data": {"train": [str(shards)]}}
    file = write_yaml(folder / "tiny.yaml", values)
    stage, loaded = load_stage_config("encoder_pretrain", str(file))
    return file, plan_run(stage(), loaded.config)


def test_groups_steps_and_work_are_those_of_the_config(tiny):
    _, run = tiny
    assert {row.group for row in run.groups} == {"encoder", "heads", "frozen"}
    assert run.sizes.trainable == sum(row.parameters for row in run.groups) and run.sizes.frozen == 0
    assert run.steps == PRETRAIN["train"]["max_steps"]
    assert 0 < run.typical <= 1
    assert run.step_flops == pytest.approx(run.trace.flops.model * run.train.micro_batches * run.typical)


def test_every_zero_stage_is_tried_on_each_number_of_ranks(tiny):
    _, run = tiny
    assert [(at.ranks, at.zero_stage) for at in settings(run, [1, 2])] == [(R, z) for R in (1, 2) for z in range(4)]
    bf16 = run._replace(train=replace(run.train, precision="bf16"))
    assert [at.zero_stage for at in settings(bf16, [2])] == [1, 2, 3]
    muon = run._replace(train=replace(run.train, optimizer="muon"))
    assert [at.zero_stage for at in settings(muon, [2])] == [0]


def test_twice_the_ranks_have_half_the_arithmetic_of_a_step(tiny):
    _, run = tiny
    one, two = (pace(run, setting(run, zero_stage=0, ranks=R), GPUS["h100"], mfu=0.5) for R in (1, 2))
    assert two.arithmetic == pytest.approx(one.arithmetic / 2)
    assert one.efficiency == (1, 1) and two.efficiency[0] < 1


def test_the_nearest_setting_that_fits_does_fit(tiny):
    _, run = tiny
    context = GPUS["h100"]._replace(memory=2e9)
    totals = {at.zero_stage: at.memory.total for at in settings(run, [64])}
    roomy = context._replace(memory=2e9 + 2 * max(totals.values()))
    assert nearest_fit(run, roomy, ranks=64) == ""
    tight = context._replace(memory=2e9 + 1.05 * (0.99 * totals[0]))
    smaller = [z for z, total in totals.items() if total <= tight.usable]
    assert smaller and nearest_fit(run, tight, ranks=64) == f"train.zero_stage={smaller[0]}"
    tighter = context._replace(memory=2e9 + 1.05 * 0.9 * min(totals.values()))
    assert "train.micro_batch_seconds=" in nearest_fit(run, tighter, ranks=64)
    assert nearest_fit(run, context._replace(memory=2e9 + 1), ranks=64).startswith("none")


def test_the_command_prints_memory_pace_and_a_verdict(tiny, capsys):
    file, _ = tiny
    assert main(["plan", "encoder_pretrain", "--config", str(file), "--ranks", "1,2", "--gpu", "a100"]) == 0
    said = capsys.readouterr().out
    assert "80 GB, 312 TFLOP/s" in said and "2 ranks, ZeRO 0: fits" in said
    assert main(["plan", "encoder_pretrain", "--config", str(file), "--ranks", "none"]) == 2
    assert main(["plan", "encoder_pretrain", "--config", str(file), "--mfu", "40"]) == 2
