"""sft in real processes: killed, asked to stop, or shared by two ranks, it ends as the run that nothing happened to.

Everything that draws random numbers is on: dropout, masks, speed perturbation. The run that nothing happens to is made
in the test's own process; the others are processes of their own.
"""

import random
import signal

import pytest
import tiny_runs
import torch

STEPS = 14


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """14 steps of two micro-batches on 32 utterances: several epochs and a piece; checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("toy")
    shards = tiny_runs.make_shards(folder / "corpus", tiny_runs.sentences(32, seed=1))
    data = [f"data.train=[{shards}]", f"inputs.llm={tiny_runs.make_llm(folder / 'llm')}"]
    return [*data, "data.augment.speed_probability=0.5", f"train.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, overrides):
    """The run that nothing happened to."""
    return tiny_runs.train("sft", tmp_path_factory.mktemp("untouched") / "run", tiny_runs.SFT, *overrides)


def arguments(run_dir, overrides) -> list[str]:
    return tiny_runs.stage_arguments("sft", run_dir, tiny_runs.SFT, *overrides)


def assert_same_run(run_dir, untouched, *, message) -> None:
    tiny_runs.assert_same_run(run_dir, untouched, steps=STEPS, message=message)


def test_the_ledger_shows_every_utterance_once_an_epoch(untouched):
    epochs: dict[int, list] = {}
    for line in tiny_runs.read_lines(untouched / "ledger.jsonl"):
        epochs.setdefault(line["epoch"], []).extend(map(tuple, line["utterances"]))
    assert len(epochs) >= 2 and len(epochs[0]) == 32
    assert all(len(set(utterances)) == len(utterances) for utterances in epochs.values())
    assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]


def test_a_run_killed_at_a_random_step_and_started_again_ends_bit_identical(tmp_path, overrides, untouched):
    step, run_dir = random.SystemRandom().randint(5, STEPS - 2), tmp_path / "run"
    tiny_runs.kill_and_go_on(run_dir, arguments(run_dir, overrides), step=step)
    assert_same_run(run_dir, untouched, message=f"killed at step {step}")


def test_sigterm_checkpoints_and_leaves_cleanly_and_the_run_goes_on_from_there(tmp_path, overrides, untouched):
    run_dir = tmp_path / "run"
    job = tiny_runs.Process(tmp_path / "job.log", "run", *arguments(run_dir, overrides))
    job.wait_for_step(run_dir, 5)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.log.read_text()[-3000:]
    assert "Traceback" not in job.log.read_text() and not (run_dir / "artifact").exists()
    last = tiny_runs.read_lines(run_dir / "ledger.jsonl")[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{last:06d}" / "manifest.json").is_file() and last < STEPS
    tiny_runs.train("sft", run_dir, tiny_runs.SFT, *overrides)
    assert_same_run(run_dir, untouched, message=f"stopped after step {last}")


def test_two_processes_equal_one_on_the_concatenated_batch(tmp_path, overrides, untouched):
    run_dir = tmp_path / "run"
    tiny_runs.run_ranks(tmp_path, 2, *arguments(run_dir, overrides))
    assert tiny_runs.read_lines(run_dir / "ledger.jsonl") == tiny_runs.read_lines(untouched / "ledger.jsonl")
    two, one = tiny_runs.weights(run_dir), tiny_runs.weights(untouched)
    assert two.keys() == one.keys()
    # Two terms have one sum and halving is exact, so even this holds; the tolerance is for other libraries' reductions.
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)
    assert "on 2 x cpu" in (tmp_path / "rank0.log").read_text()
    curves = [[line["train/loss"] for line in tiny_runs.read_lines(d / "metrics.jsonl")] for d in (run_dir, untouched)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and len(curves[0]) == STEPS
