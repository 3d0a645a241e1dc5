"""context_sft: teaches a recogniser to use a context, on triples of context, speech and text among ordinary pairs.

Goes on from a recogniser (`inputs.acllm`) as sft would. Pairs keep it as good as it was without a context; irrelevant
and conflicting contexts among the triples keep it listening (Seed-ASR's context SFT; the shares are ours, the paper's
are unknown).
Shape letters: N target tokens.
"""

import torch

from ..data.batches import PlannedBatches
from ..data.loader import AudioBatch
from ..model.audio_llm import AudioLLMOutput
from .recogniser.contextual import ContextualConfig, ContextualTraining
from .recogniser.training import Prompts
from .runtime.metrics import Metrics


class ContextSFT(ContextualTraining):
    """Cross-entropy of the transcript given [instruction | context | speech] or [instruction | speech]."""

    Config = ContextualConfig

    def batches(self, cfg: ContextualConfig, split: str) -> PlannedBatches | dict[str, PlannedBatches]:
        if split == "train" and not any(cfg.contexts):
            raise ValueError("contexts is empty; name a sidecar for each folder in data.train, as contexts=[DIR]")
        return super().batches(cfg, split)

    def metrics(self, out: AudioLLMOutput, batch: AudioBatch, prompts: Prompts) -> Metrics:
        """Beside the usual: the loss on triples and on pairs apart."""
        assert prompts.contexts is not None, "`prompts` has fitted them"
        in_triple_N = torch.tensor([fit is not None for fit in prompts.contexts], device=out.rows_N.device)[out.rows_N]
        nll_N = out.nll_N.detach()
        return super().metrics(out, batch, prompts) | {
            "nll_triples": ((nll_N * in_triple_N).sum(), in_triple_N.sum()),
            "nll_pairs": ((nll_N * ~in_triple_N).sum(), (~in_triple_N).sum()),
        }
