"""The config of a speech encoder on its own; apart from the model, as audio_llm_config.py says why."""

from transformers.configuration_utils import PreTrainedConfig


class SpeechEncoderConfig(PreTrainedConfig):
    """`feature_config` are the fields of FeatureConfig, `audio_config` those of ConformerConfig."""

    model_type = "seedling_speech_encoder"

    def __init__(self, *, feature_config: dict | None = None, audio_config: dict | None = None, **kwargs):
        self.feature_config = feature_config or {}
        self.audio_config = audio_config or {}
        super().__init__(**kwargs)
