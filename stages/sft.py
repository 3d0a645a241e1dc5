"""sft: supervised fine-tuning of the audio-conditioned LLM on pairs of speech and transcript.

Encoder and converter learn, the LLM stays fixed (as in Seed-ASR), unless `llm_training` says `lora` or `full`.
Starts from an LLM folder and a fresh or a pretrained encoder (`inputs.encoder`), or goes on from a finished recogniser
(`inputs.acllm`).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.audio_sets import AudioDataConfig
from ..data.batches import STAND_IN_KEY, PlannedBatches
from ..data.loader import AudioBatch
from ..data.scoring import count_errors, get_normalizer
from ..data.scoring import tokenize as tokenize_text
from ..model.audio_llm import AudioLLM, acllm_facts
from ..model.audio_llm_config import AudioLLMConfig
from ..model.augment import SpecAugmentConfig
from ..model.conformer import ConformerConfig, ConformerEncoder
from ..model.converter import ConverterConfig
from ..model.ctc import CTCLoss, text_bytes
from ..model.decoding import DecodeConfig
from ..model.features import Fbank, FeatureConfig
from ..model.llm import LoraSettings, add_lora, load_llm, load_tokenizer
from ..model.processor import AudioLLMProcessor
from ..model.prompt import PromptConfig, tokenize
from ..model.speech_encoder import (
    SpeechEncoder,
    brought_settings,
    load_speech_encoder,
    require_kept,
    require_same_bins,
)
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.config import TrainingStageConfig
from .runtime.stage import StepOutput, on_meta
from .runtime.train_config import require_choice

LLM_TRAINING = ("frozen", "lora", "full")


@dataclass(kw_only=True)
class SFTConfig(TrainingStageConfig):
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    specaugment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    encoder: ConformerConfig = field(default_factory=ConformerConfig)
    converter: ConverterConfig = field(default_factory=ConverterConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    llm_training: str = "frozen"
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(r=16))
    ctc_weight: float = 0.0  # of the auxiliary CTC loss on the encoder; 0 builds no CTC head
    # Steps at the start that train the encoder by CTC alone. There is nothing yet for an LLM to listen to, and it would
    # cost a third of the time of a small encoder's step.
    ctc_steps: int = 0
    decode: DecodeConfig = field(default_factory=DecodeConfig)  # the recogniser's own settings, saved with it
    cmvn_batches: int = 20  # micro-batches of training audio that the features' mean and variance are taken from
    normalizer: str = "whisper-basic"  # for the error rate during training

    def __post_init__(self):
        require_choice("llm_training", self.llm_training, LLM_TRAINING)
        if self.llm_training == "lora" and self.lora.r == 0:
            raise ValueError("llm_training is lora and lora.r is 0; set the rank, as lora.r=16, or llm_training=frozen")
        if self.ctc_steps and not self.ctc_weight:
            raise ValueError(
                f"ctc_steps is {self.ctc_steps} and ctc_weight is 0: nothing would learn; set ctc_weight=0.5"
            )
        if self.decode.ctc_weight and not self.ctc_weight:
            raise ValueError(
                f"decode.ctc_weight is {self.decode.ctc_weight} and ctc_weight is 0, so there is no CTC head to decode "
                "with; set ctc_weight=0.5, or decode.ctc_weight=0"
            )
        require_same_bins(self.features, self.encoder)


class SFT:
    """Cross-entropy of the transcript given [instruction | speech], plus an optional CTC loss on the encoder."""

    consumes = {
        "llm": ArtifactSpec("llm", required=False, foreign=True),
        "encoder": ArtifactSpec("speech_encoder", required=False),
        "acllm": ArtifactSpec("acllm", required=False),
    }
    produces = "acllm"
    Config = SFTConfig

    def build(self, cfg: SFTConfig, inputs: dict[str, Artifact]) -> AudioLLM:
        self.cfg, self.normalize = cfg, get_normalizer(cfg.normalizer)
        model = self._continued(cfg, inputs) if "acllm" in inputs else self._fresh(cfg, inputs)
        if "acllm" not in inputs or cfg.decode != DecodeConfig():
            model.config.decode = asdict(cfg.decode)  # else the recogniser gone on from keeps its own
        self.tokenizer = model.processor.tokenizer
        if cfg.llm_training == "lora":
            add_lora(model.llm, cfg.lora)
        return model

    def _continued(self, cfg: SFTConfig, inputs: dict[str, Artifact]) -> AudioLLM:
        others = sorted(set(inputs) - {"acllm"})
        if others:
            raise ValueError(f"inputs.acllm already holds an encoder and an LLM; leave out inputs.{others[0]}")
        path = inputs["acllm"].path
        config = _continued_config(cfg, AudioLLMConfig.from_pretrained(path), path=path)
        self.sample_rate = config.feature_config["sample_rate"]
        if not on_meta():
            return AudioLLM.from_pretrained(path, config=config, dtype=_llm_dtype(cfg))
        model = AudioLLM(config)
        model.processor = AudioLLMProcessor.from_pretrained(path)
        return model

    def _fresh(self, cfg: SFTConfig, inputs: dict[str, Artifact]) -> AudioLLM:
        if "llm" not in inputs:
            raise ValueError(
                "sft needs an LLM: set inputs.llm to a Hugging Face folder, or inputs.acllm to go on from one"
            )
        speech = self._speech_encoder(cfg, inputs.get("encoder"))
        return AudioLLM.assemble(
            encoder=speech.encoder,
            llm=load_llm(inputs["llm"].path, dtype=_llm_dtype(cfg), meta=on_meta()),
            tokenizer=load_tokenizer(inputs["llm"].path),
            fbank=speech.fbank,
            converter=cfg.converter,
            specaugment=cfg.specaugment,
            prompts=cfg.prompts,
            ctc=cfg.ctc_weight > 0,
        )

    def _speech_encoder(self, cfg: SFTConfig, pretrained: Artifact | None) -> SpeechEncoder:
        if pretrained:
            speech = load_speech_encoder(pretrained.path, features=cfg.features, encoder=cfg.encoder)
            self.sample_rate = speech.fbank.cfg.sample_rate
            return speech
        self.sample_rate = cfg.features.sample_rate
        fbank = Fbank(cfg.features)
        if not on_meta():
            some_audio = self.batches(cfg, "train").first(cfg.cmvn_batches)
            fbank.estimate_cmvn((batch.waveforms_BN, batch.lengths_B) for batch in some_audio)
        return SpeechEncoder.assemble(fbank=fbank, encoder=ConformerEncoder(cfg.encoder))

    def trainable(self, parameter_name: str) -> str | None:
        part = parameter_name.split(".")[0]
        if part == "ctc_head" and self.cfg.ctc_weight == 0:
            return None  # a recogniser gone on from may have one; without its loss only weight decay would move it
        if part != "llm":
            return part
        if self.cfg.llm_training == "lora":
            return "lora" if "lora_" in parameter_name else None
        return "llm" if self.cfg.llm_training == "full" else None

    def batches(self, cfg: SFTConfig, split: str) -> PlannedBatches | dict[str, PlannedBatches]:
        if split == "train":
            return cfg.data.training(seed=cfg.seed, **self._limits(cfg))
        return cfg.data.validation(**self._limits(cfg))

    def _limits(self, cfg: SFTConfig) -> dict[str, Any]:
        return {
            "micro_batch_seconds": cfg.train.micro_batch_seconds,
            "micro_batches": cfg.train.micro_batches,
            "sample_rate": self.sample_rate,
            "require_text": True,
        }

    def count(self, batch: AudioBatch) -> int:
        return sum(len(ids) + 1 for ids in self._tokenize(batch))

    def loss(self, model: nn.Module, batch: AudioBatch) -> StepOutput:
        ctc_targets = [text_bytes(text) for text in batch.texts] if self.cfg.ctc_weight else None
        if batch.index < self.cfg.ctc_steps * self.cfg.train.micro_batches:
            ctc = model.ctc_loss(batch.waveforms_BN, batch.lengths_B, ctc_targets)
            return StepOutput(self.cfg.ctc_weight * ctc.loss_sum, self._ctc_metrics(ctc, batch))
        out = model(batch.waveforms_BN, batch.lengths_B, self._tokenize(batch), ctc_targets=ctc_targets)
        metrics = {"nll": (out.loss_sum.detach(), out.count), "token_acc": (out.correct, out.count)}
        loss_sum = out.loss_sum
        if out.ctc is not None:
            loss_sum = loss_sum + self.cfg.ctc_weight * out.ctc.loss_sum
            metrics |= self._ctc_metrics(out.ctc, batch)
        return StepOutput(loss_sum, metrics)

    def _ctc_metrics(self, ctc: CTCLoss, batch: AudioBatch) -> dict[str, tuple[object, object]]:
        """Nats per token of the LLM, as the loss beside it, and the share of utterances left out."""
        return {
            "ctc_loss": (ctc.loss_sum.detach(), self.count(batch)),
            "ctc_too_short_frac": (ctc.too_short, len(batch)),
        }

    @torch.no_grad()
    def evaluate(self, model: AudioLLM, batches: Iterable[AudioBatch]) -> dict[str, tuple[float, float]]:
        """Loss, word and character error rates of greedy decoding, and those of the CTC head where it is trained."""
        sums: dict[str, list[float]] = {"loss": [0.0, 0], "wer": [0.0, 0], "cer": [0.0, 0]}
        if self.cfg.ctc_weight:
            sums |= {"ctc_wer": [0.0, 0], "ctc_cer": [0.0, 0]}
        for batch in batches:
            if batch.keys == [STAND_IN_KEY]:
                continue  # there is nothing in it, or nothing that could be read
            out = model(batch.waveforms_BN, batch.lengths_B, self._tokenize(batch))
            nbests = model.transcribe_ids(batch.waveforms_BN, batch.lengths_B, config=DecodeConfig())
            heard = {"": [model.processor.decode(best.ids) for best, *_ in nbests]}
            if self.cfg.ctc_weight:
                heard["ctc_"] = model.ctc_texts(batch.waveforms_BN, batch.lengths_B)
            found = [("loss", out.loss_sum.item(), out.count)]
            for prefix, hypotheses in heard.items():
                texts = [(self.normalize(said), self.normalize(text)) for said, text in zip(batch.texts, hypotheses)]
                found.append((f"{prefix}wer", *_error_rate(texts, unit="word")))
                found.append((f"{prefix}cer", *_error_rate(texts, unit="char")))
            for name, value, count in found:
                sums[name][0] += value
                sums[name][1] += count
        return {name: tuple(pair) for name, pair in sums.items()}

    def export(self, model: AudioLLM, writer: ArtifactWriter) -> None:
        model.save_pretrained(writer.path)
        writer.facts |= acllm_facts(model)

    def _tokenize(self, batch: AudioBatch) -> list[list[int]]:
        return [tokenize(self.tokenizer, text) for text in batch.texts]


def _error_rate(texts: list[tuple[str, str]], *, unit: str) -> tuple[int, int]:
    """Return errors and reference tokens of (reference, hypothesis) pairs."""
    counts = [count_errors(tokenize_text(reference, unit), tokenize_text(heard, unit)) for reference, heard in texts]
    return sum(c.errors for c in counts), sum(c.reference_tokens for c in counts)


def _llm_dtype(cfg: SFTConfig) -> torch.dtype:
    return torch.float32 if cfg.train.precision == "fp32" else torch.bfloat16


def _continued_config(cfg: SFTConfig, config: AudioLLMConfig, *, path: Path) -> AudioLLMConfig:
    """Return the recogniser's config with this run's training settings: SpecAugment, dropout, checkpointing.

    Shapes, features and prompts are the recogniser's. Where cfg asks for others, that is an error and not ignored.
    """
    config.specaugment_config = asdict(cfg.specaugment)
    config.audio_config |= brought_settings(cfg.encoder)
    kept = {
        "features": (cfg.features, config.feature_config),
        "encoder": (cfg.encoder, config.audio_config),
        "converter": (cfg.converter, config.converter_config),
        "prompts": (cfg.prompts, config.prompts),
    }
    for section, (wanted, found) in kept.items():
        require_kept(section, wanted, found, made="recogniser", path=path)
    if cfg.ctc_weight > 0 and not config.ctc:
        raise ValueError(f"ctc_weight is {cfg.ctc_weight} and the recogniser {path} has no CTC head; set ctc_weight=0")
    return config
