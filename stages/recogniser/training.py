"""Training a recogniser on speech and transcripts: what every stage does that makes an acllm.

A stage says what is in the prompt beside the speech (`prompts`), and what else it wants to know of a step (`metrics`)
and of a validation set (`conditions`). Encoder and converter learn, the LLM stays fixed (as in Seed-ASR), unless
`encoder_training` says `frozen` or `llm_training` says `lora` or `full`.
Shape letters: B utterances, N target tokens.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...data.audio_sets import AudioDataConfig
from ...data.augment import KeyedRandom
from ...data.batches import STAND_IN_KEY, PlannedBatches
from ...data.loader import AudioBatch
from ...data.scoring import count_errors, get_normalizer
from ...data.scoring import tokenize as tokenize_text
from ...model.audio_llm import AudioLLM, AudioLLMOutput, acllm_facts
from ...model.audio_llm_config import AudioLLMConfig
from ...model.augment import SpecAugmentConfig
from ...model.conformer import ConformerConfig
from ...model.converter import ConverterConfig
from ...model.ctc import CTCLoss, text_bytes
from ...model.decoding import DecodeConfig
from ...model.features import FeatureConfig
from ...model.llm import LoraSettings, add_lora
from ...model.processor import AudioLLMProcessor, FittedContext
from ...model.prompt import PromptConfig, tokenize
from ...model.speech_encoder import brought_settings, require_kept, require_same_bins
from ..runtime.artifacts import Artifact, ArtifactWriter
from ..runtime.config import TrainingStageConfig
from ..runtime.metrics import Metrics
from ..runtime.stage import StepOutput, on_meta
from ..runtime.train_config import require_choice

ENCODER_TRAINING = ("frozen", "full")
LLM_TRAINING = ("frozen", "lora", "full")
GREEDY = DecodeConfig(context_search="plain")  # for the error rates during training


@dataclass(kw_only=True)
class RecogniserConfig(TrainingStageConfig):
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    specaugment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    encoder: ConformerConfig = field(default_factory=ConformerConfig)
    converter: ConverterConfig = field(default_factory=ConverterConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    language_share: float = 0.5  # of the utterances in a language of prompts.languages, told which one it is
    encoder_training: str = "full"
    llm_training: str = "frozen"
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(r=16))
    ctc_weight: float = 0.0  # of the auxiliary CTC loss on the encoder; 0 builds no CTC head
    decode: DecodeConfig = field(default_factory=DecodeConfig)  # the recogniser's own settings, saved with it
    normalizer: str = "whisper-basic"  # for the error rate during training

    def __post_init__(self):
        require_choice("encoder_training", self.encoder_training, ENCODER_TRAINING)
        require_choice("llm_training", self.llm_training, LLM_TRAINING)
        if self.llm_training == "lora" and self.lora.r == 0:
            raise ValueError("llm_training is lora and lora.r is 0; set the rank, as lora.r=16, or llm_training=frozen")
        if self.decode.ctc_weight and not self.ctc_weight:
            raise ValueError(
                f"decode.ctc_weight is {self.decode.ctc_weight} and ctc_weight is 0, so there is no CTC head to decode "
                "with; set ctc_weight=0.5, or decode.ctc_weight=0"
            )
        if not 0 <= self.language_share <= 1:
            raise ValueError(f"language_share is {self.language_share}; it must be in 0 to 1")
        require_same_bins(self.features, self.encoder)


class Prompts(NamedTuple):
    """What stands in the prompts of a batch beside the speech, an entry for each utterance."""

    contexts: list[FittedContext | None] | None = None
    languages: list[str | None] | None = None

    @property
    def contexts_ids(self) -> list[list[int] | None] | None:
        """The contexts as `AudioLLM` takes them."""
        return None if self.contexts is None else [fit.ids if fit is not None else None for fit in self.contexts]


class RecogniserTraining:
    """Cross-entropy of the transcript given the prompt, plus an optional CTC loss on the encoder."""

    produces = "acllm"
    takes_packed = False  # a recogniser whose weights are integers
    cfg: RecogniserConfig
    sample_rate: int

    def ready(self, cfg: RecogniserConfig, model: AudioLLM) -> AudioLLM:
        """Finish what `build` has made: adapters where they are wanted."""
        self.cfg, self.normalize = cfg, get_normalizer(cfg.normalizer)
        self.processor, self.tokenizer = model.processor, model.processor.tokenizer
        if cfg.llm_training == "lora":
            add_lora(model.llm, cfg.lora)
        return model

    def go_on(self, cfg: RecogniserConfig, acllm: Artifact) -> AudioLLM:
        """Load the recogniser to go on from, with this run's SpecAugment, dropout, checkpointing and new languages.

        Shapes, features and prompts are the recogniser's. Where cfg asks for others, that is a ValueError.
        """
        config = _continued_config(cfg, AudioLLMConfig.from_pretrained(acllm.path), path=acllm.path)
        if getattr(config, "quantization_config", None) and not self.takes_packed:
            raise ValueError(
                f"{acllm.path} is packed, its weights are integers, and stage {cfg.stage} would train what is left; "
                "give the recogniser that was quantised, or train the scales with stage quant_finetune"
            )
        self.sample_rate = config.feature_config["sample_rate"]
        if not on_meta():
            model = AudioLLM.from_pretrained(acllm.path, config=config, dtype=llm_dtype(cfg))
        else:
            model = AudioLLM(config)
            (model.llm if config.acoustic_dtype == "float32" else model).to(llm_dtype(cfg))  # as loading does
            model.processor = AudioLLMProcessor.from_pretrained(acllm.path)
        if cfg.prompts.languages:
            prompts = model.processor.prompts
            model.set_prompts(replace(prompts, languages=prompts.languages | cfg.prompts.languages))
        if cfg.decode != DecodeConfig():
            model.config.decode = asdict(cfg.decode)  # else it keeps its own
        return model

    def trainable(self, parameter_name: str) -> str | None:
        part = parameter_name.split(".")[0]
        if part == "ctc_head" and self.cfg.ctc_weight == 0:
            return None  # a recogniser gone on from may have one; without its loss only weight decay would move it
        if part == "encoder" and self.cfg.encoder_training == "frozen":
            return None
        if part != "llm":
            return part
        if self.cfg.llm_training == "lora":
            return "lora" if "lora_" in parameter_name else None
        return "llm" if self.cfg.llm_training == "full" else None

    def batches(self, cfg: RecogniserConfig, split: str) -> PlannedBatches | dict[str, PlannedBatches]:
        if split == "train":
            return cfg.data.training(seed=cfg.seed, **self.limits(cfg))
        return cfg.data.validation(**self.limits(cfg))

    def limits(self, cfg: RecogniserConfig) -> dict[str, Any]:
        return {
            "micro_batch_seconds": cfg.train.micro_batch_seconds,
            "micro_batches": cfg.train.micro_batches,
            "sample_rate": self.sample_rate,
            "require_text": True,
        }

    def count(self, batch: AudioBatch) -> int:
        return self.target_tokens(batch)

    def target_tokens(self, batch: AudioBatch) -> int:
        """Return the number of transcript and end tokens."""
        return sum(len(ids) + 1 for ids in self.transcripts(batch))

    def transcripts(self, batch: AudioBatch) -> list[list[int]]:
        return [tokenize(self.tokenizer, text) for text in batch.texts]

    # ---- the loss

    def prompts(self, batch: AudioBatch) -> Prompts:
        """Say what a batch is trained with beside its speech: the names of some languages."""
        known = self.processor.prompts.languages
        if not known:
            return Prompts()

        def told(key: str, tag: str) -> bool:
            random = KeyedRandom(self.cfg.seed, epoch=batch.epoch, key=f"language\n{key}")
            return tag in known and random.uniform() < self.cfg.language_share

        tags = zip(batch.keys, _languages(batch))
        return Prompts(languages=[tag if told(key, tag) else None for key, tag in tags])

    def loss(self, model: nn.Module, batch: AudioBatch) -> StepOutput:
        prompts = self.prompts(batch)
        out = self.hear(model, batch, prompts)
        return StepOutput(self.loss_sum(out), self.metrics(out, batch, prompts))

    def hear(
        self, model: nn.Module, batch: AudioBatch, prompts: Prompts, *, ctc: bool = True, return_product: bool = False
    ) -> AudioLLMOutput:
        """Run the model on a batch and its transcripts; `ctc`: with the CTC head's loss where that has a weight."""
        return model(
            batch.waveforms_BN,
            batch.lengths_B,
            self.transcripts(batch),
            prompts.contexts_ids,
            languages=prompts.languages,
            ctc_targets=[text_bytes(text) for text in batch.texts] if ctc and self.cfg.ctc_weight else None,
            return_product=return_product,
        )

    def loss_sum(self, out: AudioLLMOutput) -> Tensor:
        return out.loss_sum if out.ctc is None else out.loss_sum + self.cfg.ctc_weight * out.ctc.loss_sum

    def metrics(self, out: AudioLLMOutput, batch: AudioBatch, prompts: Prompts) -> Metrics:
        """Return the metrics of a step."""
        metrics: Metrics = {"nll": (out.loss_sum.detach(), out.count), "token_acc": (out.correct, out.count)}
        metrics |= self.prompt_metrics(batch, prompts)
        return metrics | (self.ctc_metrics(out.ctc, batch) if out.ctc is not None else {})

    def prompt_metrics(self, batch: AudioBatch, prompts: Prompts) -> Metrics:
        """Return what is logged of what stands in the prompts beside the speech."""
        if prompts.languages is None:
            return {}
        known = self.processor.prompts.languages
        unknown = sum(tag != "" and tag not in known for tag in _languages(batch))
        return {
            "language_told_frac": (sum(map(bool, prompts.languages)), len(batch)),
            "language_unknown_frac": (unknown, len(batch)),
        }

    def ctc_metrics(self, ctc: CTCLoss, batch: AudioBatch) -> Metrics:
        """Nats per token of the LLM, as the loss beside it, and the share of utterances left out."""
        return {
            "ctc_loss": (ctc.loss_sum.detach(), self.target_tokens(batch)),
            "ctc_too_short_frac": (ctc.too_short, len(batch)),
        }

    # ---- how well it does

    def conditions(self, batch: AudioBatch) -> dict[str, Prompts]:
        """Return the prompts that a validation batch is decoded with, by the prefix of their metrics."""
        return {"": Prompts()}

    @torch.no_grad()
    def evaluate(self, model: AudioLLM, batches: Iterable[AudioBatch]) -> dict[str, tuple[float, float]]:
        """Loss, word and character error rates of greedy decoding, and those of the CTC head where it is trained."""
        sums: dict[str, tuple[float, float]] = {}

        def add(name: str, value: float, count: float) -> None:
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + count)

        for batch in batches:
            if batch.keys == [STAND_IN_KEY]:
                continue  # there is nothing in it, or nothing that could be read
            heard = {}
            for prefix, prompts in self.conditions(batch).items():
                given = {"contexts_ids": prompts.contexts_ids, "languages": prompts.languages}
                out = model(batch.waveforms_BN, batch.lengths_B, self.transcripts(batch), **given)
                nbests = model.transcribe_ids(batch.waveforms_BN, batch.lengths_B, config=GREEDY, **given)
                heard[prefix] = [model.processor.decode(best.ids) for best, *_ in nbests]
                add(f"{prefix}loss", out.loss_sum.item(), out.count)
            if self.cfg.ctc_weight:
                heard["ctc_"] = model.ctc_texts(batch.waveforms_BN, batch.lengths_B)
            for prefix, hypotheses in heard.items():
                for name, errors, count in self.scores(batch, hypotheses):
                    add(f"{prefix}{name}", errors, count)
            for name, (value, count) in self.beyond_greedy(model, batch).items():
                add(name, float(value), float(count))
        return sums

    def beyond_greedy(self, model: AudioLLM, batch: AudioBatch) -> dict[str, tuple[Any, Any]]:
        """Return what else a stage measures on a validation batch."""
        return {}

    def scores(self, batch: AudioBatch, hypotheses: list[str]) -> list[tuple[str, float, float]]:
        """Return the (name, sum, count) of what one set of hypotheses is measured by."""
        texts = [(self.normalize(said), self.normalize(heard)) for said, heard in zip(batch.texts, hypotheses)]
        return [("wer", *_error_rate(texts, unit="word")), ("cer", *_error_rate(texts, unit="char"))]

    def export(self, model: AudioLLM, writer: ArtifactWriter) -> None:
        model.save_pretrained(writer.path)
        writer.facts |= acllm_facts(model)


def _languages(batch: AudioBatch) -> list[str]:
    """Return each utterance's language tag; "" where it has none."""
    return [tag if isinstance(tag := meta.get("lang"), str) else "" for meta in batch.meta]


def _error_rate(texts: list[tuple[str, str]], *, unit: str) -> tuple[int, int]:
    """Return errors and reference tokens of (reference, hypothesis) pairs."""
    counts = [count_errors(tokenize_text(reference, unit), tokenize_text(heard, unit)) for reference, heard in texts]
    return sum(c.errors for c in counts), sum(c.reference_tokens for c in counts)


def llm_dtype(cfg: RecogniserConfig) -> torch.dtype:
    return torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32


def _continued_config(cfg: RecogniserConfig, config: AudioLLMConfig, *, path: Path) -> AudioLLMConfig:
    config.specaugment_config = asdict(cfg.specaugment)
    config.audio_config |= brought_settings(cfg.encoder)
    kept = {
        "features": (cfg.features, config.feature_config),
        "encoder": (cfg.encoder, config.audio_config),
        "converter": (cfg.converter, config.converter_config),
        "prompts": (replace(cfg.prompts, languages={}), config.prompts | {"languages": {}}),  # they are added to it
    }
    for section, (wanted, found) in kept.items():
        require_kept(section, wanted, found, made="recogniser", path=path)
    if cfg.ctc_weight > 0 and not config.ctc:
        raise ValueError(f"ctc_weight is {cfg.ctc_weight} and the recogniser {path} has no CTC head; set ctc_weight=0")
    return config
