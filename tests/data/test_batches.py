"""Planned batches: the first ones for statistics, and the fingerprint that a run resumes on."""

import subprocess
import sys

import numpy as np
import pytest

from seedling.data.batches import PlannedBatches
from seedling.data.plan import Plan, PlanConfig


class Corpus:
    shards, rows_S, fingerprint = ["one"], np.array([40]), "forty"

    def expect(self, shards):
        pass

    def index(self, shard):
        rows = np.zeros(40, dtype=[("key", "S8"), ("samples", "i8"), ("sample_rate", "i4"), ("text_chars", "i4")])
        rows["samples"], rows["sample_rate"] = 1 + np.arange(40) % 5, 1
        return rows


class Echo:
    def __getitem__(self, micro_batch):
        return micro_batch


def planned(**settings) -> PlannedBatches:
    return PlannedBatches(
        Plan(Corpus(), PlanConfig(max_seconds=10), seed=1, micro_batches_per_step=2), Echo(), **settings
    )


def test_the_first_micro_batches_are_those_of_the_first_epoch_in_order():
    data = planned()
    epoch = [micro_batch for step in data.plan.steps(epochs=1) for micro_batch in step.micro_batches]
    assert list(data.first(3)) == epoch[:3]
    assert list(data.first(1000)) == epoch


def test_without_targets_the_fingerprint_is_the_plans_and_other_targets_give_another():
    assert planned().fingerprint == planned().plan.fingerprint
    assert len({planned(targets=targets).fingerprint for targets in ("", "codes 1", "codes 2")}) == 3
    assert planned(targets="codes 1").fingerprint == planned(targets="codes 1").fingerprint


@pytest.mark.parametrize("first", ["next(left)", "pass"])  # workers may be at work, or hardly forked
def test_a_process_that_ends_in_an_error_does_not_wait_for_its_loader(first):
    program = f"""
from seedling.data.batches import PlannedBatches, make_loader
class Echo:
    def __getitem__(self, micro_batch):
        return micro_batch
left = iter(make_loader(PlannedBatches(None, Echo()), range(1000), num_workers=2))  # a traceback may refer to it so
{first}
raise RuntimeError("something went wrong")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1
    assert "something went wrong" in ended.stderr and "killed" not in ended.stderr
