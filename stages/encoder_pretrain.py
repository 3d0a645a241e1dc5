"""encoder_pretrain: self-supervised training of the encoder by masked prediction, on audio without text.

Iteration 1 predicts codes of a random projection (BEST-RQ); with `inputs.labeler` the labels are clusters of an earlier
encoder's frames (HuBERT, Seed-ASR's second iteration), read from its sidecar shards or computed on the fly. Both come
from the clean audio of the whole utterance. The encoder is fresh in every iteration, unless `inputs.encoder` names one.

Shape letters: B utterances, L label frames of 40 ms, M masked label frames, N codebooks, V codes.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.audio_sets import AudioDataConfig
from ..data.batches import STAND_IN_KEY, PlannedBatches
from ..data.frame_labels import FrameLabels
from ..data.loader import AudioBatch
from ..data.plan import MicroBatch
from ..model.codes import CodeUse, code_use, collapsed
from ..model.conformer import ConformerConfig, ConformerEncoder
from ..model.features import Fbank, FeatureConfig
from ..model.frame_labeler import FrameLabeler
from ..model.masked_prediction import MaskedPrediction, MaskedPredictionOutput
from ..model.masking import MaskConfig, draw_spans
from ..model.random_quantizer import QuantizerConfig, RandomProjectionQuantizer
from ..model.speech_encoder import SpeechEncoder, load_speech_encoder, require_same_bins, speech_encoder_facts
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.config import TrainingStageConfig
from .runtime.metrics import Histogram, Metrics, add_metrics
from .runtime.seeds import micro_batch_seed, seed_forward
from .runtime.stage import StepOutput, on_meta
from .runtime.train_config import require_choice
from .runtime.world import init_world

LABELS = ("sidecar", "on_the_fly")
REMEDY_RANDOM = (
    "look for silence or one repeated sound in data.train, draw other codes (quantizer.seed) or fewer "
    "(quantizer.codebook_size)"
)
REMEDY_CLUSTERS = "fit the clusters on more frames or fewer of them (stage cluster_labels)"
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EncoderPretrainConfig(TrainingStageConfig):
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    encoder: ConformerConfig = field(default_factory=ConformerConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)  # of iteration 1; idle with a labeler
    labels: str = "sidecar"  # where a labeler's labels come from; on_the_fly costs its forward pass in every step
    cmvn_batches: int = 20  # micro-batches of training audio that the features' mean and variance are taken from

    def __post_init__(self):
        require_choice("labels", self.labels, LABELS)
        require_same_bins(self.features, self.encoder)


@dataclass(kw_only=True)
class MaskedBatch(AudioBatch):
    """Audio and what of it is hidden: mask_BL, and masked_M, the true places in it when flattened."""

    mask_BL: Tensor
    masked_M: Tensor


class MaskedAudio(Dataset):
    """Adds masks to the batches of another dataset, as a function of (seed, micro-batch, lengths): in the workers."""

    def __init__(self, audio: Dataset, *, features: FeatureConfig, mask: MaskConfig, seed: int):
        self.audio, self.fbank, self.mask, self.seed = audio, Fbank(features), mask, seed

    def __getitem__(self, micro_batch: MicroBatch) -> MaskedBatch:
        batch = self.audio[micro_batch]
        lengths_B = ConformerEncoder.output_lengths(self.fbank.output_lengths(batch.lengths_B))
        seed = micro_batch_seed(self.seed, batch.index, purpose="mask")
        mask_BL = draw_spans(lengths_B, self.mask, seed=seed)
        if batch.keys == [STAND_IN_KEY]:
            mask_BL = torch.zeros_like(mask_BL)  # there is nothing in it to learn
        elif batch.labels_BT is not None:
            _require_equal_lengths(batch, lengths_B)
        masked_M = mask_BL.flatten().nonzero()[:, 0]
        return MaskedBatch(**vars(batch), mask_BL=mask_BL, masked_M=masked_M)


class EncoderPretrain:
    """Cross-entropy of the codes of masked frames: summed over frames, the mean over codebooks."""

    consumes = {
        "encoder": ArtifactSpec("speech_encoder", required=False),
        "labeler": ArtifactSpec("frame_labeler", required=False),
    }
    produces = "speech_encoder"
    Config = EncoderPretrainConfig

    def build(self, cfg: EncoderPretrainConfig, inputs: dict[str, Artifact]) -> MaskedPrediction:
        self.cfg, self.warned = cfg, False
        self.sidecar: FrameLabels | None = None
        self.labeler: FrameLabeler | None = None
        self.given = inputs.get("labeler")
        if self.given is None and cfg.labels != EncoderPretrainConfig.labels:
            raise ValueError(f"labels is {cfg.labels} and there is no inputs.labeler that they could come from; set it")
        speech = self._speech_encoder(cfg, inputs.get("encoder"))
        self.features = speech.fbank.cfg
        if self.given is None:
            quantizer = RandomProjectionQuantizer(cfg.quantizer, num_mel_bins=self.features.num_mel_bins)
            self.num_codes, self.targets = cfg.quantizer.codebook_size, quantizer.fingerprint()
        else:
            quantizer, self.targets = None, str(self.given.hash)
            self._open_labels(self.given)
        self._check_augmentation()
        return MaskedPrediction(
            fbank=speech.fbank,
            encoder=speech.encoder,
            mask=cfg.mask,
            codebook_size=self.num_codes,
            quantizer=quantizer,
        )

    def _speech_encoder(self, cfg: EncoderPretrainConfig, pretrained: Artifact | None) -> SpeechEncoder:
        if pretrained:
            return load_speech_encoder(pretrained.path, features=cfg.features, encoder=cfg.encoder)
        fbank = Fbank(cfg.features)
        if not on_meta():
            some_audio = cfg.data.training(seed=cfg.seed, **self._limits(cfg.features)).first(cfg.cmvn_batches)
            fbank.estimate_cmvn((batch.waveforms_BN, batch.lengths_B) for batch in some_audio)
        return SpeechEncoder.assemble(fbank=fbank, encoder=ConformerEncoder(cfg.encoder))

    def _open_labels(self, given: Artifact) -> None:
        given.require_unchanged_inputs(wanted_by="stage encoder_pretrain")
        self.num_codes = given.facts["clusters"]
        if self.cfg.labels == "sidecar":
            self.sidecar = FrameLabels.open(given.path / "labels", made_by=given.facts["encoder_manifest"])
        elif not on_meta():
            # No part of the model: DeepSpeed would cast it to bfloat16, and its labels would be others.
            self.labeler = FrameLabeler.from_pretrained(given.path)

    def _check_augmentation(self) -> None:
        augment = self.cfg.data.augment
        if self.sidecar is not None and augment.speed_probability:
            raise ValueError(
                f"data.augment.speed_probability is {augment.speed_probability} and labels=sidecar: labels written "
                "beforehand do not fit audio of another length; set it to 0, or labels=on_the_fly"
            )
        if self.sidecar is None and augment.noise_probability:
            raise ValueError(
                f"data.augment.noise_probability is {augment.noise_probability} and labels are computed from what is "
                "heard, which must be clean; set it to 0, or give a labeler with labels=sidecar"
            )

    def trainable(self, parameter_name: str) -> str | None:
        return parameter_name.split(".")[0]

    def batches(self, cfg: EncoderPretrainConfig, split: str) -> PlannedBatches | dict[str, PlannedBatches]:
        limits = self._limits(self.features) | {"labels": self.sidecar}
        if split == "train":
            return self._masked(cfg.data.training(seed=cfg.seed, **limits), seed=cfg.seed)
        # The same masks in every run: values compare.
        return {name: self._masked(data, seed=0) for name, data in cfg.data.validation(**limits).items()}

    def _limits(self, features: FeatureConfig) -> dict:
        return {
            "micro_batch_seconds": self.cfg.train.micro_batch_seconds,
            "micro_batches": self.cfg.train.micro_batches,
            "sample_rate": features.sample_rate,
            "require_text": False,
        }

    def _masked(self, data: PlannedBatches, *, seed: int) -> PlannedBatches:
        dataset = MaskedAudio(data.dataset, features=self.features, mask=self.cfg.mask, seed=seed)
        return PlannedBatches(data.plan, dataset, targets=self.targets)

    def count(self, batch: MaskedBatch) -> int:
        return len(batch.masked_M)

    def loss(self, model: torch.nn.Module, batch: MaskedBatch) -> StepOutput:
        out = self._predict(model, batch)
        return StepOutput(out.loss_sum, self._metrics(out, self.count(batch), prefix="ssl/"))

    def _predict(self, model: torch.nn.Module, batch: MaskedBatch) -> MaskedPredictionOutput:
        return model(
            batch.waveforms_BN,
            batch.lengths_B,
            mask_BL=batch.mask_BL,
            masked_M=batch.masked_M,
            labels_BLN=self._labels(batch),
        )

    def _labels(self, batch: MaskedBatch) -> Tensor | None:
        """Return given labels_BLN, or None where the model's quantizer makes them."""
        if self.labeler is not None:
            labels_BL, _ = self.labeler.to(batch.waveforms_BN.device)(batch.waveforms_BN, batch.lengths_B)
            return labels_BL[..., None]
        if self.given is not None and self.sidecar is None:
            return torch.zeros_like(batch.mask_BL, dtype=torch.int64)[..., None]  # only measured: any labels will do
        return None if batch.labels_BT is None else batch.labels_BT[..., None]

    def _metrics(self, out: MaskedPredictionOutput, count: int, *, prefix: str) -> Metrics:
        return {
            f"{prefix}mask_acc": (out.correct_N.sum(), count * len(out.correct_N)),
            f"{prefix}codes": Histogram(out.code_counts_NV, partial(self._describe, prefix=prefix)),
        }

    def _describe(self, counts_NV: Tensor, *, prefix: str) -> dict[str, float]:
        """Return how the codes are used, means over codebooks."""
        use = code_use(counts_NV)
        numbers = {
            "unigram_acc": use.most_frequent_N,
            "codebook_entropy": use.entropy_N,
            "target_perplexity": use.perplexity_N,
            "code_usage": use.usage_N,
        }
        values = {f"{prefix}{name}": value_N.mean().item() for name, value_N in numbers.items()}
        if len(use.usage_N) > 1:
            values |= {f"{prefix}code_usage/{n}": usage for n, usage in enumerate(use.usage_N.tolist())}
        self._warn_if_collapsed(use)
        return values

    def _warn_if_collapsed(self, use: CodeUse) -> None:
        found = collapsed(use)
        if not found or self.warned or not init_world().is_main:
            return
        self.warned = True
        log.warning(
            f"codes collapse: over {use.frames} frames, codebook {found[0]} is used as if it had "
            f"{use.perplexity_N[found[0]]:.0f} of its {self.num_codes} codes, so that guessing is easy and teaches "
            f"little; {REMEDY_RANDOM if self.given is None else REMEDY_CLUSTERS}"
        )

    @torch.no_grad()
    def evaluate(self, model: MaskedPrediction, batches: Iterable[MaskedBatch]) -> Metrics:
        """Loss and accuracy under fixed masks and noise, beside what guessing the most frequent code would get."""
        sums: Metrics = {"loss": (0.0, 0)} | self._metrics(model.no_output(), 0, prefix="")  # a rank may have no batch
        for batch in batches:
            if batch.keys == [STAND_IN_KEY]:
                continue  # nothing in it could be read; the trainer has named it
            with torch.random.fork_rng():
                seed_forward(0, batch.index)
                out = self._predict(model, batch)
            count = self.count(batch)
            add_metrics(sums, {"loss": (out.loss_sum, count)} | self._metrics(out, count, prefix=""))
        return sums

    def export(self, model: MaskedPrediction, writer: ArtifactWriter) -> None:
        speech = model.speech_encoder()
        speech.save_pretrained(writer.path)
        if model.quantizer is not None:
            model.quantizer.save(writer.path / "quantizer.safetensors")
        writer.facts |= speech_encoder_facts(speech) | {"targets": self.targets, "num_codes": self.num_codes}


def _require_equal_lengths(batch: AudioBatch, lengths_B: Tensor) -> None:
    for key, labels, frames in zip(batch.keys, batch.label_lengths_B.tolist(), lengths_B.tolist()):
        if labels != frames:
            raise ValueError(
                f"{key} has {labels} labels and {frames} encoder frames: they were made with other features; make them "
                "again with this run's features (stage cluster_labels)"
            )
