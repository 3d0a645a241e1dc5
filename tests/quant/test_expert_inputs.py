import pytest
import torch
from tiny_experts import EXPERTS, FAMILIES, NAME, make_experts, make_moe, random_call, random_solutions

from seedling.quant.block_input import BlockInput
from seedling.quant.expert_inputs import ExpertCall, ReplayedCalls, expert_inputs
from seedling.quant.expert_layout import DOWN, GATE_UP, expert_layout
from seedling.quant.packed_experts import PackedMatrices


def by_hand(module, call, projection, valid, weights_NK=None):
    """expert -> rows, token by token in float32; gate_up weights of the module unless others are given."""
    hidden, index, _ = call
    transposed, rows = type(module).__name__ == "GptOssExperts", {}
    for token in range(len(hidden)):
        for expert in index[token].tolist() if valid[token] else ():
            row = hidden[token]
            if projection == DOWN:
                weight = module.gate_up_proj[expert].T if transposed else module.gate_up_proj[expert]
                weight = weight if weights_NK is None else weights_NK[expert]
                bias = module.gate_up_proj_bias[expert] if transposed else 0
                row = module._apply_gate((weight @ row + bias)[None])[0]
            rows.setdefault(expert, []).append(row)
    return {expert: torch.stack(found).detach() for expert, found in sorted(rows.items())}


def inputs(module, call, **options):
    layout = expert_layout(module, name=NAME)
    with torch.no_grad():
        return dict(expert_inputs(module, call, layout=layout, **{"experts": range(EXPERTS), **options}))


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for expert, rows in wanted.items():
        torch.testing.assert_close(found[expert], rows, rtol=1e-5, atol=1e-5, msg=f"expert {expert}")


@pytest.mark.parametrize("projection", [GATE_UP, DOWN])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_a_loop_over_tokens_and_padding_has_no_part(family, projection):
    module, call = make_experts(family), random_call(31, without=3)
    valid_n = torch.arange(31) % 4 > 0
    call[0][~valid_n] = float("nan")
    found = inputs(module, ExpertCall(call[0], call[1], valid_n), projection=projection)
    assert_same(found, by_hand(module, call, projection, valid_n))
    assert 3 not in found


def test_down_sees_what_the_quantised_gate_up_gives():
    module, call = make_experts("gpt_oss"), random_call(31)
    solutions = random_solutions(module)["gate_up"]
    layout = expert_layout(module, name=NAME)
    packed = PackedMatrices.from_solutions(solutions, bias=layout.bias_EN(module, GATE_UP))
    found = inputs(module, ExpertCall(call[0], call[1]), projection=DOWN, gate_up=packed)
    weights = [solution.dequantised_NK() for solution in solutions]
    assert_same(found, by_hand(module, call, DOWN, [True] * 31, weights))


@pytest.mark.parametrize("projection", [GATE_UP, DOWN])
def test_a_starved_expert_gets_every_valid_token(projection):
    module, call = make_experts("qwen3_moe"), random_call(31)
    valid_n = torch.arange(31) % 4 > 0
    found = inputs(module, ExpertCall(call[0], call[1], valid_n), projection=projection, experts=[1, 2], starved=[2])
    everywhere = call[0], torch.full_like(call[1][:, :1], 2), None
    assert_same({2: found[2]}, by_hand(module, everywhere, projection, valid_n))
    assert_same({1: found[1]}, {1: by_hand(module, call, projection, valid_n)[1]})


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_calls_are_those_of_the_running_model(family):
    llm, seen, doors = make_moe(family), [], []
    experts, block = llm.get_submodule(NAME), llm.model.layers[0]
    hooks = [
        block.register_forward_pre_hook(lambda _, a, k: doors.append(BlockInput(a, k, mask)), with_kwargs=True),
        experts.register_forward_pre_hook(lambda _, a, k: seen.append((*a, *k.values())), with_kwargs=True),
    ]
    with torch.no_grad():
        for seed in range(2):
            mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
            ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(seed))
            llm(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    calls = ReplayedCalls(block, experts, doors, numbers=range(5, 5 + 2 * len(doors), 2))
    for _ in range(2):  # they can be iterated over again
        for number, (call, (hidden, index, _)) in enumerate(zip(calls, seen, strict=True)):
            assert torch.equal(call.hidden_nK, hidden) and torch.equal(call.index_nk, index)
            assert call.batch == 5 + 2 * number and torch.equal(call.valid_n, mask.reshape(-1))
            assert len(call.everyone()) == 14
    assert not experts._forward_pre_hooks


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts is called with \[50, 40\] for a batch of \[2, 24\]"):
        ExpertCall.of(make_experts("qwen3_moe"), random_call(50), {}, valid_BT=torch.ones(2, 24, dtype=torch.bool))
