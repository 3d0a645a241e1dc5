"""Tiny models that calibration streams through, their batches, and a solver that writes down what it is given."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from seedling.kernels.w2a16.groups import group_count
from seedling.model.audio_llm import AudioLLM
from seedling.model.conformer import ConformerConfig, ConformerEncoder
from seedling.quant.blocks import SpeechPrompts
from seedling.quant.solution import LayerSolution

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, attn_implementation="eager"),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_experts_per_tok=2, num_local_experts=4, sliding_window=None),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, num_experts_per_tok=2, head_dim=8, num_experts=4, moe_intermediate_size=24
    ),
}


def make_llm(family: str, *, seed: int = 0, layers: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(config).eval()


def make_recogniser(*, layers: int = 2) -> AudioLLM:
    """A recogniser that reads letters, with biases that are no zeros."""
    torch.manual_seed(1)
    encoder = ConformerEncoder(
        ConformerConfig(dim=24, num_layers=layers, num_heads=2, conv_kernel=3, subsampling_channels=4, dropout=0.0)
    )
    vocabulary = {token: at for at, token in enumerate(["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyzTHE .:,"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    model = AudioLLM.assemble(encoder=encoder, llm=make_llm("qwen2"), tokenizer=tokenizer, ctc=True)
    model.fbank.set_cmvn(torch.full((80,), 12.0), torch.full((80,), 4.0))
    return model.eval()


def token_batches(count: int = 4, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of three sequences each, padded on the right with tokens that would be seen were they not masked."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        T = int(torch.randint(6, 14, (), generator=generator))
        lengths = torch.randint(2, T + 1, (3, 1), generator=generator)
        batches.append(
            {
                "input_ids": torch.randint(2, 60, (3, T), generator=generator),
                "attention_mask": (torch.arange(T) < lengths).long(),
            }
        )
    return batches


def speech_batches(count: int = 3, *, seed: int = 0) -> list[SpeechPrompts]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for at in range(count):
        rows = [0.1 * torch.randn(size, generator=generator) for size in (6000 + 900 * at, 3000)]
        batches.append(
            SpeechPrompts(
                nn.utils.rnn.pad_sequence(rows, batch_first=True),
                torch.tensor([len(row) for row in rows]),
                [[2, 3, 4], [5]],
            )
        )
    return batches


def reader(batches: list, *, rank: int = 0, size: int = 1):
    """Return what reads a rank's share of the batches."""
    return lambda: ((number, batches[number]) for number in range(rank, len(batches), size))


class GridSolver:
    """Round to nearest on the grid between a group's extremes; notes weights and H in the order of the calls."""

    def __init__(self):
        self.asked: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def __call__(self, weight_NK, hessian_KK, *, bits, group_size, method="default") -> LayerSolution:
        self.asked.append((weight_NK.clone(), hessian_KK))
        K = weight_NK.shape[1]
        g = K if group_size == -1 else group_size
        G = group_count(K, group_size)
        scales, zeros, codes = [], [], []
        for j in range(G):
            part = weight_NK[:, j * g : (j + 1) * g]
            low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
            scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
            scales.append(scale)
            zeros.append(low)
            codes.append(((part - low) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8))
        return LayerSolution(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1), bits, group_size)


def put_on_grid(module: nn.Module, *, bits: int) -> None:
    """Make every linear weight below exactly representable per channel: power-of-two scales, both ends in every row."""
    generator = torch.Generator().manual_seed(5)
    for one in module.modules():
        if type(one) is nn.Linear:
            N, K = one.weight.shape
            codes = torch.randint(0, 2**bits, (N, K), generator=generator)
            codes[:, 0], codes[:, -1] = 0, 2**bits - 1
            scale = 2.0 ** torch.randint(-5, -2, (N, 1), generator=generator)
            one.weight.data = scale * codes - scale * (2 ** (bits - 1))
