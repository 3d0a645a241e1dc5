"""The equation in plain torch, against float64 autograd through an explicit s * c + z."""

import pytest
import torch
from packed_weights import explicit, random_weight
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seedling.kernels.w2a16 import layout as layout_module
from seedling.kernels.w2a16 import reference

BITS, GROUPS = (2, 3, 4, 8), (-1, 32, 64, 96, 128, 512)


def inputs(weight, *, n=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    N, K = weight.layout.N, weight.layout.K
    return torch.randn(n, K, generator=generator).to(dtype), torch.randn(n, N, generator=generator).to(dtype)


def wanted_gradients(x_nK, dy_nN, weight) -> tuple[Tensor, ...]:
    leaves = [x_nK.double().requires_grad_(), weight.scale_zero_GN2.double().requires_grad_()]
    return torch.autograd.grad(explicit(leaves[0], weight, leaves[1]), leaves, dy_nN.double())


def gradients(x_nK, dy_nN, weight):
    return reference.gradients(
        dy_nN, x_nK, weight.codes, weight.scale_zero_GN2, weight.layout, wants_x=True, wants_scale_zero=True
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("tile", [1, 1 << 22])
def test_outputs_and_gradients_are_those_of_autograd_in_float64(bits, group_size, tile, monkeypatch):
    monkeypatch.setattr(layout_module, "TILE_ELEMENTS", tile)
    weight = random_weight(12, 600, bits=bits, group_size=group_size, dtype=torch.float64)  # the last group is short
    x_nK, dy_nN = inputs(weight)
    bias_N = torch.randn(12, dtype=torch.float64)
    y_nN = reference.linear(x_nK, weight.codes, weight.scale_zero_GN2, bias_N, weight.layout)
    torch.testing.assert_close(y_nN, explicit(x_nK, weight, weight.scale_zero_GN2, bias_N), rtol=1e-10, atol=1e-10)
    for found, wanted in zip(gradients(x_nK, dy_nN, weight), wanted_gradients(x_nK, dy_nN, weight), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_bf16_inputs_give_float32_gradients_as_exact_as_their_products(bits, group_size):
    """Of bf16 numbers the products are exact in float32, so scales lose nothing but what dy and x had lost before."""
    weight = random_weight(12, 200, bits=bits, group_size=group_size)
    x_nK, dy_nN = inputs(weight, n=64, dtype=torch.bfloat16)
    found, wanted = (function(x_nK, dy_nN, weight)[1] for function in (gradients, wanted_gradients))
    assert found.dtype == torch.float32 and ((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("group_size", [-1, 64])
def test_the_gradient_of_x_in_bf16_is_as_exact_as_torch(group_size):
    weight = random_weight(12, 200, group_size=group_size)
    x_nK, dy_nN = inputs(weight, n=64, dtype=torch.bfloat16)
    weight_NK = reference.dequantise(weight.codes, weight.scale_zero_GN2, weight.layout, torch.bfloat16)
    wanted = dy_nN.double() @ weight_NK.double()
    found = gradients(x_nK, dy_nN, weight)[0]
    own_error, torch_error = ((value.double() - wanted).abs().max() for value in (found, dy_nN @ weight_NK))
    assert found.dtype == torch.bfloat16 and own_error <= 2 * torch_error + 1e-6


@pytest.mark.parametrize("wants_x, wants_scale_zero", [(True, False), (False, True), (False, False)])
def test_what_is_not_wanted_is_not_made(wants_x, wants_scale_zero):
    weight = random_weight(12, 200)
    x_nK, dy_nN = inputs(weight, dtype=torch.float32)
    every = gradients(x_nK, dy_nN, weight)
    found = reference.gradients(
        dy_nN,
        x_nK,
        weight.codes,
        weight.scale_zero_GN2,
        weight.layout,
        wants_x=wants_x,
        wants_scale_zero=wants_scale_zero,
    )
    for one, other, wanted in zip(found, every, (wants_x, wants_scale_zero), strict=True):
        assert torch.equal(one, other) if wanted else one is None


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
    monkeypatch.setattr(layout_module, "TILE_ELEMENTS", tile)
    weight = random_weight(N, K, group_size=group_size)
    with LargestTensor() as largest:
        gradients(*inputs(weight, n=3, dtype=torch.float32), weight)
    assert 0 < largest.elements <= tile < N * K // 7
