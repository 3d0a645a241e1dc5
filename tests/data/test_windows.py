"""Windows: they make up the audio, none is too long, and they are cut in the quiet."""

from itertools import pairwise

import numpy as np
import pytest

from seedling.data.windows import split_windows

RATE = 1000


@pytest.mark.parametrize("seconds", [0.001, 0.4, 1.0, 29.999, 30.0, 30.001, 59.0, 60.0, 61.0, 299.0, 1000.0])
@pytest.mark.parametrize("window_seconds", [1.0, 7.3, 30.0])
def test_windows_make_up_the_audio_and_none_is_longer_than_asked(seconds, window_seconds):
    waveform_N = np.random.default_rng(0).standard_normal(max(1, round(seconds * RATE))).astype(np.float32)
    spans = split_windows(waveform_N, sample_rate=RATE, window_seconds=window_seconds)
    assert spans[0].start == 0 and spans[-1].stop == len(waveform_N)
    assert all(a.stop == b.start for a, b in pairwise(spans))
    lengths = [span.stop - span.start for span in spans]
    assert max(lengths) <= round(window_seconds * RATE)
    if len(spans) > 1:  # no stub at the end, and not many more windows than it takes
        assert min(lengths) > 0.35 * window_seconds * RATE
        assert len(spans) <= 1.3 * seconds / window_seconds + 2


def test_a_window_ends_in_the_pause_near_its_end():
    waveform_N = np.ones(70 * RATE, dtype=np.float32)
    pauses = [21_000, 28_000, 44_000, 55_000]
    for at in pauses:
        waveform_N[at - 150 : at + 150] = 0.01
    spans = split_windows(waveform_N, sample_rate=RATE, window_seconds=30)
    assert len(spans) == 3
    assert all(min(abs(span.stop - at) for at in pauses) <= 150 for span in spans[:-1])


def test_zero_is_the_whole_audio_and_less_than_a_second_is_an_error():
    waveform_N = np.ones(50 * RATE, dtype=np.float32)
    assert split_windows(waveform_N, sample_rate=RATE, window_seconds=0) == [(0, 50 * RATE)]
    for wrong in (0.5, -1, float("nan")):
        with pytest.raises(ValueError, match=r"window_seconds \(.*must be 0"):
            split_windows(waveform_N, sample_rate=RATE, window_seconds=wrong)
