import copy

import pytest
import torch
from tiny_experts import EXPERTS, FAMILIES, NAME, make_experts, make_moe, overwrite, random_call, random_solutions

from seedling.quant.packed_experts import PackedExperts


def packed_and_original(family, **form):
    experts = make_experts(family)
    solutions = random_solutions(experts, **form)
    packed = PackedExperts.from_solutions(experts, solutions)
    overwrite(experts, solutions)
    return packed, experts


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_equal_the_module_with_dequantised_weights(family, bits):
    packed, experts = packed_and_original(family, bits=bits)
    call = random_call()
    torch.testing.assert_close(packed(*call), experts(*call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [-1, 16, 64])
def test_group_sizes_that_divide_nothing_are_right(group_size):
    packed, experts = packed_and_original("qwen3_moe", group_size=group_size)
    call = random_call()
    torch.testing.assert_close(packed(*call), experts(*call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_gives_the_same_logits_whatever_its_experts_implementation(family, implementation):
    llm = make_moe(family, experts_implementation=implementation)
    quantised = copy.deepcopy(llm)
    for at in range(2):
        name = NAME.replace("0", str(at))
        solutions = random_solutions(llm.get_submodule(name))
        packed = PackedExperts.from_solutions(llm.get_submodule(name), solutions)
        quantised.get_submodule(name.removesuffix(".experts")).experts = packed
        overwrite(llm.get_submodule(name), solutions)
    ids = torch.randint(2, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantised(ids).logits, llm(ids).logits, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_they_are_as_exact_as_the_original():
    packed, experts = packed_and_original("mixtral")
    call = random_call()
    exact = experts.double()(*(x.double() if x.is_floating_point() else x for x in call))
    call = random_call(dtype=torch.bfloat16)
    original, ours = experts.bfloat16()(*call), packed.bfloat16()(*call)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 1.5 * (original - exact).abs().max()


def test_an_expert_that_no_token_goes_to_and_no_token_at_all():
    packed, experts = packed_and_original("qwen3_moe")
    call = random_call(without=1)
    torch.testing.assert_close(packed(*call), experts(*call), rtol=1e-5, atol=1e-5)
    assert packed(*(x[:0] for x in call)).shape == (0, call[0].shape[1])


def test_the_experts_of_other_processes_add_nothing():
    packed, experts = packed_and_original("qwen3_moe")
    hidden, index, weights = random_call()
    index[::2, 0] = EXPERTS
    torch.testing.assert_close(packed(hidden, index, weights), experts(hidden, index, weights), rtol=1e-5, atol=1e-5)


def test_a_state_dict_fills_an_empty_one_and_casting_spares_codes_and_scales():
    packed, _ = packed_and_original("gpt_oss", bits=3)
    with torch.device("meta"):
        module = make_experts("gpt_oss")
    empty = PackedExperts.place_for(module, packed.matrices(), name=NAME).to_empty(device="cpu")
    state = packed.state_dict()
    assert set(state) == {f"{p}.{t}" for p in ("gate_up", "down") for t in ("codes", "scale_zero", "bias")}
    empty.load_state_dict(state)
    call = random_call()
    assert torch.equal(empty(*call), packed(*call))
    packed.half()
    assert packed.gate_up.scale_zero.dtype == torch.bfloat16 and packed.gate_up.codes.dtype == torch.uint8
    assert packed.gate_up.bias.dtype == torch.float16


def test_bits_per_weight_are_those_of_the_file():
    packed, _ = packed_and_original("qwen3_moe", group_size=16)
    # Of 24 columns in the space of 64 at 2 bits, and two groups with 32 bits each: (128 + 64) / 24.
    assert packed.down.bits_per_weight == 8.0


def test_solutions_that_do_not_fit_are_refused():
    experts = make_experts("qwen3_moe")
    solutions = random_solutions(experts)
    with pytest.raises(ValueError, match=r"^here\.down has 3 solutions"):
        PackedExperts.from_solutions(experts, {**solutions, "down": solutions["down"][:3]}, name="here")
    mixed = [*solutions["down"][:3], random_solutions(experts, bits=4)["down"][3]]
    with pytest.raises(ValueError, match="one tensor and need the same"):
        PackedExperts.from_solutions(experts, {**solutions, "down": mixed})
