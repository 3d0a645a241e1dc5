"""The peak of memory begins anew where the system allows it."""

import sys

import numpy as np
import pytest

from seedling.stages.runtime.meters import peak_memory_gb, reset_peak_memory


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
