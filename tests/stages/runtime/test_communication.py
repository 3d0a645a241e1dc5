"""The share of a step that is nothing but communication: sums of intervals, and real ranks of which one is late."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked_jobs import ForkedJob
from torch.autograd import DeviceType
from toy_jobs import read_lines

from seedling.stages.runtime.communication import WATCHED_STEP, CommunicationWatch, covered, exposed, sort_events
from seedling.stages.runtime.world import World

FRAC, LEAST = "train/communication_frac", "train/communication_frac_least"
TRAIN = {"max_steps": 6, "log_every": 1, "save_every": 0}


def on_a_grid(intervals) -> np.ndarray:
    grid = np.zeros(200, dtype=bool)
    for start, end in intervals:
        grid[start:end] = True
    return grid


def test_exposed_is_the_time_of_collectives_in_which_no_work_runs():
    draws = np.random.default_rng(0)
    for _ in range(200):
        sets = []
        for _ in range(2):
            starts = draws.integers(0, 150, size=draws.integers(0, 9))
            sets.append([(int(start), int(start + draws.integers(0, 40))) for start in starts])
        collectives, work = sets
        assert covered(work) == on_a_grid(work).sum()
        assert exposed(collectives, work) == (on_a_grid(collectives) & ~on_a_grid(work)).sum()


def test_on_a_gpu_kernels_count_and_not_the_calls_that_start_them():
    def event(name, start, end, device):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)

    events = [
        event("cudaLaunchKernel", 0, 100, DeviceType.CPU),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 10, 40, DeviceType.CUDA),
        event("ampere_sgemm_128x64_nn", 30, 60, DeviceType.CUDA),
    ]
    collectives, work = sort_events(events, is_cuda=True)
    assert (collectives, work) == ([(10, 40)], [(30, 60)]) and exposed(collectives, work) == 20


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Metrics of two ranks, under two ZeRO stages, rank 1 late in both forward passes of the step that is watched.

    By 1.5 s each: beside that it is little for how long a busy machine leaves a thread of gloo's waiting.
    """
    late = {"sleep_seconds": 1.5, "sleep_rank": 1, "sleep_step": WATCHED_STEP - 1}
    runs = {f"zero{stage}": {"train": {**TRAIN, "zero_stage": stage}, **late} for stage in (0, 2)}
    root = ForkedJob(tmp_path_factory.mktemp("runs"), runs, ranks=2).finish().root
    return {name: read_lines(root / name / "metrics.jsonl") for name in runs}


@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_the_rank_that_waits_for_a_late_one_shows_it_and_the_late_one_does_not(lines, name):
    known = [line["step"] for line in lines[name] if FRAC in line]
    assert known == list(range(WATCHED_STEP, TRAIN["max_steps"] + 1))
    line = next(line for line in lines[name] if LEAST in line)
    # Of the waiting rank's step more than half is waiting, of the late one's hardly anything.
    assert 0 < line[LEAST] < 0.2 and 0.25 < line[FRAC] < 0.6


def test_one_rank_communicates_with_nobody():
    watch = CommunicationWatch(World(0, 1, torch.device("cpu")))
    for _ in range(WATCHED_STEP + 1):
        with watch.step():
            pass
    assert watch.metrics == {}
