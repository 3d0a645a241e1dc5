"""Packed layers and models for tests: random solutions, weights rounded to the nearest grid point, tiny real models."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from seedling.kernels.w2a16.groups import group_count
from seedling.model.audio_llm import AudioLLM
from seedling.model.conformer import ConformerConfig, ConformerEncoder
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import replace_module
from seedling.quant.solution import LayerSolution

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 48,  # no multiple of a group of 32
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8, attention_bias=True),
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_experts_per_tok=2, num_local_experts=4, sliding_window=None),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, num_experts_per_tok=2, head_dim=8, num_experts=4, moe_intermediate_size=24
    ),
}


def random_solution(N: int, K: int, *, bits: int, group_size: int, seed: int = 0) -> LayerSolution:
    """Codes over the whole range; scales of both signs; zeros beside them."""
    generator = torch.Generator().manual_seed(seed)
    G = group_count(K, group_size)
    return LayerSolution(
        torch.randint(0, 2**bits, (N, K), generator=generator).to(torch.uint8),
        torch.randn(N, G, generator=generator),
        torch.randn(N, G, generator=generator),
        bits,
        group_size,
    )


def nearest(weight_NK: torch.Tensor, *, bits: int, group_size: int) -> LayerSolution:
    """Round to the grid between each group's extremes."""
    K = weight_NK.shape[1]
    g = K if group_size == -1 else group_size
    scales, zeros, codes = [], [], []
    for part in weight_NK.detach().float().split(g, dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scales.append(((high - low) / (2**bits - 1)).clamp_min(1e-6))
        zeros.append(low)
        codes.append(((part - low) / scales[-1]).round().clamp(0, 2**bits - 1).to(torch.uint8))
    return LayerSolution(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1), bits, group_size)


def pack_all(
    model: nn.Module, *, bits: int = 2, group_size: int = 32, head: bool = False, scale_dtype=torch.bfloat16
) -> dict[str, nn.Linear]:
    """Pack every nn.Linear (not the head); return what they were, with the packed layer's weight, by name."""
    output = model.get_output_embeddings()
    before = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (head or module is not output):
            solution = nearest(module.weight, bits=bits, group_size=group_size)
            packed = PackedLinear.from_solution(solution, bias=module.bias, scale_dtype=scale_dtype)
            replace_module(model, name, packed)
            module.weight = nn.Parameter(packed.dequantised_NK())
            before[name] = module
    return before


def make_llm(family: str, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def make_recogniser(family: str = "llama") -> AudioLLM:
    """A recogniser that reads letters."""
    torch.manual_seed(1)
    encoder = ConformerEncoder(
        ConformerConfig(dim=24, num_layers=1, num_heads=2, conv_kernel=3, subsampling_channels=4, dropout=0.0)
    )
    vocabulary = {token: at for at, token in enumerate(["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyzTHE .:,"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    return AudioLLM.assemble(encoder=encoder, llm=make_llm(family), tokenizer=tokenizer, ctc=True).eval()
