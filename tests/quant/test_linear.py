import pytest
import torch
from packed_layers import random_solution
from torch import nn

from seedling.kernels.w2a16 import layout
from seedling.quant.linear import PackedLinear
from seedling.quant.solution import LayerSolution

BITS, GROUPS = (2, 3, 4, 8), (-1, 32, 64, 96, 128, 512)


def packed_layer(N=24, K=200, *, bits=2, group_size=64, bias=True, scale_dtype=torch.bfloat16, seed=0):
    solution = random_solution(N, K, bits=bits, group_size=group_size, seed=seed)
    bias_N = torch.randn(N, generator=torch.Generator().manual_seed(seed + 9)) if bias else None
    return PackedLinear.from_solution(solution, bias=bias_N, scale_dtype=scale_dtype)


def exact_weight(layer: PackedLinear) -> torch.Tensor:
    """scale * code + zero in float64, column by column."""
    codes, scale, zero = layer.codes_NK().double(), layer.scale_NG().double(), layer.zero_NG().double()
    g = layer.in_features if layer.group_size == -1 else layer.group_size
    return torch.stack([scale[:, k // g] * codes[:, k] + zero[:, k // g] for k in range(layer.in_features)], dim=1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("tile", [1, 3000, 1 << 22])
def test_the_weight_is_scale_times_code_plus_zero_in_tiles_of_any_size(bits, group_size, tile, monkeypatch):
    monkeypatch.setattr(layout, "TILE_ELEMENTS", tile)
    layer = packed_layer(K=600, bits=bits, group_size=group_size)
    wanted = exact_weight(layer)
    torch.testing.assert_close(layer.dequantised_NK().double(), wanted, rtol=2**-22, atol=2**-22)
    assert torch.equal(layer.dequantised_NK(torch.bfloat16), layer.dequantised_NK().bfloat16())


@pytest.mark.parametrize("shape", [(200,), (5, 200), (2, 3, 200), (0, 200)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_linear_layer_of_its_weight(shape, bias):
    layer = packed_layer(bias=bias)
    plain = nn.Linear(200, 24, bias=bias)
    plain.weight.data = layer.dequantised_NK()
    if bias:
        plain.bias.data = layer.bias.data
    x = torch.randn(*shape)
    assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(
        layer(x).double(),
        nn.functional.linear(x.double(), exact_weight(layer), layer.bias.double() if bias else None),
        rtol=1e-4,
        atol=1e-4,
    )


def test_autocast_computes_as_a_linear_layer_would():
    layer, x = packed_layer(), torch.randn(3, 200)
    plain = nn.Linear(200, 24)
    plain.weight.data, plain.bias.data = layer.dequantised_NK(), layer.bias.data
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x), plain(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_casting_a_model_leaves_codes_and_scales_alone(scale_dtype, cast):
    layer = packed_layer(scale_dtype=scale_dtype)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    cast(nn.Sequential(layer))
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert layer(torch.randn(2, 200, dtype=layer.bias.dtype)).dtype == layer.bias.dtype


def test_nothing_is_trained_and_the_bias_keeps_its_type():
    solution = random_solution(4, 64, bits=2, group_size=64)
    layer = PackedLinear.from_solution(solution, bias=torch.ones(4).bfloat16(), scale_dtype=torch.float16)
    assert layer.bias.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert sorted(layer.state_dict()) == ["bias", "codes", "scale_zero"]


@pytest.mark.parametrize(
    "bits, group_size, wanted", [(2, 64, 2.5), (2, 128, 2.25), (2, 32, 3.0), (3, 64, 3.5), (4, 64, 4.5)]
)
def test_bits_per_weight_are_those_of_the_format(bits, group_size, wanted):
    assert packed_layer(8, 1024, bits=bits, group_size=group_size).bits_per_weight == wanted


def test_bits_per_weight_count_the_padding():
    # 160 columns take the space of 256, and three groups.
    assert packed_layer(8, 160).bits_per_weight == (2 * 256 + 32 * 3) / 160


def one_group(scale: float, zero: float) -> LayerSolution:
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    return LayerSolution(codes, torch.tensor([[scale]]), torch.tensor([[zero]]), 2, 64)


@pytest.mark.parametrize("scale, zero", [(1e5, 0.0), (1.0, -7e4), (1e-9, 1e-9), (3e-7, 0.0)])
def test_what_float16_cannot_hold_is_an_error_that_names_bfloat16(scale, zero):
    with pytest.raises(ValueError, match="float16 cannot hold: use scale_dtype bfloat16"):
        PackedLinear.from_solution(one_group(scale, zero), bias=None, scale_dtype=torch.float16)
    packed = PackedLinear.from_solution(one_group(scale, zero), bias=None, scale_dtype=torch.bfloat16)
    assert abs(packed.scale_NG().item() / scale - 1) <= 2**-7  # one beside the nearest, where that suits the zero


@pytest.mark.parametrize("scale, zero", [(0.01, 1e-9), (1e-9, 0.01), (0.0, 0.0)])
def test_a_value_that_is_nothing_beside_the_other_may_underflow(scale, zero):
    packed = PackedLinear.from_solution(one_group(scale, zero), bias=None, scale_dtype=torch.float16)
    assert abs(packed.scale_NG().item() - scale) + abs(packed.zero_NG().item() - zero) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_an_error(value):
    with pytest.raises(ValueError, match="gone wrong"):
        PackedLinear.from_solution(one_group(value, 0.0), bias=None, scale_dtype=torch.bfloat16)


def test_another_type_for_scales_is_refused():
    with pytest.raises(ValueError, match=r"scale_dtype is torch\.float32"):
        PackedLinear.from_solution(one_group(1.0, 0.0), bias=None, scale_dtype=torch.float32)


def test_it_prints_its_form():
    assert "bits=2, group_size=64, scale_dtype=bfloat16" in repr(packed_layer())
