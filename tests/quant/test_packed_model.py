import pytest
import torch
from packed_layers import make_llm, make_recogniser, pack_all
from torch import nn

from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import (
    codes_hash,
    fold,
    forms,
    model_storage,
    packed_modules,
    replace_module,
    tune,
    tuned_modules,
)

IDS = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["qwen3", "llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_a_packed_llm_computes_what_its_dequantised_weights_compute(family, group_size):
    packed, plain = make_llm(family), make_llm(family)
    before = pack_all(packed, bits=3, group_size=group_size)
    for name, module in before.items():
        replace_module(plain, name, module)
    assert list(packed_modules(packed)) == list(before) and len(before) >= 8
    assert torch.equal(packed(IDS).logits, plain(IDS).logits)


def test_tuning_and_folding_leave_outputs_and_tensors_bit_for_bit():
    model = make_recogniser()
    pack_all(model)
    names, before = list(packed_modules(model)), {name: value.clone() for name, value in model.state_dict().items()}
    logits, codes = model.llm(IDS).logits, codes_hash(model)
    tune(model)
    assert not packed_modules(model) and list(tuned_modules(model)) == names
    assert torch.equal(model.llm(IDS).logits, logits) and codes_hash(model) == codes
    fold(model)
    assert list(packed_modules(model)) == names and not tuned_modules(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name


def test_the_hash_of_codes_sees_one_bit_and_no_scale():
    model = make_llm("qwen3")
    pack_all(model)
    before = codes_hash(model)
    layer = next(iter(packed_modules(model).values()))
    layer.scale_zero.mul_(2)
    assert codes_hash(model) == before
    layer.codes[0, 0] ^= 1
    assert codes_hash(model) != before


def test_a_trained_scale_that_fits_no_16_bits_is_named():
    model = make_llm("qwen3")
    pack_all(model, scale_dtype=torch.float16)
    tune(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.scale_ratio_NG.mul_(1e7)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: a group .*bfloat16"):
        fold(model)


def test_a_module_is_replaced_in_sequences_too_and_keeps_its_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 2)})).train()
    new = nn.Linear(2, 3).eval()
    replace_module(model, "0", new)
    assert model[0] is new and new.training
    replace_module(model, "1.a", other := nn.Linear(2, 4))
    assert model[1]["a"] is other


@pytest.mark.parametrize("name", ["2", "0.weight", "a.b", ""])
def test_what_is_not_there_cannot_be_replaced(name):
    with pytest.raises(ValueError):
        replace_module(nn.Sequential(nn.Linear(2, 2)), name, nn.Identity())


def test_forms_say_what_is_packed():
    model = make_llm("qwen3")
    pack_all(model, bits=4, group_size=-1, scale_dtype=torch.float16)
    assert forms(model)["model.layers.0.mlp.down_proj"] == {
        "bits": 4,
        "group_size": -1,
        "scale_dtype": "float16",
        "shape": [48, 80],
    }


def test_storage_counts_every_byte_once():
    model = make_llm("llama")  # the head is the table of token embeddings
    before = pack_all(model)
    storage = model_storage(model)
    assert storage.weights == sum(module.weight.numel() for module in before.values())
    # 32-column groups at 2 bits: spans of 128 columns, so 48 and 80 columns take 32 bytes of codes a channel.
    packed = sum(8 * N * (32 + 4 * -(-K // 32)) for N, K in (module.weight.shape for module in before.values()))
    assert storage.packed_bits == packed
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert storage.other_bits == 8 * parameters
    assert storage.ratio == (16 * storage.weights + 8 * parameters) / (packed + 8 * parameters)


def test_a_packed_layer_in_a_module_that_is_no_model_is_found():
    layer = PackedLinear.place_for(
        nn.Linear(64, 4), {"": {"bits": 2, "group_size": 64, "scale_dtype": "bfloat16", "shape": [4, 64]}}, name="a"
    )
    assert packed_modules(nn.ModuleList([layer])) == {"0": layer}
