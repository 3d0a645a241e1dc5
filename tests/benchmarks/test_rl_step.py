"""The benchmark of a step compares ways that come to the same, and would notice one that does not."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "rl_step.py"


@pytest.fixture(scope="module")
def benchmark():
    threads, path = torch.get_num_threads(), list(sys.path)
    spec = importlib.util.spec_from_file_location("rl_step", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rl_step"] = module
    spec.loader.exec_module(module)
    module.LIMIT = 5
    yield module
    del sys.modules["rl_step"], sys.modules["decoding"]
    sys.path[:] = path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def step(benchmark):
    """A recogniser, a batch, and the N-best lists of both ways to make them."""
    model = benchmark.random_recogniser(
        "demo", benchmark.ENCODERS["demo"], specaugment=benchmark.SpecAugmentConfig(0, num_freq_masks=0)
    )
    benchmark.set_end(model.llm, 3.0)
    batch = benchmark.waveforms_of([1.0, 0.6])
    return model, batch, benchmark.our_nbests(model, batch, 3)


def test_all_ways_have_equal_lists_losses_and_gradients(benchmark, step):
    model, batch, nbests = step
    assert {h.complete for nbest in nbests for h in nbest} == {True, False}
    benchmark.assert_equal_steps(model, batch, nbests, benchmark.risks_of(nbests))


def test_other_lists_are_noticed(benchmark, step):
    model, batch, nbests = step
    with pytest.raises(AssertionError):
        benchmark.assert_equal_steps(model, batch, [nbest[::-1] for nbest in nbests], benchmark.risks_of(nbests))


def test_other_scores_are_noticed(benchmark, step, monkeypatch):
    model, batch, nbests = step
    generate, score = benchmark.WAYS["ours"]
    monkeypatch.setitem(benchmark.WAYS, "ours", (generate, lambda *args: 1.01 * score(*args)))
    with pytest.raises(AssertionError, match="ours: "):
        benchmark.assert_equal_steps(model, batch, nbests, benchmark.risks_of(nbests))


def test_a_row_for_each_way_says_what_it_took(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "waveforms_of", lambda seconds: (torch.ones(2, 16000), torch.tensor([16000, 9600])))
    args = argparse.Namespace(utterances=2, rounds=1, frozen=True)
    rows = [[cell.strip() for cell in row.split("|")] for row in benchmark.measured("demo", 2, args)]
    assert [row[5] for row in rows] == [*benchmark.WAYS]
    for row in rows:
        *parts, whole = map(float, row[6:11])
        assert sum(parts) == pytest.approx(whole, abs=0.03)
        assert min(parts) >= 0 and parts[0] > 0


def test_a_part_within_another_counts_for_itself_alone(benchmark, monkeypatch):
    now = iter([0.0, 2.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: next(now))
    clock = benchmark.Clock()
    clock.start("scoring")
    clock.start("encoder")
    clock.stop()
    clock.stop()
    assert clock.seconds == {"scoring": 3.0, "encoder": 3.0}
