"""A speech encoder on its own: waveforms to 40 ms frames, with the features that it was trained on.

What encoder_pretrain makes, and what layer_probe, cluster_labels and sft start from. Features and encoder travel
together, so that nobody feeds one with another's mean and variance.
Shape letters: B utterances, N samples, T frames of 40 ms, D width.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .assembled import AssembledModel
from .conformer import ConformerConfig, ConformerEncoder
from .features import Fbank, FeatureConfig
from .speech_encoder_config import SpeechEncoderConfig

# What a run that goes on from an encoder brings itself, and what it may change (attention_chunk None: not).
TRAINING_SETTINGS = ("dropout", "activation_checkpointing", "train_attention_chunks")
ATTENTION_SETTINGS = ("attention_chunk", "attention_left_chunks")


class SpeechEncoder(AssembledModel):
    config_class = SpeechEncoderConfig
    main_input_name = "waveforms_BN"
    _keep_in_fp32_modules_strict = {"fbank"}

    def __init__(self, config: SpeechEncoderConfig, *, parts: dict[str, Any] | None = None):
        """Build both parts from the config, but for those given in `parts` under their attribute's name."""
        super().__init__(config)
        parts = parts or {}
        self.fbank: Fbank = parts.get("fbank") or Fbank(FeatureConfig(**config.feature_config))
        self.encoder: ConformerEncoder = parts.get("encoder") or ConformerEncoder(
            ConformerConfig(**config.audio_config)
        )
        self.post_init()

    @classmethod
    def assemble(cls, *, fbank: Fbank, encoder: ConformerEncoder) -> "SpeechEncoder":
        """Join trained or fresh parts. The modules are taken over as they are, not copied."""
        config = SpeechEncoderConfig(feature_config=asdict(fbank.cfg), audio_config=asdict(encoder.cfg))
        return cls(config, parts={"fbank": fbank, "encoder": encoder})

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Return the 40 ms frames of lengths in samples."""
        return self.encoder.output_lengths(self.fbank.output_lengths(lengths_B))

    def forward(
        self, waveforms_BN: Tensor, lengths_B: Tensor, *, return_layers: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[Tensor]]:
        """Return h_BTD and lengths_B, as `ConformerEncoder.forward`, for waveforms in [-1, 1]; lengths in samples."""
        features_BTF, frames_B = self.fbank(waveforms_BN, lengths_B)
        return self.encoder(features_BTF.to(self.dtype), frames_B, return_layers=return_layers)

    @property
    def dtype(self) -> torch.dtype:
        """The encoder's type; features stay float32 (model/features.py says why)."""
        return next(self.encoder.parameters()).dtype

    @classmethod
    def from_pretrained(cls, path: str | Path, *args, **kwargs) -> Any:
        """Load a folder, in float32 unless `dtype` says otherwise: who trains on brings a precision of its own."""
        kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(path, *args, **kwargs)


def require_same_bins(features: FeatureConfig, encoder: ConformerConfig) -> None:
    """Raise ValueError where the encoder would not fit the features."""
    if features.num_mel_bins != encoder.num_mel_bins:
        raise ValueError(
            f"features.num_mel_bins ({features.num_mel_bins}) and encoder.num_mel_bins ({encoder.num_mel_bins}) must "
            "be equal: the encoder reads the features"
        )


def load_speech_encoder(path: str | Path, *, features: FeatureConfig, encoder: ConformerConfig) -> SpeechEncoder:
    """Load the encoder to go on from, with this run's dropout and checkpointing; without weights on the meta device.

    Shapes and features are the artifact's. Where the run's config asks for others, that is a ValueError.
    """
    config = SpeechEncoderConfig.from_pretrained(path)
    config.audio_config |= brought_settings(encoder)
    require_kept("features", features, config.feature_config, made="encoder", path=path)
    require_kept("encoder", encoder, config.audio_config, made="encoder", path=path)
    on_meta = torch.get_default_device().type == "meta"
    return SpeechEncoder(config) if on_meta else SpeechEncoder.from_pretrained(path, config=config)


def brought_settings(encoder: ConformerConfig) -> dict[str, Any]:
    """Return the fields of a trained encoder's config that this run's own take the place of."""
    changed = () if encoder.attention_chunk is None else ATTENTION_SETTINGS
    return {name: getattr(encoder, name) for name in (*TRAINING_SETTINGS, *changed)}


def require_kept(section: str, wanted: Any, found: dict, *, made: str, path: str | Path) -> None:
    """Raise ValueError where dataclass `wanted` asks, by a value that is no default, for other than `found`."""
    default = asdict(type(wanted)())
    for name, value in asdict(wanted).items():
        own = found.get(name, default[name])  # a config may be older than a field
        if value not in (default[name], own):
            raise ValueError(f"{section}.{name} is {value!r} and the {made} {path} was made with {own!r}; leave it out")


def speech_encoder_facts(model: nn.Module) -> dict[str, str | float]:
    """Return what must agree between whoever wrote encoder frames and whoever reads them; `model.fbank` says it all."""
    return {
        "feature_fingerprint": model.fbank.fingerprint(),
        "encoder_frames_per_second": round(250 / model.fbank.cfg.frame_shift_ms, 6),
    }
