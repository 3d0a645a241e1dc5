"""A dense weight beside the codes changes neither results nor files, and takes no more memory than it may."""

import gc

import pytest
import torch
from packed_layers import make_recogniser, pack_all, random_solution
from tiny_experts import make_experts, random_call, random_solutions
from torch import nn

from seedling.model.audio_llm import AudioLLM
from seedling.quant.hf import declare_packed
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_experts import PackedExperts
from seedling.quant.packed_model import codes_hash, fold, forms, packed_modules, tune
from seedling.quant.unpacked import UnpackedLinear, UnpackedMatrices, unpack


def large_tensors(least: int) -> set[int]:
    """Return the addresses of all tensors of more than `least` bytes that are alive."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return {one.data_ptr() for one in tensors if one.nbytes > least and one.device.type == "cpu"}


def packed_linear(N=48, K=80, *, bits=2, group_size=32, bias=True, seed=0) -> PackedLinear:
    solution = random_solution(N, K, bits=bits, group_size=group_size, seed=seed)
    return PackedLinear.from_solution(solution, bias=torch.randn(N) if bias else None)


def dense_of(packed: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    N, K = packed.layout[:2]
    dense = nn.Linear(K, N, bias=packed.bias is not None, dtype=dtype)
    dense.weight.data = packed.dequantised_NK(dtype)
    if packed.bias is not None:
        dense.bias.data = packed.bias.detach().to(dtype)
    return dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, group_size", [(2, 64), (3, 32), (4, -1), (8, 64)])
def test_an_unpacked_layer_is_the_dense_layer(bits, group_size, dtype):
    packed = packed_linear(bits=bits, group_size=group_size)
    unpacked = UnpackedLinear.of(packed, dtype)
    x = torch.randn(3, 5, 80, dtype=dtype)
    assert torch.equal(unpacked(x), dense_of(packed, dtype)(x))


def test_an_input_of_another_type_is_multiplied_as_exactly_as_before():
    packed = packed_linear()
    unpacked, x = UnpackedLinear.of(packed, torch.bfloat16), torch.randn(4, 80)
    torch.testing.assert_close(unpacked(x), packed(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert unpacked(x).dtype == torch.bfloat16
        torch.testing.assert_close(unpacked(x), packed(x))
    torch.testing.assert_close(unpacked.to(torch.float32)(x), packed(x), msg="the rounded weight must not be used")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_unpacked_experts_are_the_packed_ones(family):
    module = make_experts(family)
    holder = nn.Sequential(nn.LayerNorm(1), PackedExperts.from_solutions(module, random_solutions(module)))
    call = random_call(without=1)
    with torch.no_grad():
        wanted = holder[1](*call)
        assert unpack([holder], most_bytes=1e9).modules == 2
        assert isinstance(holder[1].gate_up, UnpackedMatrices)
        torch.testing.assert_close(holder[1](*call), wanted)


def test_bytes_are_dealt_out_in_the_order_of_the_parts_and_never_exceeded():
    def part(bf16=False):
        layers = nn.Sequential(nn.LayerNorm(8), packed_linear(seed=1), packed_linear(N=16, seed=2))
        return layers.bfloat16() if bf16 else layers

    one, other = 4 * 48 * 80, 4 * 16 * 80
    for most, wanted in [
        (0, []),
        (other / 2 - 1, []),
        (other - 1, [(1, 2)]),  # what is too large is passed over
        (other, [(0, 2)]),
        (one, [(0, 1)]),
        (one + other, [(0, 1), (0, 2)]),
        (one + other + other / 2, [(0, 1), (0, 2), (1, 2)]),
        (1e9, [(0, 1), (0, 2), (1, 1), (1, 2)]),
    ]:
        parts = [part(), part(bf16=True)]
        unpacked = unpack(parts, most_bytes=most)
        dense = {(p, at): m.dense_NK for p in (0, 1) for at, m in enumerate(parts[p]) if isinstance(m, UnpackedLinear)}
        assert sorted(dense) == wanted, most
        assert unpacked == (len(wanted), 4, sum(weight.nbytes for weight in dense.values()))
        assert unpacked.nbytes <= most


def test_experts_come_after_what_runs_for_every_token():
    module = make_experts("qwen3_moe")
    experts, linear = PackedExperts.from_solutions(module, random_solutions(module)), packed_linear()
    part = nn.Sequential(nn.LayerNorm(8), experts, linear)
    assert unpack([part], most_bytes=4 * 48 * 80).modules == 1 and isinstance(part[2], UnpackedLinear)


def test_without_an_allowance_there_is_no_dense_copy_before_or_after_a_pass():
    """Of a matrix as wide as real ones, whose padding is nothing; test_reference.py looks into the pass."""
    packed = PackedLinear.from_solution(random_solution(1024, 8192, bits=2, group_size=64), bias=None)
    part = nn.Sequential(nn.LayerNorm(8192), packed)
    assert unpack([part], most_bytes=0).modules == 0
    dense_bytes = 2 * 1024 * 8192
    held = sum(tensor.nbytes for tensor in packed.state_dict().values())
    assert held <= 0.17 * dense_bytes
    before = large_tensors(held)
    with torch.no_grad():
        y = part(torch.randn(1, 8192))
    assert y.shape == (1, 1024) and large_tensors(held) == before
    unpack([part], most_bytes=1e9)
    assert len(large_tensors(held) - before) == 1, "a dense copy would be counted"


def test_what_is_saved_of_an_unpacked_recogniser_is_its_codes(tmp_path):
    model = make_recogniser("mixtral")
    pack_all(model)
    declare_packed(model)
    model.save_pretrained(tmp_path / "packed")
    before, codes, named = list(model.state_dict()), codes_hash(model), forms(model)
    assert unpack([model.llm, model.encoder], most_bytes=1e9).modules > 10
    assert (list(model.state_dict()), codes_hash(model), forms(model)) == (before, codes, named)
    model.save_pretrained(tmp_path / "unpacked")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "packed" / file).read_bytes() == (tmp_path / "unpacked" / file).read_bytes(), file
    assert codes_hash(AudioLLM.from_pretrained(tmp_path / "unpacked")) == codes


def test_values_that_are_loaded_into_an_unpacked_layer_are_those_it_multiplies_with():
    unpacked, other = UnpackedLinear.of(packed_linear(), torch.float32), packed_linear(seed=5)
    unpacked.load_state_dict(other.state_dict())
    x = torch.randn(2, 80)
    torch.testing.assert_close(unpacked(x), other(x))


def test_an_unpacked_model_can_be_trained_again():
    part = nn.Sequential(nn.LayerNorm(80), packed_linear())
    unpack([part], most_bytes=1e9)
    tune(part)
    fold(part)
    assert [type(module) for module in packed_modules(part).values()] == [PackedLinear]
