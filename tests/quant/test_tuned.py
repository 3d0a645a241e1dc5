"""The trainable form: what is trained, and what must not change."""

import pytest
import torch
from packed_layers import random_solution
from torch import nn
from torch.utils.checkpoint import checkpoint

from seedling.quant.linear import PackedLinear
from seedling.quant.tuned import TunedLinear

BITS, GROUPS = (2, 3, 4, 8), (-1, 32, 64, 96, 128, 512)


def packed_layer(N=12, K=200, *, bits=2, group_size=64, bias=True, scale_dtype=torch.bfloat16) -> PackedLinear:
    solution = random_solution(N, K, bits=bits, group_size=group_size)
    bias_N = torch.randn(N, generator=torch.Generator().manual_seed(9)) if bias else None
    return PackedLinear.from_solution(solution, bias=bias_N, scale_dtype=scale_dtype)


def test_ratio_and_shift_move_scale_and_centre_apart():
    layer = packed_layer(bits=4)
    tuned = TunedLinear.of(layer)
    scale0, zero0 = layer.scale_NG(), layer.zero_NG()
    with torch.no_grad():
        tuned.scale_ratio_NG.mul_(1.5)
        scale, zero = tuned.scale_zero_GN2().permute(2, 1, 0)
        torch.testing.assert_close(scale, 1.5 * scale0)
        torch.testing.assert_close(zero + 7.5 * scale, zero0 + 7.5 * scale0)  # the centre stays
        tuned.centre_shift_NG.add_(0.25)
        torch.testing.assert_close(tuned.scale_zero_GN2()[..., 1].T, zero + 0.25 * scale0.abs())


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
