"""A plan of a tiny run: what is said of it agrees with what its config, its corpus and its parts say."""

import json

import pytest
from tiny_runs import PRETRAIN, make_shards, sentences, write_yaml

from seedling.launch.cli import main
from seedling.launch.commands.plan import print_measured
from seedling.launch.plan import left_out, pace, plan_run, setting, settings
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


def test_every_zero_stage_that_the_config_allows_is_tried_on_each_number_of_ranks(tiny):
    _, run = tiny
    assert [(at.ranks, at.zero_stage) for at in settings(run, [1, 2])] == [(R, z) for R in (1, 2) for z in range(4)]
    assert [at.zero_stage for at in settings(run.with_train(precision="bf16"), [2])] == [1, 2, 3]
    assert [at.zero_stage for at in settings(run.with_train(optimizer="muon"), [2])] == [0]


def test_twice_the_ranks_have_half_the_arithmetic_of_a_step(tiny):
    _, run = tiny
    one, two = (pace(run, setting(run, zero_stage=0, ranks=R), GPUS["h100"], mfu=0.5) for R in (1, 2))
    assert two.arithmetic == pytest.approx(one.arithmetic / 2)
    assert one.efficiency == (1, 1) and two.efficiency[0] < 1


def test_fp32_is_timed_against_the_peak_of_fp32(tiny):
    _, run = tiny
    at, half = setting(run, zero_stage=0, ranks=1), run.with_train(precision="autocast")
    slow, fast = (pace(each, at, GPUS["h100"], mfu=0.5).arithmetic for each in (run, half))
    assert slow / fast == pytest.approx(989 / 67)


def test_what_the_plan_does_not_know_is_said(tiny):
    _, run = tiny
    assert left_out(run) == []
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "stage3_max_live_parameters": 10}}
    (said,) = left_out(run.with_train(deepspeed_extra=offload))
    assert "train.deepspeed_extra.zero_optimization.offload_optimizer is not in the plan" in said


def test_the_command_prints_memory_pace_and_a_verdict(tiny, capsys):
    file, _ = tiny
    assert main(["plan", "encoder_pretrain", "--config", str(file), "--ranks", "1,2", "--gpu", "a100"]) == 0
    said = capsys.readouterr().out
    assert "80 GB, 312 TFLOP/s" in said and "2 ranks, ZeRO 0: fits" in said
    assert main(["plan", "encoder_pretrain", "--config", str(file), "--ranks", "none"]) == 2
    assert main(["plan", "encoder_pretrain", "--config", str(file), "--mfu", "40"]) == 2


def test_a_measured_peak_is_that_of_the_ranks_that_the_run_had_last(tiny, tmp_path, capsys):
    _, run = tiny
    logged = [(1, 8.0), (1, 9.0), (2, 4.0), (2, 5.0), (2, 3.0)]
    lines = [{"step": n, "train/ranks": R, "train/mem_growth_gb": gb} for n, (R, gb) in enumerate(logged)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 9}]))
    print_measured(run, tmp_path)
    assert "on 2 ranks" in (said := capsys.readouterr().out) and "measured 5.00 GB" in said
