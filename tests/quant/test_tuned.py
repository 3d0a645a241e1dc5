"""The trainable form: gradients against float64 autograd through an explicit s * c + z, and what must not change."""

import pytest
import torch
from packed_layers import random_solution
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from seedling.quant import linear
from seedling.quant.linear import PackedLinear
from seedling.quant.tuned import TunedLinear, group_sums, packed_product

BITS, GROUPS = (2, 3, 4, 8), (-1, 32, 64, 96, 128, 512)
NAMES = ("x", "scale", "zero", "bias")


def packed_layer(N=12, K=200, *, bits=2, group_size=64, bias=True, scale_dtype=torch.bfloat16) -> PackedLinear:
    solution = random_solution(N, K, bits=bits, group_size=group_size)
    bias_N = torch.randn(N, generator=torch.Generator().manual_seed(9)) if bias else None
    return PackedLinear.from_solution(solution, bias=bias_N, scale_dtype=scale_dtype)


def explicit(layer, x, scale_NG, zero_NG, bias_N) -> Tensor:
    """x (s * c + z)^T + b as anyone would write it, for autograd."""
    g = layer.in_features if layer.layout.group_size == -1 else layer.layout.group_size
    group_K = torch.arange(layer.in_features) // g
    weight_NK = scale_NG[:, group_K] * layer.codes_NK().to(x.dtype) + zero_NG[:, group_K]
    return x @ weight_NK.T + (0 if bias_N is None else bias_N)


def gradients(function, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, dy))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("tile", [1, 1 << 22])
def test_gradients_are_those_of_autograd_in_float64(bits, group_size, tile, monkeypatch):
    monkeypatch.setattr(linear, "TILE_ELEMENTS", tile)
    layer = packed_layer(K=600, bits=bits, group_size=group_size)  # the last group is short
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 5, 600, generator=generator).double(), torch.randn(2, 5, 12, generator=generator).double()
    inputs = [x, layer.scale_NG().double(), layer.zero_NG().double(), layer.bias.data.double()]
    wanted = gradients(lambda *inputs: explicit(layer, *inputs), inputs, dy)
    found = gradients(lambda x, s, z, b: packed_product(x, layer.codes, s, z, b, layout=layer.layout), inputs, dy)
    for name, one, other in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def trained_inputs(layer: PackedLinear, *, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, layer.in_features, generator=generator).to(dtype)
    return x, torch.randn(64, layer.out_features, generator=generator).to(dtype)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_bf16_inputs_give_float32_gradients_as_exact_as_their_products(bits, group_size):
    """Of bf16 numbers the products are exact in float32, so scales lose nothing but what dy and x had lost before."""
    layer = packed_layer(bits=bits, group_size=group_size)
    x, dy = trained_inputs(layer, dtype=torch.bfloat16)
    scales = [layer.scale_NG(), layer.zero_NG()]
    product = lambda s, z: packed_product(x, layer.codes, s, z, None, layout=layer.layout)  # noqa: E731
    found = gradients(product, scales, dy)
    wanted = gradients(
        lambda s, z: explicit(layer, x.double(), s, z, None), [value.double() for value in scales], dy.double()
    )
    for name, one, other in zip(NAMES[1:3], found, wanted, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert one.dtype == torch.float32 and error < 1e-5, f"{name}: {error:.2g}"


@pytest.mark.parametrize("group_size", [-1, 64])
def test_the_gradient_of_x_in_bf16_is_as_exact_as_torch(group_size):
    layer = packed_layer(group_size=group_size)
    x, dy = trained_inputs(layer, dtype=torch.bfloat16)
    weight_NK = layer.dequantised_NK(torch.bfloat16)
    wanted = dy.double() @ weight_NK.double()
    (found,) = gradients(
        lambda x: packed_product(x, layer.codes, layer.scale_NG(), layer.zero_NG(), None, layout=layer.layout), [x], dy
    )
    own_error, torch_error = ((value.double() - wanted).abs().max() for value in (found, dy @ weight_NK))
    assert found.dtype == torch.bfloat16 and own_error <= 2 * torch_error + 1e-6


def test_ratio_and_shift_move_scale_and_centre_apart():
    layer = packed_layer(bits=4)
    tuned = TunedLinear.of(layer)
    scale0, zero0 = layer.scale_NG(), layer.zero_NG()
    with torch.no_grad():
        tuned.scale_ratio_NG.mul_(1.5)
        scale, zero = tuned.scale_and_zero()
        torch.testing.assert_close(scale, 1.5 * scale0)
        torch.testing.assert_close(zero + 7.5 * scale, zero0 + 7.5 * scale0)  # the centre stays
        tuned.centre_shift_NG.add_(0.25)
        torch.testing.assert_close(tuned.scale_and_zero()[1], zero + 0.25 * scale0.abs())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_outputs_and_bytes_are_those_of_the_packed_layer(bits, group_size, scale_dtype, dtype):
    layer = packed_layer(bits=bits, group_size=group_size, scale_dtype=scale_dtype).to(dtype)
    layer.scale_zero[0, 0] = 0.0
    tuned = TunedLinear.of(layer)
    x = torch.randn(7, 200).to(dtype)
    assert torch.equal(tuned(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tuned(x.float()), layer(x.float()))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.0)
    tuned(x).sum().backward()
    optimizer.step()
    folded = tuned.packed()
    assert folded.state_dict().keys() == layer.state_dict().keys()
    for name, value in layer.state_dict().items():
        found = folded.state_dict()[name]
        assert found.dtype == value.dtype and torch.equal(found.view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("autocast", [False, True])
def test_training_lowers_the_loss_and_leaves_the_codes(autocast):
    layer = packed_layer(24, 200)
    codes = layer.codes.clone()
    tuned, target = TunedLinear.of(layer), packed_layer(24, 200)
    target.scale_zero[..., 0] *= 1.25
    x = torch.randn(256, 200)
    optimizer, losses = torch.optim.Adam(tuned.parameters(), lr=0.01), []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (tuned(x).float() - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    folded = tuned.packed()
    assert losses[-1] < 0.05 * losses[0]
    assert torch.equal(folded.codes, codes) and (folded(x) - target(x)).square().mean() < 0.06 * losses[0]


def test_gradients_under_checkpointing_are_the_same():
    tuned = TunedLinear.of(packed_layer())
    x = torch.randn(9, 200, requires_grad=True)
    leaves = [x, *tuned.parameters()]
    plain = torch.autograd.grad(tuned(x).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(tuned, x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation has given a new tensor of floating-point numbers."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("group_size", [-1, 64, 512])
def test_the_backward_pass_forms_no_tensor_of_the_weights_size(group_size, monkeypatch):
    N, K, tile = 96, 4096, 96 * 512
    monkeypatch.setattr(linear, "TILE_ELEMENTS", tile)
    tuned = TunedLinear.of(packed_layer(N, K, group_size=group_size))
    x = torch.randn(3, K, requires_grad=True)
    y = tuned(x)
    with LargestTensor() as largest:
        y.sum().backward()
    assert 0 < largest.elements <= tile < N * K // 7
    assert tuned.scale_ratio_NG.grad is not None and x.grad is not None


@pytest.mark.parametrize("K", [1, 5, 8, 9])
@pytest.mark.parametrize("group_size", [-1, 4, 8, 20])
def test_sums_over_groups_are_those_of_each_group(K, group_size):
    values = torch.randn(K, 3).double()
    wanted = torch.stack([part.sum(0) for part in values.split(K if group_size == -1 else group_size)])
    torch.testing.assert_close(group_sums(values, group_size), wanted)


def test_scales_that_are_to_be_trained_in_16_bits_are_refused():
    tuned = TunedLinear.of(packed_layer()).bfloat16()
    with pytest.raises(ValueError, match="keep parameters in float32"):
        tuned(torch.randn(2, 200).bfloat16())


def test_a_group_of_scale_zero_can_still_move():
    layer = packed_layer(2, 64)
    layer.scale_zero[:, :, 0] = 0.0
    tuned = TunedLinear.of(layer)
    tuned(torch.ones(1, 64)).sum().backward()
    assert (tuned.centre_shift_NG.grad != 0).all()


def test_its_files_do_not_pass_for_a_packed_layer():
    packed = packed_layer()
    assert "scale_zero" not in nn.ModuleDict({"a": TunedLinear.of(packed)}).state_dict()
    with pytest.raises(RuntimeError, match="scale_zero"):
        packed.load_state_dict(TunedLinear.of(packed).state_dict(), strict=True)
