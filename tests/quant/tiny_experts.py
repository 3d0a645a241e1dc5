"""Tiny mixtures of experts of the real classes, and solutions that any weight can be given."""

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from seedling.kernels.w2a16.groups import group_count
from seedling.quant.expert_layout import PROJECTIONS, expert_layout
from seedling.quant.solution import LayerSolution

EXPERTS, TOP_K, WIDTH, INNER = 4, 2, 40, 24  # neither width is a multiple of a group
SHAPE = {
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "num_experts_per_tok": TOP_K,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, num_experts=EXPERTS, moe_intermediate_size=INNER, norm_topk_prob=True),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=EXPERTS, intermediate_size=INNER, sliding_window=None),
    "gpt_oss": lambda: GptOssConfig(**SHAPE, num_local_experts=EXPERTS, intermediate_size=INNER),
}
FAMILIES = list(CONFIGS)
NAME = "model.layers.0.mlp.experts"


def make_moe(family, *, seed=0, experts_implementation="eager"):
    """A causal LM whose biases, where it has any, are not zero."""
    torch.manual_seed(seed)
    llm = AutoModelForCausalLM.from_config(CONFIGS[family](), experts_implementation=experts_implementation).eval()
    for name, parameter in llm.named_parameters():
        if name.endswith("_bias") or name.endswith("router.bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return llm


def make_experts(family, **options):
    return make_moe(family, **options).get_submodule(NAME)


def random_call(n=50, *, seed=0, dtype=torch.float32, without=None):
    """hidden_nD, index_nk, weights_nk; `without` is an expert that nothing is sent to."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, EXPERTS, generator=generator)
    if without is not None:
        scores[:, without] = -1.0
    weights_nk, index_nk = scores.topk(TOP_K)
    return torch.randn(n, WIDTH, generator=generator).to(dtype), index_nk, weights_nk.to(dtype)


def random_solution(shape, *, bits=2, group_size=16, seed=0):
    """Codes, scales of both signs and zeros that have nothing to do with any weight; exact in bfloat16."""
    generator, (N, K) = torch.Generator().manual_seed(seed), shape
    codes_NK = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    scale_NG, zero_NG = (
        (0.1 * torch.randn(N, group_count(K, group_size), generator=generator)).bfloat16().float() for _ in range(2)
    )
    return LayerSolution(codes_NK, scale_NG, zero_NG, bits, group_size)


def random_solutions(module, *, bits=2, group_size=16):
    layout = expert_layout(module, name=NAME)
    return {
        projection: [
            random_solution(layout.shapes[projection], bits=bits, group_size=group_size, seed=100 * at + expert)
            for expert in range(layout.experts)
        ]
        for at, projection in enumerate(PROJECTIONS)
    }


@torch.no_grad()
def overwrite(module, solutions):
    """Put dequantised weights where the module has its own: what packed experts have to equal."""
    transposed = type(module).__name__ == "GptOssExperts"
    for projection, found in solutions.items():
        for expert, solution in enumerate(found):
            weight_NK = solution.dequantised_NK()
            getattr(module, f"{projection}_proj")[expert] = weight_NK.T if transposed else weight_NK
