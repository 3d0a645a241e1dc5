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
