"""The language model: any Hugging Face causal LM from a local folder, dense or mixture of experts.

Two things are special. The vocabulary head runs only where a logit is needed, never over the whole prompt. LoRA layers
are injected in place, so the LM stays an ordinary causal LM, and are merged when it is saved.
Shape letters: B utterances, T positions, L LM width, V vocabulary, N positions that want logits.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# transformers' Auto classes are imported where they are used: hf.py imports this module while they are being loaded.

# Settings by which a causal LM transforms its logits after the head (Gemma, Cohere, Granite, ...). Where one is active,
# the LM's own forward computes the logits.
LOGIT_SETTINGS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass
class LoraSettings:
    """Low-rank adapters on the LM (https://arxiv.org/abs/2106.09685). `r = 0` means none."""

    r: int = 0
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    def __post_init__(self):
        if self.r < 0:
            raise ValueError(f"lora.r ({self.r}) must be 0 (no adapters) or the rank, such as 16")


def load_llm(
    path: str | Path, *, dtype: torch.dtype | str = "auto", meta: bool = False, attention: str = "sdpa"
) -> PreTrainedModel:
    """Return the causal LM in folder `path`, in evaluation mode. `meta=True` gives its shapes without any weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = _model_folder(path)
    if not meta:
        llm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
        return llm.eval()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    dtypes = {} if dtype == "auto" else {"dtype": dtype}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, **dtypes).eval()


def fresh_llm(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a causal LM of this config with random weights, or the place for weights that are about to be loaded.

    It has torch's default type, which `from_pretrained(dtype=...)` sets to the one asked for; the config's is that of
    the file.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config).to(torch.get_default_dtype())


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in folder `path`. It must have an end token, the only sign that a transcript is complete."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_model_folder(path), local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end token; set eos_token in its tokenizer_config.json")
    return tokenizer


def _model_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        hint = "an adapter: merge it into its base model first" if (folder / "adapter_config.json").is_file() else None
        raise ValueError(
            f"{folder}: not a Hugging Face model folder ({hint or 'no config.json in it'}); "
            "give a local folder with config.json, weights and tokenizer"
        )
    return folder


def token_embeddings(llm: PreTrainedModel) -> nn.Embedding:
    """Return the LM's table of token embeddings, as a module that looks ids up."""
    table = llm.get_input_embeddings()
    assert isinstance(table, nn.Embedding), f"{type(llm).__name__} looks tokens up in a {type(table).__name__}"
    return table


def head_is_plain(llm: PreTrainedModel) -> bool:
    """Whether logits are exactly output_embeddings(hidden), with nothing after it."""
    config = llm.config.get_text_config()
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in LOGIT_SETTINGS)


def hidden_at(
    llm: PreTrainedModel, embeddings_BTL: Tensor, *, rows_N: Tensor, columns_N: Tensor, **forward
) -> tuple[Tensor, Cache | None]:
    """Return hidden_NL, what the head sees at positions (rows_N, columns_N), and the LM's cache."""
    out = llm.get_decoder()(inputs_embeds=embeddings_BTL, **forward)
    return out.last_hidden_state[rows_N, columns_N], out.past_key_values


def logits_at(
    llm: PreTrainedModel, embeddings_BTL: Tensor, *, rows_N: Tensor, columns_N: Tensor, **forward
) -> tuple[Tensor, Cache | None]:
    """Return logits_NV at positions (rows_N, columns_N), and the LM's cache when `use_cache=True` is passed.

    At 150 thousand tokens a [B, T, V] tensor of logits would be most of the memory of a training step, for positions
    of instruction and speech that have no target.
    """
    if head_is_plain(llm):
        head = llm.get_output_embeddings()
        assert head is not None, f"{type(llm).__name__} is no causal LM: it has no head"
        hidden_NL, cache = hidden_at(llm, embeddings_BTL, rows_N=rows_N, columns_N=columns_N, **forward)
        return head(hidden_NL), cache
    # A soft cap or a scale follows the head: let the LM do it, over every column that any utterance needs.
    kept_K, place_N = columns_N.unique(return_inverse=True)
    out = llm(inputs_embeds=embeddings_BTL, logits_to_keep=kept_K, **forward)
    return out.logits[rows_N, place_N], out.past_key_values


def add_lora(llm: PreTrainedModel, settings: LoraSettings) -> None:
    """Inject adapters in place; their parameter names contain `lora_`. Nothing happens at r = 0.

    The LM gives the same output until they are trained, as the second factor starts at zero.
    """
    if settings.r == 0:
        return
    from peft import LoraConfig, inject_adapter_in_model  # imported late: 2 s that only LoRA runs should pay

    present = {name.rsplit(".", 1)[-1] for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    targets = [name for name in settings.target_modules if name in present]
    for name, module in llm.named_modules():
        if name.rsplit(".", 1)[-1] in settings.target_modules and not isinstance(module, nn.Linear):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which takes no adapter: leave it out of lora.target_modules "
                f"({settings.target_modules}), or start from a model whose weights are not packed"
            )
    if not targets:
        raise ValueError(
            f"lora.target_modules ({settings.target_modules}) names no linear layer of {type(llm).__name__}; "
            f"it has {sorted(present)}"
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, llm)


def has_lora(module: nn.Module) -> bool:
    """Whether adapters have been injected anywhere in the module."""
    return any("lora_" in name for name, _ in module.named_parameters())


@torch.no_grad()
def merge_lora(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state`, the module's state dict, with adapters added into the weights and the original names restored.

    Artifacts hold merged weights: whatever reads them needs neither peft nor the settings. Numbers come from `state`
    alone, which may have been gathered from many ranks; the module gives only names and scales, and is not changed.
    """
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if "lora_" not in name}
    for name, layer in module.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        for adapter, scale in layer.scaling.items():
            down_RI, up_OR = (state[f"{name}.lora_{side}.{adapter}.weight"].float() for side in "AB")
            weight_OI = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight_OI.float() + scale * (up_OR @ down_RI)).to(weight_OI.dtype)
    return merged
