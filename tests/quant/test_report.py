"""The report says what calibration and refinement found, in their numbers, and true sizes."""

import json
from dataclasses import asdict

import pytest
import torch
from packed_layers import random_solution
from torch import nn

from seedling.quant.block_input import BlockInput
from seedling.quant.blockwise import RefineConfig, refine_block
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import model_storage
from seedling.quant.report import BlockReport, ModuleReport, read_report, summary_metrics, worst_module, write_reports


def module_report(name, *, error, fallback=""):
    return ModuleReport(
        name=name,
        bits=2,
        group_size=16,
        weights=4096,
        bits_per_weight=3.0,
        tokens=500,
        error=error,
        seconds=0.5,
        fallback=fallback,
    )


def packed_model():
    packed = PackedLinear.from_solution(random_solution(8, 32, bits=4, group_size=16), bias=torch.zeros(8))
    return nn.Sequential(packed, nn.LayerNorm(8))


def row(folder, name):
    lines = (folder / "quantization.md").read_text().splitlines()
    # The last one: a table's first line may begin with the same word.
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(f"| {name} |")][-1]


def test_errors_of_a_block_are_those_of_its_refinement_whatever_the_size_of_its_activations(tmp_path):
    """Blockwise gives them over the variance of the targets, which is far from 1 here."""
    torch.manual_seed(0)
    block = packed_model()[0]
    inputs = [BlockInput((torch.randn(2, 20, 32),), {}, None) for _ in range(4)]
    weight_NK = block.dequantised_NK() * 1.1
    targets = [given.args[0] @ weight_NK.T for given in inputs]
    refined = refine_block(block, inputs, targets, cfg=RefineConfig(epochs=2, lr=1e-2), name="block")
    assert refined.kept and refined.variance > 5
    # The weight is 10 % too small: about a hundredth of the variance is missing.
    assert 0.005 < refined.before < 0.02
    report = BlockReport("block", [module_report("block.proj", error=0.25)], asdict(refined))
    write_reports(tmp_path, [report], storage=model_storage(packed_model()))
    assert row(tmp_path, "block") == ["block", f"{refined.before:.5f}", f"{refined.after:.5f}", str(refined.kept)]
    said = json.loads((tmp_path / "quantization.json").read_text())["blocks"][0]["refinement"]
    assert said == json.loads(json.dumps(asdict(refined)))


def test_the_size_is_compared_to_16_bits_a_weight_and_says_so(tmp_path):
    model = packed_model()
    storage = model_storage(model)
    packed = 8 * (model[0].codes.nbytes + model[0].scale_zero.nbytes)
    others = 32 * (8 + 8 + 8)  # a bias and a norm, in float32
    ratio = (16 * 8 * 32 + others) / (packed + others)
    write_reports(tmp_path, [], storage=storage)
    assert json.loads((tmp_path / "quantization.json").read_text())["ratio_to_16_bits"] == ratio
    assert summary_metrics([], storage=storage)["ratio_to_16_bits"] == ratio
    text = (tmp_path / "quantization.md").read_text()
    assert f"{ratio:.2f} times as small as with 16 bits a packed weight" in text


def test_modules_without_an_error_are_no_part_of_the_mean_and_fallbacks_are_counted(tmp_path):
    blocks = [
        BlockReport("a", [module_report("a.x", error=0.1), module_report("a.y", error=None, fallback="no tokens")]),
        BlockReport("b", [module_report("b.x", error=0.3)]),
    ]
    metrics = summary_metrics(blocks, storage=model_storage(packed_model()))
    assert metrics["mean_error"] == pytest.approx(0.2) and metrics["worst_error"] == 0.3 and metrics["fallbacks"] == 1
    assert worst_module(blocks).name == "b.x" and worst_module([]) is None
    write_reports(tmp_path, blocks, storage=model_storage(packed_model()))
    assert row(tmp_path, "a.y")[5] == "-" and row(tmp_path, "a.y")[7] == "no tokens"
    assert row(tmp_path, "b.x")[5] == "0.30000"


def test_a_report_that_was_kept_as_json_is_the_same():
    report = BlockReport("a", [module_report("a.x", error=0.1), module_report("a.y", error=None)], {"before": 1.0})
    assert read_report(json.loads(json.dumps(asdict(report)))) == report
