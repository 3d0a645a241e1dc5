"""Fixed windows of long audio, cut where it is quietest near the edge: for a recogniser that was trained on short ones.

No window is longer than asked, and all of them are about equally long: a stub at the end would have no context.
Shape letter: N samples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .joining import QUIET_WINDOW_S, window_powers

SEARCH_SHARE = 0.2  # of a window, how far from its ideal end the quietest place may lie
LEAST_SECONDS = 1.0
# Root mean square of the loudest 25 ms, full scale 1: -66 dBFS. Recorded speech, even far away, lies well above; below
# is digital silence and the noise of an open input, to which a language model would otherwise add words.
SILENCE_RMS = 5e-4


class Span(NamedTuple):
    """The samples [start, stop) of a waveform."""

    start: int
    stop: int


def require_window(window_seconds: float) -> None:
    if window_seconds and not window_seconds >= LEAST_SECONDS:
        raise ValueError(f"window_seconds ({window_seconds}) must be 0, for whole audio, or at least {LEAST_SECONDS:g}")


def split_windows(waveform_N: np.ndarray, *, sample_rate: int, window_seconds: float) -> list[Span]:
    """Return spans of at most `window_seconds` that make up the waveform, in order; 0 gives the whole of it."""
    require_window(window_seconds)
    longest = round(window_seconds * sample_rate) or len(waveform_N)
    spans, start = [], 0
    while (rest := len(waveform_N) - start) > longest:
        ideal = rest / -(-rest // longest)
        low, high = start + int((1 - SEARCH_SHARE) * ideal), start + min(int((1 + SEARCH_SHARE) * ideal), longest)
        powers = window_powers(waveform_N[low:high], sample_rate=sample_rate)
        width = max(1, round(QUIET_WINDOW_S * sample_rate))
        stop = min(high, low + int(powers.argmin()) * width + width // 2)
        spans.append(Span(start, stop))
        start = stop
    return [*spans, Span(start, len(waveform_N))]


def is_silent(waveform: np.ndarray, sample_rate: int) -> bool:
    """Whether no 25 ms of it are louder than SILENCE_RMS."""
    window = sample_rate // 40
    padded = np.pad(waveform, (0, -len(waveform) % window)).reshape(-1, window)
    return bool(np.sqrt(np.square(padded).mean(axis=1)).max() < SILENCE_RMS)
