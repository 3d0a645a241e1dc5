"""Tiny language models, a tiny tokenizer and tiny audio LLMs, built from the real classes with random weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from seedling.model.audio_llm import AudioLLM
from seedling.model.conformer import ConformerConfig, ConformerEncoder

VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # as spread as a trained model's, so that the prompt matters and no two tokens tie
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2}
CONFIGS: dict[str, Callable] = {
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SHAPE, **EXPERTS, num_local_experts=4, sliding_window=None),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=24),
    # Logits are scaled or capped after the head.
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0, sliding_window=8),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.25),
}


def make_llm(family: str = "llama", *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


def make_encoder(*, dropout: float = 0.0, seed: int = 0) -> ConformerEncoder:
    torch.manual_seed(seed + 1)
    return ConformerEncoder(
        ConformerConfig(
            dim=24, num_layers=1, num_heads=2, conv_kernel=3, subsampling_channels=8, ff_mult=2, dropout=dropout
        )
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end token and no start token, as Qwen's is."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["call Kaitlyn and turn the kitchen light off, transcribe the speech"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def tiny_llm() -> Callable[..., PreTrainedModel]:
    return make_llm


@pytest.fixture
def tiny_encoder() -> Callable[..., ConformerEncoder]:
    return make_encoder


@pytest.fixture
def tiny_audio_llm(tokenizer) -> Callable[..., AudioLLM]:
    """make(family="llama", seed=0, **assemble arguments) -> AudioLLM in evaluation mode"""

    def make(family: str = "llama", *, seed: int = 0, **arguments) -> AudioLLM:
        llm, encoder = make_llm(family, seed=seed), make_encoder(seed=seed)
        model = AudioLLM.assemble(encoder=encoder, llm=llm, tokenizer=tokenizer, **arguments)
        return model.eval()

    return make


@pytest.fixture
def llm_folder(tmp_path, tokenizer) -> Callable[..., Path]:
    """An ordinary Hugging Face folder: weights, config, tokenizer."""

    def make(family: str = "llama") -> Path:
        folder = tmp_path / family
        make_llm(family).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def noise() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """noise(seconds list) -> waveforms_BN, lengths_B"""

    def make(seconds: list[float], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        rows = [0.1 * torch.randn(round(16000 * s), generator=generator) for s in seconds]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])

    return make
