"""quant_finetune in real processes: killed, or shared by two ranks, it ends as the run that nothing happened to."""

import random

import pytest
import tiny_runs
import torch
from tiny_packed import make_packed

STEPS = 10


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """10 steps of two micro-batches on 32 utterances: more than an epoch; checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("toy")
    shards = tiny_runs.make_shards(folder / "corpus", tiny_runs.sentences(32, seed=1))
    data = [f"data.train=[{shards}]", "data.augment.speed_probability=0.5"]
    llm = f"inputs.llm={tiny_runs.make_llm(folder / 'llm')}"
    start = tiny_runs.train("sft", folder / "sft", tiny_runs.SFT, *data, llm, "train.max_steps=2") / "artifact"
    packed = make_packed(folder / "packed", start, bits=2, group_size=32)
    return [*data, f"inputs.acllm={packed}", f"inputs.teacher={start}", f"train.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, overrides):
    """The run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("untouched") / "run"
    return tiny_runs.train("quant_finetune", run_dir, tiny_runs.QUANT_FINETUNE, *overrides)


def arguments(run_dir, overrides) -> list[str]:
    return tiny_runs.stage_arguments("quant_finetune", run_dir, tiny_runs.QUANT_FINETUNE, *overrides)


def test_a_run_killed_at_a_random_step_and_started_again_packs_the_same_bytes(tmp_path, overrides, untouched):
    step, run_dir = random.SystemRandom().randint(5, STEPS - 2), tmp_path / "run"
    tiny_runs.kill_and_go_on(run_dir, arguments(run_dir, overrides), step=step)
    tiny_runs.assert_same_run(run_dir, untouched, steps=STEPS, message=f"killed at step {step}")
    one, two = ((folder / "artifact" / "model.safetensors").read_bytes() for folder in (run_dir, untouched))
    assert one == two, f"killed at step {step}"


def test_two_processes_equal_one(tmp_path, overrides, untouched):
    run_dir = tmp_path / "run"
    tiny_runs.run_ranks(tmp_path, 2, *arguments(run_dir, overrides))
    for name in ("train/kl", "train/nll", "train/grad_norm"):
        one, two = (tiny_runs.curve(folder, name) for folder in (untouched, run_dir))
        assert len(one) == STEPS and two == pytest.approx(one, rel=1e-3), name
    two, one = tiny_runs.weights(run_dir), tiny_runs.weights(untouched)
    for name in one:
        if one[name].is_floating_point():  # scales may be rounded to the other of two neighbours
            torch.testing.assert_close(two[name], one[name], rtol=2**-7, atol=1e-4, msg=lambda t, name=name: name + t)
        else:
            assert torch.equal(two[name], one[name]), name
