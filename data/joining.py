"""Joining utterances: their audio with a little of the room between them, their texts, and what is known of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

QUIET_WINDOW_S = 0.025
QUIETEST_RMS = 1e-4  # -80 dBFS: digital silence is a spectrum that no microphone gives
# Scripts that put no space between words: ideographs, kana, and their punctuation in its wide forms.
SPACELESS = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef\U00020000-\U0003ffff]")


def join_texts(texts: Sequence[str]) -> str:
    """Return the texts one after the other: a space between them, but none between Chinese or Japanese characters."""
    joined = ""
    for text in (text.strip() for text in texts):
        if joined and text and not (SPACELESS.match(joined[-1]) and SPACELESS.match(text[0])):
            joined += " "
        joined += text
    return joined


def join_waveforms(waveforms: Sequence[np.ndarray], *, gap: int, sample_rate: int) -> np.ndarray:
    """Return [N]: the waveforms with `gap` samples of noise in between, as loud as the quietest 25 ms beside it."""
    pieces = [waveforms[0]]
    levels = [max(QUIETEST_RMS, quietest(waveform, sample_rate=sample_rate)) for waveform in waveforms]
    # The same noise for the same audio, whoever reads it.
    draws = np.random.Generator(np.random.Philox(sum(map(len, waveforms))))
    for waveform, pair in zip(waveforms[1:], itertools.pairwise(levels)):
        pieces += [(min(pair) * draws.standard_normal(gap)).astype(np.float32), waveform]
    return np.concatenate(pieces)


def quietest(waveform: np.ndarray, *, sample_rate: int) -> float:
    """Return the root mean square of the quietest 25 ms."""
    return float(np.sqrt(window_powers(waveform, sample_rate=sample_rate).min()))


def window_powers(waveform: np.ndarray, *, sample_rate: int) -> np.ndarray:
    """Return the mean square of each 25 ms, at least one; a shorter rest at the end is left out."""
    window = max(1, min(round(QUIET_WINDOW_S * sample_rate), len(waveform)))
    return np.square(waveform[: len(waveform) // window * window].reshape(-1, window), dtype=np.float64).mean(axis=1)


def join_metas(metas: Sequence[dict], *, keys: Sequence[str]) -> dict:
    """Return the meta of a group: its members' keys, the text, all keywords, and what is the same for all of them."""
    common = {name: value for name, value in metas[0].items() if all(meta.get(name) == value for meta in metas[1:])}
    keywords = [word for meta in metas for word in meta.get("keywords") or []]
    text = join_texts([meta.get("text") or "" for meta in metas])
    return common | {"text": text, "keywords": list(dict.fromkeys(keywords)), "members": list(keys)}
