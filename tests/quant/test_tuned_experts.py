import pytest
import torch
from tiny_experts import EXPERTS, FAMILIES, INNER, TOP_K, make_experts, random_call, random_solutions
from torch import nn

from seedling.kernels.w2a16.groups import group_count
from seedling.quant.packed_experts import PackedExperts
from seedling.quant.tuned_experts import TunedExperts

GROUP = 16


def make_packed(family, **form):
    experts = make_experts(family)
    return PackedExperts.from_solutions(experts, random_solutions(experts, group_size=GROUP, **form))


def explicit_weights(packed, ratio_ENG, shift_ENG):
    """w = s * (c - h) + m in float64 from the definition, with s and m of every column written out."""
    bits, K = packed.bits, packed.layout.K
    group = torch.arange(K) // (K if packed.group_size == -1 else packed.group_size)
    weights = []
    for e in range(EXPERTS):
        scale0, zero0 = packed.scale_zero[e].double().permute(2, 1, 0)
        h = (2**bits - 1) / 2
        scale = scale0 * ratio_ENG[e]
        middle = zero0 + h * scale0 + scale0.abs() * shift_ENG[e]
        codes = torch.round((packed.dequantised_NK(e).double() - zero0[:, group]) / scale0[:, group])
        weights.append(scale[:, group] * (codes - h) + middle[:, group])
    return weights


def plain(experts, call, weights, biases):
    """Token by token and choice by choice."""
    hidden, index, gates = call
    rows = []
    for token in range(len(hidden)):
        row = 0
        for slot in range(TOP_K):
            e = int(index[token, slot])
            inner = experts._apply_gate(weights["gate_up"][e] @ hidden[token] + biases["gate_up"][e])
            row = row + gates[token, slot] * (weights["down"][e] @ inner + biases["down"][e])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_float64_autograd_through_the_explicit_weights(family):
    packed = make_packed(family)
    tuned = TunedExperts.of(packed)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tuned.named_parameters():
        nudge = 0.1 * torch.randn(parameter.shape, generator=generator)
        if not name.endswith("bias"):
            parameter.data += nudge
    call = random_call(23, without=2)
    hidden = call[0].requires_grad_()
    target = torch.randn(hidden.shape, generator=generator)
    (tuned(*call) * target).sum().backward()

    exact = {name: value.detach().double().requires_grad_() for name, value in tuned.named_parameters()}
    hidden64, gates64 = hidden.detach().double().requires_grad_(), call[2].double()
    weights = {
        p: explicit_weights(getattr(packed, p), exact[f"{p}.scale_ratio_ENG"], exact[f"{p}.centre_shift_ENG"])
        for p in ("gate_up", "down")
    }
    biases = {p: exact.get(f"{p}.bias", torch.zeros(EXPERTS, 1)) for p in ("gate_up", "down")}
    out = plain(make_experts(family), (hidden64, call[1], gates64), weights, biases)
    (out * target.double()).sum().backward()

    for name, parameter in [*tuned.named_parameters(), ("hidden", hidden)]:
        wanted = hidden64.grad if name == "hidden" else exact[name].grad
        error = (parameter.grad.double() - wanted).norm() / wanted.norm()
        assert error < 1e-5, f"{name}: {error:.3g}"


def test_an_expert_without_tokens_has_zeros_for_a_gradient():
    tuned = TunedExperts.of(make_packed("gpt_oss"))
    tuned(*random_call(without=1)).square().sum().backward()
    for name, parameter in tuned.named_parameters():
        hit = parameter.grad.flatten(1).abs().sum(1) > 0
        assert hit.tolist() == [True, False, True, True], name


def test_a_batch_without_tokens_has_gradients_as_well():
    tuned = TunedExperts.of(make_packed("gpt_oss"))
    tuned(*(x[:0] for x in random_call())).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tuned.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_they_are_the_packed_experts_bit_for_bit(family, dtype):
    packed = make_packed(family, bits=3)
    tuned, call = TunedExperts.of(packed), random_call(dtype=dtype)
    assert torch.equal(tuned(*call), packed(*call))
    again = tuned.packed()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in packed.state_dict().items())
    assert set(again.state_dict()) == set(packed.state_dict())


def test_training_changes_outputs_and_no_code_and_folds_back():
    packed = make_packed("mixtral")
    tuned, call = TunedExperts.of(packed), random_call()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=0.01)
    target, losses = torch.randn_like(call[0]), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(tuned(*call), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    folded = tuned.packed()
    for projection in ("gate_up", "down"):
        before, after = getattr(packed, projection), getattr(folded, projection)
        assert torch.equal(before.codes, after.codes) and not torch.equal(before.scale_zero, after.scale_zero)
    torch.testing.assert_close(nn.functional.mse_loss(folded(*call), target).item(), losses[-1], rtol=0.05, atol=0)
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_parameters_are_one_per_group_and_not_one_per_weight():
    tuned = TunedExperts.of(make_packed("qwen3_moe"))
    shapes = {name: list(parameter.shape) for name, parameter in tuned.named_parameters()}
    G = group_count(40, GROUP)
    assert shapes["gate_up.scale_ratio_ENG"] == shapes["gate_up.centre_shift_ENG"] == [EXPERTS, 2 * INNER, G]
    assert all(parameter.dtype == torch.float32 for parameter in tuned.parameters())
