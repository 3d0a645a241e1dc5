"""Packed models as folders: what is saved is what is loaded, bit for bit, by whatever loads it."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_layers import make_llm, make_recogniser, pack_all
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from seedling.model.audio_llm import AudioLLM
from seedling.model.llm import LoraSettings, add_lora, load_llm
from seedling.quant.hf import declare_packed
from seedling.quant.packed_model import codes_hash, fold, model_storage, packed_modules, replace_module, tune
from seedling.quant.tuned import TunedLinear

FAMILIES = ("qwen3", "llama", "mixtral", "qwen3_moe")
IDS = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
WAVEFORMS = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000, 5000])


def packed_llm(family: str, **how):
    model = make_llm(family)
    before = pack_all(model, **how)
    declare_packed(model)
    return model, before


def assert_same_tensors(one, other) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [False, True])
def test_an_llm_is_loaded_as_it_was_saved(family, head, tmp_path):
    model, _ = packed_llm(family, head=head)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(model, loaded)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits) and codes_hash(loaded) == codes_hash(model)
    assert not any(p.requires_grad for module in packed_modules(loaded).values() for p in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_what_was_loaded_gives_the_same_files(family, tmp_path):
    packed_llm(family)[0].save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_loading_in_bf16_is_loading_the_dequantised_weights_in_bf16(family, scale_dtype, tmp_path):
    model, before = packed_llm(family, scale_dtype=scale_dtype)
    model.save_pretrained(tmp_path / "packed")
    plain = make_llm(family)
    for name, module in before.items():
        replace_module(plain, name, module)
    plain.save_pretrained(tmp_path / "plain")
    loaded, wanted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16) for name in ("packed", "plain")
    )
    assert all(module.scale_zero.dtype == scale_dtype for module in packed_modules(loaded).values())
    assert torch.equal(loaded(IDS).logits, wanted(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recogniser_is_loaded_as_it_was_saved(family, dtype, tmp_path):
    model = make_recogniser(family)
    # Encoder and converter are kept in float32 by the config; their scales have 16 bits all the same.
    pack_all(model, scale_dtype=torch.float16)
    assert {name.split(".")[0] for name in packed_modules(model)} >= {"encoder", "converter", "llm"}
    declare_packed(model)
    model.save_pretrained(tmp_path)
    for loaded in (AudioLLM.from_pretrained(tmp_path, dtype=dtype), AutoModel.from_pretrained(tmp_path, dtype=dtype)):
        assert codes_hash(loaded) == codes_hash(model) and loaded.llm.dtype == dtype
        assert all(module.scale_zero.dtype == torch.float16 for module in packed_modules(loaded).values())
        assert torch.equal(loaded._encode(*WAVEFORMS)[0], model._encode(*WAVEFORMS)[0])
        assert loaded.generate(*WAVEFORMS, max_new_tokens=5).shape[0] == 2
        if dtype == torch.float32:
            assert_same_tensors(model, loaded)
            assert torch.equal(loaded.llm(IDS).logits, model.llm(IDS).logits)


def test_a_given_state_dict_is_what_is_saved(tmp_path):
    """Stages gather one from all ranks; transformers would drop it were the model one of its quantised ones."""
    model, _ = packed_llm("qwen3")
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    state = {name: value.clone() for name, value in loaded.state_dict().items()}
    state["model.norm.weight"] += 1
    loaded.save_pretrained(tmp_path / "b", state_dict=state)
    assert torch.equal(load_file(tmp_path / "b/model.safetensors")["model.norm.weight"], state["model.norm.weight"])


def test_the_file_is_as_small_as_was_computed(tmp_path):
    model = make_llm("llama")
    model.save_pretrained(tmp_path / "plain")
    before = pack_all(model)
    declare_packed(model)
    model.save_pretrained(tmp_path / "packed")
    bits, weights = 0, sum(module.weight.numel() for module in before.values())
    with safe_open(tmp_path / "packed/model.safetensors", framework="pt") as file:
        assert not any(name.removesuffix(".weight") in before for name in file.keys())  # noqa: SIM118
        for name in file.keys():  # noqa: SIM118
            bits += 8 * file.get_tensor(name).nbytes
    storage = model_storage(model)
    assert bits == storage.total_bits
    saved = (tmp_path / "plain/model.safetensors").stat().st_size - (
        tmp_path / "packed/model.safetensors"
    ).stat().st_size
    assert abs(8 * saved - (32 * weights - storage.packed_bits)) < 8 * 4096  # the headers differ


def test_config_json_holds_the_form_of_every_matrix(tmp_path):
    packed_llm("qwen3", bits=3)[0].save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["version"]) == ("decoupleq", 1) and len(written["matrices"]) == 14
    assert written["matrices"]["model.layers.1.mlp.down_proj"] == {
        "bits": 3,
        "group_size": 32,
        "scale_dtype": "bfloat16",
        "shape": [48, 80],
    }


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda q: q.update(version=2), "version is 2, this version of seedling reads packed weights of version 1"),
        (lambda q: q.update(permuted=True), "quantization_config.permuted=True is unknown"),
        (lambda q: q["matrices"][Q_PROJ].update(shape=[48, 48]), f"{Q_PROJ} is packed as a linear layer"),
        (lambda q: q["matrices"][Q_PROJ].update(bits=5), f"{Q_PROJ}: bits is 5"),
        (lambda q: q["matrices"][Q_PROJ].pop("scale_dtype"), f"{Q_PROJ}: .*scale_dtype"),
        (lambda q: q["matrices"][Q_PROJ].update(group_size="64"), f"{Q_PROJ}: .*group_size must be integers"),
        (lambda q: q["matrices"][Q_PROJ].update(bits=2.5), f"{Q_PROJ}: .*bits and group_size must be integers"),
        (lambda q: q["matrices"][Q_PROJ].update(shape=[48]), rf"{Q_PROJ}: .*shape \[N, K\]"),
        (lambda q: q["matrices"][Q_PROJ].update(shape=None), rf"{Q_PROJ}: .*shape \[N, K\]"),
        (lambda q: q["matrices"][Q_PROJ].update(scale_dtype=["bfloat16"]), f"{Q_PROJ}: .*scale_dtype a word"),
        (lambda q: q["matrices"].update({Q_PROJ: 2}), f"matrices.{Q_PROJ} is 2; it must be a form"),
        (lambda q: q.update(matrices=[1]), r"quantization_config.matrices is \[1\]; it must map names to forms"),
        (lambda q: q["matrices"].update(nothing=q["matrices"][Q_PROJ]), "names nothing, which Qwen3ForCausalLM"),
        (lambda q: q["matrices"].update(lm_head=q["matrices"].pop(Q_PROJ)), "lm_head is packed as a linear layer"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_error(change, said, tmp_path):
    packed_llm("qwen3")[0].save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=said) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_that_lacks_a_scale_is_refused(tmp_path):
    model = make_recogniser()
    pack_all(model)
    declare_packed(model)
    state = model.state_dict()
    del state["converter.proj.scale_zero"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"converter\.proj\.scale_zero"):
        AudioLLM.from_pretrained(tmp_path)


def test_an_llm_whose_folder_lacks_a_scale_is_refused(tmp_path):
    model, _ = packed_llm("mixtral")
    state = model.state_dict()
    del state[f"{Q_PROJ}.scale_zero"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=rf"^{tmp_path} lacks 1 tensors .* first {Q_PROJ}\.scale_zero; .*not complete"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_matrix_that_the_config_does_not_name_is_not_drawn_anew(family, tmp_path):
    packed_llm(family)[0].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    edit(tmp_path, lambda q: q["matrices"].pop(Q_PROJ))
    with pytest.raises(ValueError, match=rf"^{tmp_path} holds 2 packed tensors .* first {Q_PROJ}\.codes; restore"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_that_is_tuned_after_it_was_declared_is_not_saved_until_it_is_folded(tmp_path):
    model, recogniser = packed_llm("llama")[0], make_recogniser("llama")
    pack_all(recogniser)
    declare_packed(recogniser)
    for part, whole in ((model, model), (recogniser, recogniser), (recogniser.llm, recogniser)):
        tune(whole)
        with pytest.raises(ValueError, match="fold the model before saving"):
            copy.deepcopy(part).save_pretrained(tmp_path / "no")
        fold(whole)
    assert not (tmp_path / "no").exists()
    model.save_pretrained(tmp_path / "llm")
    assert_same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path / "llm"))


def test_a_folder_of_trainable_forms_is_refused_by_whatever_loads_it(tmp_path):
    model, _ = packed_llm("qwen3")
    for name, module in packed_modules(model).items():
        replace_module(model, name, TunedLinear.of(module))  # tune() would not let it be saved
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path} lacks 14 tensors .*first model.*scale_zero; .* fold the model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_that_is_being_tuned_or_has_nothing_packed_is_not_declared():
    model, _ = packed_llm("qwen3")
    tune(model)
    with pytest.raises(ValueError, match="fold the model before saving"):
        declare_packed(model)
    with pytest.raises(ValueError, match="no packed module"):
        declare_packed(make_llm("qwen3"))


def test_a_packed_llm_becomes_part_of_a_recogniser(tmp_path):
    packed_llm("llama")[0].save_pretrained(tmp_path / "llm")
    llm = load_llm(tmp_path / "llm")
    parts = make_recogniser()
    model = AudioLLM.assemble(encoder=parts.encoder, llm=llm, tokenizer=parts.processor.tokenizer).eval()
    declare_packed(model)
    model.save_pretrained(tmp_path / "whole")
    loaded = AudioLLM.from_pretrained(tmp_path / "whole")
    assert_same_tensors(model, loaded)
    assert all(name.startswith("llm.") for name in packed_modules(loaded))


def test_adapters_on_packed_weights_are_refused():
    model, _ = packed_llm("qwen3")
    with pytest.raises(ValueError, match=r"q_proj is a PackedLinear, which takes no adapter"):
        add_lora(model, LoraSettings(r=4))


@pytest.mark.parametrize(
    "imports",
    [
        "import seedling\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained\nimport seedling",
        "from seedling.model.llm import load_llm\nfrom transformers import AutoModelForCausalLM",
        "import seedling.quant.hf\nfrom transformers import AutoModelForCausalLM",
        "import seedling\nimport transformers.modeling_utils\nfrom transformers import AutoModelForCausalLM",
    ],
)
def test_a_fresh_process_loads_a_packed_folder_in_any_import_order(imports, tmp_path):
    model, _ = packed_llm("llama")
    model.save_pretrained(tmp_path)
    code = f"{imports}\nfrom seedling.quant.packed_model import codes_hash\n"
    code += f"print(codes_hash(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [codes_hash(model)]
