"""Whole audio, or windows of it, to texts: the same call for both, so that they can be compared on the same audio."""

from typing import NamedTuple

from torch import Tensor

from ...data.joining import join_texts
from ...data.loader import pad_waveforms
from ...data.windows import is_silent, split_windows
from ...model.audio_llm import AudioLLM
from ...model.decoding import DecodeConfig


class Heard(NamedTuple):
    """The hypotheses of an utterance, best first, as (text, score); whether the best one came to its end."""

    texts: tuple[tuple[str, float], ...]
    complete: bool


def hear(
    model: AudioLLM,
    waveforms_BN: Tensor,
    lengths_B: Tensor,
    *,
    contexts_ids: list[list[int] | None],
    languages: list[str | None],
    config: DecodeConfig,
    window_seconds: float = 0.0,
    batch_seconds: float = 120.0,
) -> list[Heard]:
    """Return what the model hears in each utterance: in all of it at once, or (`window_seconds`) window by window.

    A silent window has no words. Each other one gets the utterance's context, and its best text is joined to those of
    its neighbours: a windowed utterance has one hypothesis. As many windows as `batch_seconds` hold are decoded
    together.
    """
    if not window_seconds:
        nbests = model.transcribe_ids(
            waveforms_BN, lengths_B, contexts_ids=contexts_ids, languages=languages, config=config
        )
        return [
            Heard(tuple((model.processor.decode(h.ids), h.score) for h in nbest), nbest[0].complete) for nbest in nbests
        ]
    sample_rate = model.fbank.cfg.sample_rate
    pieces, owners = [], []
    for b, (waveform_N, length) in enumerate(zip(waveforms_BN.cpu().numpy(), lengths_B.tolist())):
        for span in split_windows(waveform_N[:length], sample_rate=sample_rate, window_seconds=window_seconds):
            piece_N = waveform_N[span.start : span.stop]
            if not is_silent(piece_N, sample_rate):
                pieces.append(piece_N)
                owners.append(b)
    heard: list[Heard] = []
    together = max(1, int(batch_seconds / window_seconds))
    for start in range(0, len(pieces), together):
        waves_BN, samples_B = (x.to(waveforms_BN.device) for x in pad_waveforms(pieces[start : start + together]))
        owned = owners[start : start + together]
        heard += hear(
            model,
            waves_BN,
            samples_B,
            contexts_ids=[contexts_ids[b] for b in owned],
            languages=[languages[b] for b in owned],
            config=config,
        )
    return [_joined([one for one, b in zip(heard, owners) if b == owner]) for owner in range(len(lengths_B))]


def _joined(windows: list[Heard]) -> Heard:
    if len(windows) == 1:
        return windows[0]
    best = [window.texts[0] for window in windows]
    whole = join_texts([text for text, _ in best]), sum((score for _, score in best), 0.0)
    return Heard((whole,), all(window.complete for window in windows))
