"""The recogniser: an acllm artifact as a Python object that turns files or arrays into text.

recogniser = seedling.load("runs/demo/context_sft/artifact")
recogniser.transcribe(["a.wav", "b.mp3"], keywords=["Kaitlyn", "Reykjavik"])[0].text
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature

from ..data.audio import read_audio
from ..data.windows import is_silent, require_window
from ..model.audio_llm import AudioLLM
from ..model.decoding import DecodeConfig
from .recogniser.listening import hear
from .recogniser.unpacking import unpack_recogniser
from .runtime.artifacts import load_artifact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transcript:
    """What was heard in one piece of audio; `nbest` are the (text, score) of all hypotheses, best first.

    `complete` is False where the text was cut off at its greatest length, as for audio far longer than in training.
    """

    text: str
    score: float
    seconds: float
    nbest: tuple[tuple[str, float], ...] = ()
    complete: bool = True


class Recogniser:
    """A model with its processor, on one device."""

    def __init__(self, model: AudioLLM, *, batch_seconds: float = 120.0):
        self.model, self.processor, self.batch_seconds = model.eval(), model.processor, batch_seconds
        self._warned = False

    @property
    def sample_rate(self) -> int:
        return self.processor.sample_rate

    def transcribe(
        self,
        audio: Sequence[str | Path | np.ndarray] | str | Path | np.ndarray,
        context: str | Sequence[str | None] | None = None,
        *,
        keywords: Sequence[str] | None = None,
        language: str | Sequence[str | None] | None = None,
        beam_size: int | None = None,
        nbest: int | None = None,
        ctc_weight: float | None = None,
        context_search: str | None = None,
        context_alpha: float | None = None,
        window_seconds: float = 0.0,
    ) -> list[Transcript]:
        """Return one transcript for each file or mono float array at `sample_rate`, in order.

        `context` is one text for all or one for each; `keywords` are names and phrases that may occur, a context of
        their own. `language` is a tag that the recogniser knows, for all or one for each. The settings of the search
        (model/decoding.py) are the recogniser's own where they are None. Silence gives empty text, whatever the
        context. AudioError names an unreadable file; of a context too long the end is left out, with a warning.
        `window_seconds` decodes longer audio window by window (data/windows.py); 0 decodes all of it at once.
        """
        require_window(window_seconds)
        items = [audio] if isinstance(audio, (str, Path, np.ndarray)) else list(audio)
        if keywords is not None:
            if context is not None:
                raise ValueError("context and keywords are both given; keywords are a context: give one of them")
            context = keyword_list(keywords)
        contexts = _one_each(context, items, name="context")
        config = self._search(
            {
                "beam_size": beam_size,
                "nbest": nbest,
                "ctc_weight": ctc_weight,
                "context_search": context_search,
                "context_alpha": context_alpha,
            },
            has_context=any(contexts) or not items,
        )
        languages = _one_each(language, items, name="language")
        if any(contexts) and not self.model.config.reads_contexts and not self._warned:
            log.warning("this recogniser was not trained with contexts and may well be misled by one; see context_sft")
            self._warned = True
        for tag in set(languages):
            self.model.prompt_tokens.before_speech(None, tag)  # an unknown one is refused before any work
        waveforms = [self._waveform(item) for item in items]
        found: dict[int, Transcript] = {
            i: Transcript("", 0.0, len(w) / self.sample_rate)
            for i, w in enumerate(waveforms)
            if is_silent(w, self.sample_rate)
        }
        for group in self._groups([i for i in range(len(items)) if i not in found], waveforms):
            inputs = self.processor(
                audio=[waveforms[i] for i in group],
                context=[contexts[i] for i in group],
                language=[languages[i] for i in group],
            )
            found |= dict(zip(group, self._decode(inputs, config, window_seconds)))
        return [found[i] for i in range(len(items))]

    def _search(self, settings: dict[str, Any], *, has_context: bool) -> DecodeConfig:
        """Return the recogniser's own settings with those given; a weight of the context that weighs nothing is an
        error."""
        config = replace(self.model.decode_config, **{name: v for name, v in settings.items() if v is not None})
        if (alpha := settings["context_alpha"]) is not None:
            if not has_context:
                raise ValueError(f"context_alpha is {alpha:g} and there is no context; give a context, or leave it out")
            if config.context_search == "plain":
                raise ValueError(
                    f"context_alpha is {alpha:g} and context_search plain, which has no weight; leave one of them out"
                )
        return config

    def _waveform(self, item: str | Path | np.ndarray) -> np.ndarray:
        if isinstance(item, (str, Path)):
            return read_audio(item, sample_rate=self.sample_rate)
        waveform = np.asarray(item, dtype=np.float32)
        if waveform.ndim != 1 or not len(waveform):
            raise ValueError(f"audio of shape {waveform.shape}; give mono arrays [N] with at least one sample")
        return waveform

    def _groups(self, indexes: list[int], waveforms: list[np.ndarray]) -> list[list[int]]:
        """Put utterances of like length together, at most `batch_seconds` of padded audio in one."""
        groups: list[list[int]] = []
        for i in sorted(indexes, key=lambda i: len(waveforms[i]), reverse=True):
            longest = len(waveforms[groups[-1][0]]) / self.sample_rate if groups else 0.0
            if groups and longest * (len(groups[-1]) + 1) <= self.batch_seconds:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def _decode(self, inputs: BatchFeature, config: DecodeConfig, window_seconds: float) -> Iterator[Transcript]:
        device = self.model.device
        heard = hear(
            self.model,
            inputs["waveforms"].to(device),
            inputs["lengths"].to(device),
            contexts_ids=inputs["contexts_ids"],
            languages=inputs["languages"],
            config=config,
            window_seconds=window_seconds,
            batch_seconds=self.batch_seconds,
        )
        for (texts, complete), samples in zip(heard, inputs["lengths"].tolist()):
            yield Transcript(*texts[0], seconds=samples / self.sample_rate, nbest=texts, complete=complete)


def keyword_list(keywords: Sequence[str]) -> str:
    """Return the context that lists keywords, in the form of the lists that a recogniser is trained with."""
    if isinstance(keywords, str):
        raise ValueError(f"keywords is one text, {keywords!r}; give a list of names and phrases, or it as context")
    listed = ", ".join(dict.fromkeys(word for keyword in keywords if (word := " ".join(keyword.split()))))
    if not listed:
        raise ValueError("keywords has no word in it; give at least one, or leave keywords out")
    return listed


def _one_each(value: str | Sequence[str | None] | None, items: list, *, name: str) -> list[str | None]:
    """Return a value for each item: the one given, or the one in its place."""
    values = [value] * len(items) if value is None or isinstance(value, str) else list(value)
    if len(values) != len(items):
        raise ValueError(f"{len(items)} pieces of audio and {len(values)} {name}s; give one {name}, or one each")
    return values


def load(
    artifact: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    unpack_gb: float | None = None,
) -> Recogniser:
    """Open an acllm artifact (its folder, or its run's) as a recogniser, on a GPU where there is one.

    `unpack_gb` is the memory that dense weights of a packed one may take (recogniser/unpacking.py); None is up to the
    machine: on a CPU what speed asks for, on a GPU nothing.
    """
    folder = Path(artifact)
    if not (folder / "manifest.json").is_file() and (folder / "artifact" / "manifest.json").is_file():
        folder = folder / "artifact"
    load_artifact(folder, kind="acllm", wanted_by="seedling.load")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = AudioLLM.from_pretrained(folder, dtype=dtype).to(device)
    unpack_recogniser(model, gb=unpack_gb)
    model.record_steps()
    return Recogniser(model)
