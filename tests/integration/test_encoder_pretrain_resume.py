"""encoder_pretrain in real processes: killed, or shared by two ranks, it ends as the run that nothing happened to.

Everything that draws random numbers is on: dropout, masks, noise in the masks, speed perturbation.
"""

import random

import pytest
import tiny_runs

STEPS = 14


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """14 steps of two micro-batches on 32 utterances: several epochs and a piece; checkpoints at 4, 8 and 12."""
    shards = tiny_runs.make_shards(tmp_path_factory.mktemp("toy") / "corpus", tiny_runs.sentences(32, seed=1))
    data = [f"data.train=[{shards}]", f"data.valid.dev={shards}"]
    return [*data, "data.augment.speed_probability=0.5", f"train.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, overrides):
    """The run that nothing happened to, in the test's own process."""
    run_dir = tmp_path_factory.mktemp("untouched") / "run"
    return tiny_runs.train("encoder_pretrain", run_dir, tiny_runs.PRETRAIN, *overrides)


def arguments(run_dir, overrides) -> list[str]:
    return tiny_runs.stage_arguments("encoder_pretrain", run_dir, tiny_runs.PRETRAIN, *overrides)


def test_a_run_killed_at_a_random_step_and_started_again_ends_bit_identical(tmp_path, overrides, untouched):
    step, run_dir = random.SystemRandom().randint(5, STEPS - 2), tmp_path / "run"
    tiny_runs.kill_and_go_on(run_dir, arguments(run_dir, overrides), step=step)
    tiny_runs.assert_same_run(run_dir, untouched, steps=STEPS, message=f"killed at step {step}")
    quantizers = [(d / "artifact/quantizer.safetensors").read_bytes() for d in (run_dir, untouched)]
    assert quantizers[0] == quantizers[1]


def test_two_processes_equal_one_on_the_concatenated_batch(tmp_path, overrides, untouched):
    run_dir = tmp_path / "run"
    tiny_runs.run_ranks(tmp_path, 2, *arguments(run_dir, overrides))
    two, one = tiny_runs.weights(run_dir), tiny_runs.weights(untouched)
    assert two.keys() == one.keys()
    for name in one:
        close = {"rtol": 1e-5, "atol": 1e-6, "msg": lambda text, name=name: name + text}
        tiny_runs.torch.testing.assert_close(two[name], one[name], **close)
    for name in ("train/loss", "ssl/mask_acc", "ssl/target_perplexity", "ssl/unigram_acc", "valid/dev/loss"):
        assert tiny_runs.curve(run_dir, name) == pytest.approx(tiny_runs.curve(untouched, name), rel=1e-4), name
        assert tiny_runs.curve(untouched, name), name
    # An entropy of all codes of a step, and no mean of two entropies.
    for name in ("ssl/codebook_entropy", "valid/dev/codebook_entropy", "valid/dev/target_perplexity"):
        assert tiny_runs.curve(run_dir, name) == pytest.approx(tiny_runs.curve(untouched, name), rel=1e-12), name
