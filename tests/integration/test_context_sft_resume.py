"""context_sft in real processes: killed, or shared by two ranks with workers, it ends as the run that nothing
happened to; which utterances are triples with which contexts is drawn anew each epoch, and the same everywhere."""

import random

import pytest
import tiny_runs
import torch

from seedling.data.contexts.sidecar import UtteranceContext

STEPS = 14


def lists(text: str) -> list[UtteranceContext]:
    words = tuple(sorted(set(text.split())))
    others = tuple(word for word in tiny_runs.WORDS if word not in words)
    return [UtteranceContext("relevant", ", ".join(listed), listed) for listed in (words, others, (*words, *others))]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """14 steps of two micro-batches on 32 utterances: several epochs and a piece; checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("toy")
    shards = tiny_runs.make_shards(folder / "corpus", tiny_runs.sentences(32, seed=1))
    sidecar = tiny_runs.make_contexts(folder / "contexts", shards, lists)
    data = [f"data.train=[{shards}]", "data.augment.speed_probability=0.5"]
    llm = f"inputs.llm={tiny_runs.make_llm(folder / 'llm')}"
    start = tiny_runs.train("sft", folder / "sft", tiny_runs.SFT, *data, llm, "train.max_steps=2")
    contexts = [f"contexts=[{sidecar}]", "context.dropout=0.2", "context.max_tokens=30", "data.limits.max_tokens=400"]
    return [*data, *contexts, f"inputs.acllm={start}/artifact", f"train.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, overrides):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("untouched")
    return tiny_runs.train("context_sft", folder / "run", tiny_runs.CONTEXT_SFT, *overrides)


def arguments(run_dir, overrides) -> list[str]:
    return tiny_runs.stage_arguments("context_sft", run_dir, tiny_runs.CONTEXT_SFT, *overrides)


def test_a_run_killed_at_a_random_step_and_started_again_ends_bit_identical(tmp_path, overrides, untouched):
    step, run_dir = random.SystemRandom().randint(5, STEPS - 2), tmp_path / "run"
    tiny_runs.kill_and_go_on(run_dir, arguments(run_dir, overrides), step=step)
    tiny_runs.assert_same_run(run_dir, untouched, steps=STEPS, message=f"killed at step {step}")


def test_two_processes_with_workers_equal_one_without(tmp_path, overrides, untouched):
    run_dir = tmp_path / "run"
    tiny_runs.run_ranks(tmp_path, 2, *arguments(run_dir, [*overrides, "train.num_workers=1"]))
    assert tiny_runs.read_lines(run_dir / "ledger.jsonl") == tiny_runs.read_lines(untouched / "ledger.jsonl")
    two, one = tiny_runs.weights(run_dir), tiny_runs.weights(untouched)
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)
    shares = tiny_runs.curve(untouched, "train/triple_frac")
    assert len(shares) == STEPS and len(set(shares)) > 3 and 0.2 < sum(shares) / STEPS < 0.6
    for name in ("triple_frac", "context_tokens", "nll_triples", "nll_pairs"):
        one, two = (tiny_runs.curve(folder, f"train/{name}") for folder in (untouched, run_dir))
        assert two == pytest.approx(one, rel=1e-4), name
