"""Causal LMs from a local folder: dense, mixture of experts, tied or not, capped logits, adapters."""

import pytest
import torch

from seedling.model.llm import (
    LoraSettings,
    add_lora,
    has_lora,
    head_is_plain,
    load_llm,
    load_tokenizer,
    logits_at,
    merge_lora,
)

REQUIRED = ["qwen2", "qwen3", "llama", "mixtral", "qwen3_moe"]
AFTER_HEAD = ["gemma2", "granite", "cohere"]
IDS = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]])


@pytest.mark.parametrize("family", REQUIRED)
def test_a_saved_llm_loads_with_equal_weights_and_equal_logits(family, llm_folder, tiny_llm):
    original, loaded = tiny_llm(family), load_llm(llm_folder(family))
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not loaded.training
    assert torch.equal(loaded(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize("family", REQUIRED)
def test_meta_gives_the_same_parameters_without_storage(family, llm_folder):
    real, meta = load_llm(llm_folder(family)), load_llm(llm_folder(family), meta=True)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in meta.parameters())


def test_dtype_is_the_one_asked_for(llm_folder):
    assert load_llm(llm_folder(), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_llm(llm_folder(), meta=True, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("family", REQUIRED + AFTER_HEAD)
def test_logits_at_positions_are_those_of_a_full_forward_pass(family, tiny_llm):
    llm = tiny_llm(family)
    rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 4, 0, 3])
    with torch.no_grad():
        full = llm(inputs_embeds=llm.get_input_embeddings()(IDS)).logits
        some, _ = logits_at(llm, llm.get_input_embeddings()(IDS), rows_N=rows, columns_N=columns)
    torch.testing.assert_close(some, full[rows, columns], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", REQUIRED + AFTER_HEAD)
def test_a_scale_or_cap_after_the_head_is_noticed(family, tiny_llm):
    assert head_is_plain(tiny_llm(family)) == (family in REQUIRED)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        load_llm(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge it into its base model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(llm_folder, tokenizer):
    folder = llm_folder()
    assert load_tokenizer(folder).eos_token_id == 1
    ends, tokenizer.eos_token = tokenizer.eos_token, None
    tokenizer.save_pretrained(folder)
    tokenizer.eos_token = ends
    with pytest.raises(ValueError, match="no end token"):
        load_tokenizer(folder)


def train_adapters(llm: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_fresh_adapters_change_nothing_and_merged_ones_are_exact(family, tiny_llm):
    llm = tiny_llm(family)
    before, names = llm(IDS).logits, set(llm.state_dict())
    add_lora(llm, LoraSettings(r=4))
    assert has_lora(llm)
    assert torch.equal(llm(IDS).logits, before)
    train_adapters(llm)
    trained = llm.eval()(IDS).logits
    assert not torch.allclose(trained, before)
    merged = merge_lora(llm, llm.state_dict())
    assert set(merged) == names
    plain = tiny_llm(family, seed=9)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(IDS).logits, trained, rtol=1e-4, atol=1e-4)


def test_only_adapter_names_contain_lora(tiny_llm):
    llm = tiny_llm()
    before = {name for name, _ in llm.named_parameters()}
    add_lora(llm, LoraSettings(r=2, target_modules=["q_proj", "v_proj"]))
    added = {name for name, _ in llm.named_parameters() if "lora_" in name}
    assert len(added) == 2 * 2 * 2
    assert {name.replace(".base_layer.", ".") for name, _ in llm.named_parameters()} - added == before


def test_rank_zero_adds_nothing_and_unknown_targets_are_named(tiny_llm):
    llm = tiny_llm()
    add_lora(llm, LoraSettings(r=0))
    assert not has_lora(llm)
    with pytest.raises(ValueError, match=r"no linear layer of LlamaForCausalLM.*q_proj"):
        add_lora(llm, LoraSettings(r=2, target_modules=["query_key_value"]))
