"""What `seedling inspect` says about packed weights."""

import json
from pathlib import Path

import pytest
from packed_layers import make_recogniser, pack_all, random_solution
from safetensors.torch import load_file

from seedling.launch.cli import main
from seedling.launch.commands.artifacts import packed_forms, packed_lines, parameters_by_part
from seedling.quant.expert_layout import PROJECTIONS, expert_layout, fused_experts
from seedling.quant.hf import declare_packed
from seedling.quant.packed_experts import PackedExperts
from seedling.quant.packed_model import model_storage, replace_module
from seedling.stages.runtime.artifacts import ArtifactWriter


def write_artifact(folder: Path, model) -> None:
    writer = ArtifactWriter(folder, "acllm", "quantize").start()
    model.save_pretrained(writer.path)
    writer.finish()


def test_inspect_prints_bits_per_weight_by_repeated_module_and_overall(tmp_path, capsys):
    model = make_recogniser()
    pack_all(model, bits=3, group_size=-1)
    declare_packed(model)
    write_artifact(tmp_path / "packed", model)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "packed")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("packed")]
    # Of 80 columns in the space of 256 at 3 bits, and one scale and zero a row.
    bits = (3 * 256 + 32) / 80
    wanted = f"2 x 48x80, 3 bits, per channel, bfloat16: {bits:.3f} bits per weight"
    assert f"packed  llm.model.layers.*.mlp.down_proj: {wanted}" in lines
    storage = model_storage(model)
    assert lines[-1] == (
        f"packed  in all: {storage.weights:,} weights of {storage.bits_per_weight:.3f} bits; with everything else "
        f"{storage.total_bits / 8e6:.3f} MB, {storage.ratio:.2f} times as small as with 16 bits a weight"
    )


def test_packing_does_not_change_the_number_of_parameters(tmp_path):
    model = make_recogniser()
    write_artifact(tmp_path / "plain", model)
    pack_all(model)
    declare_packed(model)
    write_artifact(tmp_path / "packed", model)
    counts = parameters_by_part(tmp_path / "plain")
    assert counts == parameters_by_part(tmp_path / "packed")
    assert counts["total"] == sum(value.numel() for value in make_recogniser().state_dict().values()) - tied(model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_found_under_the_names_that_files_have(family, tmp_path):
    model = make_recogniser(family)
    write_artifact(tmp_path / "plain", model)
    for name, experts in fused_experts(model).items():
        replace_module(model, name, PackedExperts.from_solutions(experts, solutions_of(experts)))
    declare_packed(model)
    write_artifact(tmp_path / "packed", model)
    in_file = load_file(tmp_path / "packed/model.safetensors")
    assert any("block_sparse_moe" in name for name in in_file) == (family == "mixtral"), "what the test is about"
    assert parameters_by_part(tmp_path / "packed") == parameters_by_part(tmp_path / "plain")
    storage = model_storage(model)
    lines = packed_lines(tmp_path / "packed")
    assert len(lines) == 3 and any(one.startswith("llm.model.layers.*.mlp.experts.gate_up: 2 x 4x") for one in lines)
    assert f"{storage.weights:,} weights of {storage.bits_per_weight:.3f} bits" in lines[-1]


def solutions_of(experts) -> dict[str, list]:
    shapes = expert_layout(experts, name="experts")
    return {
        projection: [random_solution(*shapes.shapes[projection], bits=2, group_size=32) for _ in range(shapes.experts)]
        for projection in PROJECTIONS
    }


def tied(model) -> int:
    head = model.llm.get_output_embeddings().weight
    return head.numel() if head is model.llm.get_input_embeddings().weight else 0


def test_an_artifact_with_nothing_packed_has_no_such_line(tmp_path, capsys):
    write_artifact(tmp_path / "plain", make_recogniser())
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    assert "\npacked" not in capsys.readouterr().out


def test_a_config_that_names_what_the_files_lack_is_an_error(tmp_path, capsys):
    model = make_recogniser()
    pack_all(model)
    declare_packed(model)
    model.config.quantization_config.matrices["llm.lost"] = {"bits": 2, "shape": [1, 1]}
    write_artifact(tmp_path / "packed", model)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "packed")]) == 2
    assert "llm.lost is said to be packed" in capsys.readouterr().err


@pytest.mark.parametrize("described", [None, {}, {"matrices": None}])
def test_an_empty_quantization_config_is_none(described, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": described}))
    assert packed_forms(tmp_path) == {} and packed_lines(tmp_path) == []


@pytest.mark.parametrize("described", ["decoupleq", {"matrices": [1]}])
def test_a_quantization_config_of_another_kind_is_one_error(described, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": described}))
    with pytest.raises(ValueError, match=r"config\.json: quantization_config is .*; restore the config\.json"):
        packed_forms(tmp_path)
