"""Training with contexts: triples of context, speech and text among ordinary pairs.

What context_sft and mwer share. Contexts come from sidecars (`seedling contextualize`), one for each corpus in
`data.train`; in the prompt of a triple the instruction announces contexts, and one stands before the speech.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from ...data.batches import PlannedBatches
from ...data.contexts.draw import ContextConfig, DrawnContexts
from ...data.contexts.sidecar import UtteranceContext
from ...data.loader import AudioBatch
from ...data.scoring.phrases import Tokens, phrase_of
from ...model.audio_llm import AudioLLM
from ...model.processor import AudioLLMProcessor, FittedContext
from ..runtime.artifacts import Artifact, ArtifactSpec
from ..runtime.metrics import Metrics
from .training import Prompts, RecogniserConfig, RecogniserTraining


@dataclass(kw_only=True)
class ContextualConfig(RecogniserConfig):
    contexts: list[str] = field(default_factory=list)  # a sidecar for each folder in data.train; "": pairs only
    valid_contexts: dict[str, str] = field(default_factory=dict)  # of some validation sets, by their name
    context: ContextConfig = field(default_factory=ContextConfig)


class ContextualTraining(RecogniserTraining):
    """Goes on from a recogniser with [instruction | context | speech] and [instruction | speech] in the prompts."""

    consumes = {"acllm": ArtifactSpec("acllm")}
    cfg: ContextualConfig

    def build(self, cfg: ContextualConfig, inputs: dict[str, Artifact]) -> AudioLLM:
        model = self.go_on(cfg, inputs["acllm"])
        if any(cfg.contexts):
            self._take_contexts(model, cfg.context.max_tokens, path=inputs["acllm"].path)
        return self.ready(cfg, model)

    def _take_contexts(self, model: AudioLLM, wanted: int, *, path: Path) -> None:
        # From now on it takes contexts as long as it has been trained with, where its LLM has room for them.
        model.set_prompts(replace(model.processor.prompts, context_tokens=wanted))
        if (room := model.processor.prompts.context_tokens) < wanted:
            raise ValueError(
                f"context.max_tokens is {wanted}, and half of the positions of the LLM in {path} are {room}; set "
                f"context.max_tokens={room}"
            )
        model.config.reads_contexts = True

    def batches(self, cfg: ContextualConfig, split: str) -> PlannedBatches | dict[str, PlannedBatches]:
        if split == "train":
            if not any(cfg.contexts):
                return super().batches(cfg, split)
            drawn = DrawnContexts.open(
                cfg.contexts, corpora=cfg.data.train, cfg=cfg.context, seed=cfg.seed, remote=cfg.data.remote
            )
            return cfg.data.training(seed=cfg.seed, contexts=drawn, **self.limits(cfg))
        unknown = sorted(set(cfg.valid_contexts) - set(cfg.data.valid))
        if unknown:
            raise ValueError(
                f"valid_contexts.{unknown[0]}: no validation set has this name; data.valid has "
                f"{', '.join(cfg.data.valid) or 'none'}"
            )
        contexts = {
            name: DrawnContexts.open(
                [folder], corpora=[cfg.data.valid[name]], cfg=cfg.context, first=True, remote=cfg.data.remote
            )
            for name, folder in cfg.valid_contexts.items()
        }
        return cfg.data.validation(contexts=contexts, **self.limits(cfg))

    def prompts(self, batch: AudioBatch) -> Prompts:
        return super().prompts(batch)._replace(contexts=self._fitted(batch))

    def _fitted(self, batch: AudioBatch) -> list[FittedContext | None] | None:
        """Return the contexts as they stand in the prompts; None where an utterance, or all of them, have none."""
        if batch.contexts is None:
            return None
        return fitted_contexts(self.processor, batch, keep_relevant=self.cfg.context.keep_relevant)

    def prompt_metrics(self, batch: AudioBatch, prompts: Prompts) -> Metrics:
        """Beside the usual: the share of triples, how long contexts are, how many were cut."""
        metrics = super().prompt_metrics(batch, prompts)
        if prompts.contexts is None:
            return metrics
        triples = [fit for fit in prompts.contexts if fit is not None]
        return metrics | {
            "triple_frac": (len(triples), len(batch)),
            "context_tokens": (sum(len(fit.ids) for fit in triples), len(triples)),
            "context_truncated_frac": (sum(fit.is_cut for fit in triples), len(triples)),
        }

    def conditions(self, batch: AudioBatch) -> dict[str, Prompts]:
        """Without a context and, where the set has them, with the first that is stored for each utterance."""
        plain = super().conditions(batch)
        if batch.contexts is None:
            return plain
        fitted = [self.processor.fit_context(context.text if context else None) for context in batch.contexts]
        return plain | {"context_": Prompts(contexts=fitted)}

    def scores(self, batch: AudioBatch, hypotheses: list[str]) -> list[tuple[str, float, float]]:
        """Beside the error rates: the recall of the context's phrases that were said."""
        rates = super().scores(batch, hypotheses)
        if batch.contexts is None:
            return rates
        found = spoken = 0
        for context, text, heard in zip(batch.contexts, batch.texts, hypotheses):
            reference, hypothesis = Tokens(self.normalize(text)), Tokens(self.normalize(heard))
            phrases = [phrase_of(self.normalize(phrase)) for phrase in (context.phrases if context else ())]
            said = [phrase for phrase in phrases if phrase and reference.occurrences(phrase)]
            spoken += len(said)
            found += sum(bool(hypothesis.occurrences(phrase)) for phrase in said)
        return [*rates, ("phrase_recall", found, spoken)]


def fitted_contexts(
    processor: AudioLLMProcessor, batch: AudioBatch, *, keep_relevant: bool
) -> list[FittedContext | None]:
    """Return a batch's contexts cut to what prompts hold, with `keep_relevant` around the phrases that are said."""
    fitted = []
    for context, text in zip(batch.contexts or (), batch.texts):
        keep = _said(context, text) if keep_relevant else ()
        fitted.append(processor.fit_context(context.text if context else None, keep=keep))
    return fitted


def _said(context: UtteranceContext | None, text: str) -> list[str]:
    """Return the phrases of a context that the utterance says."""
    return [phrase for phrase in context.phrases if phrase.lower() in text.lower()] if context else []
