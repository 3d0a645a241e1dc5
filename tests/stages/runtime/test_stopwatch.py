"""Laps of one name add up, and all of them are the whole time."""

import time

import pytest
import torch

from seedling.stages.runtime.stopwatch import Stopwatch


def test_laps_of_a_part_add_up_to_the_time_that_passed():
    before = time.perf_counter()
    watch = Stopwatch(torch.device("cpu"))
    start = time.perf_counter()
    for _ in range(3):
        time.sleep(0.02)
        watch.lap("forward")
        time.sleep(0.01)
        end = time.perf_counter()
        watch.lap("backward")
    after = time.perf_counter()
    laps = watch.read()
    assert set(laps) == {"forward", "backward"} and {count for _, count in laps.values()} == {1}
    forward, backward = laps["forward"][0], laps["backward"][0]
    assert forward >= 0.06 and backward >= 0.03
    assert end - start - 1e-6 <= forward + backward <= after - before + 1e-6  # the sum is rounded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_time_of_the_gpu():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    watch = Stopwatch(device)
    for _ in range(50):
        matrix = matrix @ matrix / 64
    watch.lap("multiply")
    assert watch.read()["multiply"][0] > 1e-3
