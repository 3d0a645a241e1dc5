"""A packed recogniser without a solver: every matrix of the layers rounded to nearest, as quantize's artifact would be.

Shape letters: N output channels, K input channels, G groups of a row.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from seedling.model.audio_llm import AudioLLM, acllm_facts
from seedling.quant.hf import declare_packed
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import replace_module
from seedling.quant.solution import LayerSolution
from seedling.stages.runtime.artifacts import ArtifactWriter, load_artifact


def round_to_nearest(weight_NK: Tensor, *, bits: int, group_size: int) -> LayerSolution:
    """Return the weight on an even grid from the lowest to the highest value of each group."""
    size = weight_NK.shape[1] if group_size == -1 else group_size
    codes, scales, zeros = [], [], []
    for part_NK in weight_NK.float().split(size, dim=1):
        low_N1, high_N1 = part_NK.amin(1, keepdim=True), part_NK.amax(1, keepdim=True)
        scale_N1 = (high_N1 - low_N1).clamp_min(1e-8) / (2**bits - 1)
        codes.append(((part_NK - low_N1) / scale_N1).round().to(torch.uint8))
        scales.append(scale_N1)
        zeros.append(low_N1)
    return LayerSolution(
        codes_NK=torch.cat(codes, 1),
        scale_NG=torch.cat(scales, 1),
        zero_NG=torch.cat(zeros, 1),
        bits=bits,
        group_size=group_size,
    )


def pack_layers(model: AudioLLM, *, bits: int, group_size: int, scale_dtype: torch.dtype = torch.bfloat16) -> None:
    """Pack every linear layer of the encoder's and the LLM's layers in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.startswith(("encoder.layers.", "llm.model.layers.")):
            solution = round_to_nearest(module.weight.detach(), bits=bits, group_size=group_size)
            bias = None if module.bias is None else module.bias.detach()
            replace_module(model, name, PackedLinear.from_solution(solution, bias=bias, scale_dtype=scale_dtype))


def make_packed(folder: Path, acllm: Path, **settings) -> Path:
    """Write a packed recogniser as an artifact of stage quantize, and return its folder."""
    model = AudioLLM.from_pretrained(acllm)
    pack_layers(model, **settings)
    inputs = {"acllm": load_artifact(acllm)}
    writer = ArtifactWriter(folder / "artifact", kind="acllm", stage="quantize", inputs=inputs).start()
    declare_packed(model)
    model.save_pretrained(writer.path)
    writer.facts |= acllm_facts(model)
    return writer.finish().path
