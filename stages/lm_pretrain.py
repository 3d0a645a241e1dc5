"""lm_pretrain: a small causal LM and its tokenizer from text, where no LLM can be downloaded.

The result is an ordinary Hugging Face folder (Llama, safetensors, tokenizer); everything downstream treats it as any
other. Besides plain sentences it learns prompted repetition (model/repetition.py), without which it would not listen.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.batches import STAND_IN_KEY, PlannedBatches
from ..data.text import TextBatch, TextCorpus, TextDataset, TextPlan
from ..data.tokenizer import train_bpe
from ..model.prompt import PromptConfig, PromptTokens, special_id, tokenize
from ..model.repetition import RepeatingLM, RepetitionConfig
from .runtime.artifacts import ArtifactWriter
from .runtime.config import TrainingStageConfig
from .runtime.seeds import seed_forward
from .runtime.stage import StepOutput


@dataclass
class SmallLMConfig:
    """A Llama with tied embeddings."""

    vocab_size: int = 1200
    dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    ff_mult: int = 3
    max_positions: int = 2048

    def __post_init__(self):
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"lm.dim ({self.dim}) must be divisible by 2 x lm.num_heads ({self.num_heads})")


@dataclass(kw_only=True)
class LMPretrainConfig(TrainingStageConfig):
    text: list[str]  # UTF-8 files, one sentence a line
    valid_text: list[str] = field(default_factory=list)
    max_tokens: int = 2000  # padded characters of a micro-batch
    lm: SmallLMConfig = field(default_factory=SmallLMConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)  # as the recogniser will be prompted
    repetition: RepetitionConfig = field(default_factory=RepetitionConfig)


class LMPretrain:
    """Next-token prediction on sentences and on prompted repetitions of them."""

    consumes = {}
    produces = "llm"
    Config = LMPretrainConfig

    def build(self, cfg: LMPretrainConfig, inputs: dict) -> RepeatingLM:
        sentences = (line for path in TextCorpus.open(cfg.text).shards for line in _lines(path))
        prompts = [cfg.prompts.instruction, cfg.prompts.instruction_with_context]
        self.tokenizer = train_bpe([*prompts, *sentences], vocab_size=cfg.lm.vocab_size)
        start = special_id(self.tokenizer, "bos")
        assert start is not None, "train_bpe gives a start token"
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=cfg.lm.dim,
                intermediate_size=cfg.lm.ff_mult * cfg.lm.dim,
                num_hidden_layers=cfg.lm.num_layers,
                num_attention_heads=cfg.lm.num_heads,
                num_key_value_heads=cfg.lm.num_heads,
                max_position_embeddings=cfg.lm.max_positions,
                tie_word_embeddings=True,
                # Rows of unit length. At the usual 0.02, which suits widths of thousands, repetition is learnt far
                # later (docs/log.md).
                initializer_range=cfg.lm.dim**-0.5,
                pad_token_id=special_id(self.tokenizer, "pad"),
                bos_token_id=start,
                eos_token_id=special_id(self.tokenizer, "eos"),
            )
        )
        special = set(self.tokenizer.all_special_ids)
        return RepeatingLM(
            llm,
            prompt_tokens=PromptTokens.of(cfg.prompts, tokenizer=self.tokenizer),
            start=start,
            ordinary=[token for token in range(len(self.tokenizer)) if token not in special],
            separator=_separator(self.tokenizer),
            cfg=cfg.repetition,
        )

    def trainable(self, parameter_name: str) -> str | None:
        return "llm"

    def batches(self, cfg: LMPretrainConfig, split: str) -> PlannedBatches | None:
        text = cfg.text if split == "train" else cfg.valid_text
        if not text:
            return None
        corpus = TextCorpus.open(text)
        plan = TextPlan(
            corpus,
            max_tokens=cfg.max_tokens,
            seed=cfg.seed,
            micro_batches_per_step=cfg.train.micro_batches,
            shuffle=split == "train",
        )
        return PlannedBatches(plan, TextDataset(corpus))

    def count(self, batch: TextBatch) -> int:
        return sum(len(ids) + 1 for ids in self._tokenize(batch))

    def loss(self, model: nn.Module, batch: TextBatch) -> StepOutput:
        nll_N, heard_N = model(self._tokenize(batch))
        plain_N = ~heard_N
        metrics = {
            "loss_sentences": ((nll_N * plain_N).sum().detach(), plain_N.sum()),
            "loss_repetitions": ((nll_N * heard_N).sum().detach(), heard_N.sum()),
        }
        return StepOutput(nll_N.sum(), metrics)

    @torch.no_grad()
    def evaluate(self, model: RepeatingLM, batches: Iterable[TextBatch]) -> dict[str, tuple[float, float]]:
        """Nats per token of plain sentences, of the same when they stand in the prompt, and of unclear tokens of these
        without a context and with one that lists them."""
        sums = {name: [0.0, 0] for name in ("loss_sentences", "loss_repetitions", "loss_unclear", "loss_in_context")}
        for batch in batches:
            if batch.keys == [STAND_IN_KEY]:
                continue  # there is nothing in it, or nothing that could be read
            ids = self._tokenize(batch)
            with torch.random.fork_rng():
                seed_forward(0, batch.index)  # the same pseudo speech each time and on any rank: values compare
                clear = model.as_repetitions(ids, has_context=False, is_unclear=False)
                unclear = model.as_repetitions(ids, has_context=False, is_unclear=True)
                listed = model.as_repetitions(ids, has_context=True, is_unclear=True)
                losses = {
                    "loss_sentences": model.losses(ids, [None] * len(ids))[0],
                    "loss_repetitions": model.losses(ids, clear)[0],
                }
                for name, heard in (("loss_unclear", unclear), ("loss_in_context", listed)):
                    nll_N, is_unclear_N = model.losses(ids, heard)
                    losses[name] = nll_N[is_unclear_N]
            for name, nll_N in losses.items():
                sums[name][0] += nll_N.sum().item()
                sums[name][1] += len(nll_N)
        return {name: tuple(pair) for name, pair in sums.items()}

    def export(self, model: RepeatingLM, writer: ArtifactWriter) -> None:
        model.llm.save_pretrained(writer.path)
        self.tokenizer.save_pretrained(writer.path)

    def _tokenize(self, batch: TextBatch) -> list[list[int]]:
        return [tokenize(self.tokenizer, text) for text in batch.texts]


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids between two phrases of a list, as contexts have them: those of `, ` where a word follows."""
    word = tokenize(tokenizer, "a")
    return tokenize(tokenizer, "a, a")[len(word) : -len(word)]


def _lines(path: Path) -> Iterable[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        yield from (line.strip() for line in file if line.strip())
