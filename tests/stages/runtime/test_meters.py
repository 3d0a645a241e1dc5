"""The peak of memory begins anew where the system allows it; operations a second are what was counted over time."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from seedling.stages.runtime.engine import StepResult
from seedling.stages.runtime.meters import Meters, peak_memory_gb, reset_peak_memory
from seedling.stages.runtime.world import World


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_the_peak_after_a_reset_is_that_of_what_came_after_it():
    big = np.ones(60_000_000)
    peak = peak_memory_gb()
    del big
    reset_peak_memory()
    low = peak_memory_gb()
    assert low < peak - 0.4
    small = np.ones(20_000_000)
    assert low + 0.1 < peak_memory_gb() < low + 0.3
    del small


def test_operations_a_second_are_those_of_the_padded_audio_shared_by_the_ranks(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("seedling.stages.runtime.meters.time.perf_counter", lambda: now[0])
    meters = Meters(World(0, 1, torch.device("cpu")))
    meters.know_work(6e12, padded_seconds=30.0, precision="bf16")
    result = StepResult(torch.tensor(1.0), {}, 1.0, True)
    agreed = SimpleNamespace(seconds=40, padded_seconds=60, characters=0, padded_characters=0, count=10)
    meters.add(result, agreed)
    now[0] += 4
    values = meters.read()
    assert values["train/tflops_per_s"] == pytest.approx(60 / 30 * 6 / 4)
    assert "train/mfu" not in values  # nobody knows the peak of this device
    assert values["train/tokens_per_s"] == 10 / 4


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 312e12), ("autocast", 312e12), ("fp32", 19.5e12)])
def test_a_device_whose_peak_is_known_has_an_mfu_of_its_precision(monkeypatch, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    meters = Meters(World(0, 2, torch.device("cuda", 0)))
    meters.know_work(peak, padded_seconds=1.0, precision=precision)
    meters.padded_seconds = 1.0
    assert meters._work(1.0)["train/mfu"] == pytest.approx(1 / 2)
