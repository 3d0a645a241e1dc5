"""The config of an audio LLM: one JSON file that rebuilds every part of it.

It stands apart from the model so that `AutoConfig` can be registered while transformers is still being imported.
The parts keep their own dataclasses as schema; here they are plain dicts, as JSON has them.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class AudioLLMConfig(PreTrainedConfig):
    """`text_config` is the LLM's own config. `prompt_tokens` are the ids of the prompt's fixed parts.

    `ctc` says whether there is a CTC head on the encoder. `acoustic_dtype` is the storage type of encoder, converter
    and CTC head, which may differ from the LLM's (`dtype`). `decode` are the settings (model/decoding.py) by which it
    transcribes where nothing else is asked for. `reads_contexts` says that it has been trained with contexts.
    """

    model_type = "seedling_acllm"
    has_no_defaults_at_init = True

    def __init__(
        self,
        *,
        text_config: Any = None,
        feature_config: dict | None = None,
        audio_config: dict | None = None,
        converter_config: dict | None = None,
        specaugment_config: dict | None = None,
        prompts: dict | None = None,
        prompt_tokens: dict | None = None,
        ctc: bool = False,
        acoustic_dtype: str = "float32",
        decode: dict | None = None,
        reads_contexts: bool = False,
        **kwargs,
    ):
        if isinstance(text_config, dict):
            from transformers import AutoConfig

            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.feature_config = feature_config or {}
        self.audio_config = audio_config or {}
        self.converter_config = converter_config or {}
        self.specaugment_config = specaugment_config or {}
        self.prompts = prompts or {}
        self.prompt_tokens = prompt_tokens or {}
        self.ctc = ctc
        self.acoustic_dtype = acoustic_dtype
        self.decode = decode or {}
        self.reads_contexts = reads_contexts
        if text_config is not None:
            # Whoever asks the outer config about the vocabulary or tied weights means the LLM's.
            kwargs["tie_word_embeddings"] = getattr(text_config, "tie_word_embeddings", False)
        super().__init__(**kwargs)
