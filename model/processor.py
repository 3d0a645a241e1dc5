"""Processor: arrays and texts to the model's inputs, token ids back to text.

It does not read files and does not resample: audio arrives at the model's sample rate or is refused by name.
Shape letters: B utterances, N samples.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .context_cut import clean_text, cut
from .prompt import PromptConfig, tokenize

log = logging.getLogger(__name__)

FILE = "processor_config.json"  # the name under which AutoProcessor looks for it


class FittedContext(NamedTuple):
    """A context's ids, the part of its text that they spell, and how many tokens there were before it was cut."""

    ids: list[int]
    text: str
    tokens: int

    @property
    def is_cut(self) -> bool:
        return self.tokens > len(self.ids)


class AudioLLMProcessor:
    """Tokenizer, sample rate and prompts of one model; saved with it, loaded by AutoProcessor."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, sample_rate: int = 16000, prompts: PromptConfig | None = None
    ):
        self.tokenizer = tokenizer
        self.sample_rate = sample_rate
        self.prompts = prompts or PromptConfig()
        self._reported: set[str] = set()  # contexts that were said to be too long

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: np.ndarray | Tensor | Sequence[np.ndarray | Tensor] | None = None,
        *,
        context: str | Sequence[str | None] | None = None,
        language: str | Sequence[str | None] | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """Return the keyword arguments of the model: waveforms, lengths, transcripts_ids, contexts_ids, languages.

        `audio` is one mono float array [N] in [-1, 1] or a list of them. Only what is given comes back, so that
        `model(**processor(audio=..., text=...))` trains and `model.generate(**processor(audio=...))` decodes.
        """
        inputs: dict = {}
        if audio is not None:
            if sampling_rate is not None and sampling_rate != self.sample_rate:
                raise ValueError(
                    f"audio at {sampling_rate} Hz, the model takes {self.sample_rate} Hz: resample it, "
                    f"for example with soxr.resample(audio, {sampling_rate}, {self.sample_rate})"
                )
            inputs["waveforms"], inputs["lengths"] = _checked_and_padded(audio)
        if text is not None:
            inputs["transcripts_ids"] = self.transcript_ids([text] if isinstance(text, str) else text)
        if context is not None:
            inputs["contexts_ids"] = self.context_ids([context] if isinstance(context, str) else context)
        if language is not None:
            inputs["languages"] = [language] if isinstance(language, str) else list(language)
        if not inputs:
            raise ValueError("the processor was given neither audio nor text nor context; pass at least one")
        return BatchFeature(inputs)

    def transcript_ids(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the target ids of transcripts, without the end token, which the model adds."""
        return [tokenize(self.tokenizer, text) for text in texts]

    def context_ids(self, contexts: Sequence[str | None]) -> list[list[int] | None]:
        """Return the ids of contexts; an absent or empty one is None, which gives the prompt without context.

        One of more than `prompts.context_tokens` loses its end, and a warning says so, once.
        """
        fitted = [self.fit_context(context) for context in contexts]
        for context, fit in zip(contexts, fitted):
            if fit is not None and fit.is_cut and context not in self._reported:
                self._reported.add(context)
                log.warning(
                    f"the context has {fit.tokens:,} tokens and this recogniser takes {self.prompts.context_tokens:,}: "
                    f"kept the first {len(fit.ids):,} of them, to ...{fit.text[-30:]!r}"
                )
        return [fit.ids if fit is not None else None for fit in fitted]

    def fit_context(
        self, context: str | None, *, max_tokens: int = 0, keep: Iterable[str] = ()
    ) -> FittedContext | None:
        """Return what a prompt holds of a context: whole phrases from its start; None where there is no text in it.

        `max_tokens` is the most there may be (0: as the prompts say). Phrases in `keep` are cut last. Control
        characters count as spaces, control tokens as the text that spells them.
        """
        text = clean_text(context) if context else ""
        if not text:
            return None
        limit = max_tokens or self.prompts.context_tokens
        whole = self._in_prompt(text)
        if len(whole) <= limit:
            return FittedContext(whole, text, len(whole))
        kept = cut(text, fits=lambda part: len(self._in_prompt(part)) <= limit, keep=keep)
        return FittedContext(self._in_prompt(kept) if kept else [], kept, len(whole))

    def _in_prompt(self, context: str) -> list[int]:
        return tokenize(self.tokenizer, self.prompts.context.replace("{context}", context))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Return the text of one hypothesis."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str), "one list of ids gives one text"
        return text.strip()

    def batch_decode(self, ids: Iterable[Sequence[int] | Tensor]) -> list[str]:
        """Return the texts of several hypotheses, or of the rows that `model.generate` gave."""
        return [self.decode(row) for row in ids]

    def save_pretrained(self, folder: str | Path, **kwargs) -> None:
        """Write processor_config.json and the tokenizer's files into the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = {
            "processor_class": type(self).__name__,
            "sample_rate": self.sample_rate,
            "prompts": asdict(self.prompts),
        }
        (folder / FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs) -> "AudioLLMProcessor":
        """Load what `save_pretrained` wrote. AutoProcessor passes further arguments, which have no use here."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise ValueError(f"{folder}: no {FILE} in it; give a folder that AudioLLM.save_pretrained wrote")
        settings = json.loads(file.read_text(encoding="utf-8"))
        from transformers import AutoTokenizer  # late: see llm.py

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(tokenizer, sample_rate=settings["sample_rate"], prompts=PromptConfig(**settings["prompts"]))


def _checked_and_padded(audio: np.ndarray | Tensor | Sequence[np.ndarray | Tensor]) -> tuple[Tensor, Tensor]:
    """Return waveforms_BN, float32 and zero past each utterance's end, and lengths_B in samples."""
    single = isinstance(audio, (np.ndarray, Tensor)) and audio.ndim == 1
    waveforms = [torch.as_tensor(waveform) for waveform in ([audio] if single else audio)]
    for position, waveform in enumerate(waveforms):
        if waveform.ndim != 1 or len(waveform) == 0:
            raise ValueError(
                f"audio {position} has shape {tuple(waveform.shape)}; give one mono array [N] an utterance"
            )
        if not waveform.is_floating_point():
            raise ValueError(
                f"audio {position} is {waveform.dtype}; give floats in [-1, 1]: divide 16-bit samples by 32768"
            )
    lengths_B = torch.tensor([len(waveform) for waveform in waveforms])
    return torch.nn.utils.rnn.pad_sequence([w.float() for w in waveforms], batch_first=True), lengths_B
