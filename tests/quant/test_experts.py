"""A layer of experts from calibration to a Hugging Face folder and back."""

import copy
import logging

import pytest
import torch
from packed_layers import make_recogniser
from tiny_experts import EXPERTS, FAMILIES, NAME, make_experts, make_moe, random_call, random_solution, random_solutions
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from seedling.model.audio_llm import AudioLLM
from seedling.quant import hf, solve_layer
from seedling.quant.expert_inputs import ExpertCall
from seedling.quant.expert_layout import fused_experts, routing_layers
from seedling.quant.expert_problems import ALL_TOKENS
from seedling.quant.experts import quantise_experts
from seedling.quant.packed_experts import PackedExperts
from seedling.quant.packed_model import codes_hash, fold, model_storage, packed_modules, replace_module, tune


def solved(problem):
    return random_solution(tuple(problem.weight_NK.shape), seed=problem.expert + 100 * (problem.projection == "down"))


def make_packed_moe(family):
    llm = make_moe(family)
    for name, experts in fused_experts(llm).items():
        replace_module(llm, name, PackedExperts.from_solutions(experts, random_solutions(experts)))
    return llm


@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_end_up_with_their_experts_and_down_is_solved_behind_the_packed_gate_up(family):
    experts, call = make_experts(family), random_call(60)
    before, problems = copy.deepcopy(experts.state_dict()), []

    def solve(problem):
        problems.append(problem)
        return solved(problem)

    packed, fallbacks = quantise_experts(experts, [ExpertCall(*call[:2])], solve, name=NAME)
    assert fallbacks == {} and [p.name for p in problems[:2]] == [f"{NAME}.gate_up.0", f"{NAME}.gate_up.1"]
    wanted = PackedExperts.from_solutions(experts, random_solutions(experts))
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in packed.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())
    for problem in problems[EXPERTS:]:
        rows_nK = call[0][(call[1] == problem.expert).any(1)]
        inner = experts._apply_gate(packed.gate_up.one(rows_nK, problem.expert)).detach().double()
        torch.testing.assert_close(problem.moments.mean_KK(), inner.T @ inner / len(inner), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_solved_experts_err_less_than_rounded_ones_on_tokens_that_they_have_not_seen(family):
    experts, mix_DD = make_experts(family), torch.randn(40, 40, generator=torch.Generator().manual_seed(5))
    (seen, *routing), unseen = (
        (call[0] @ mix_DD / 40**0.5, *call[1:]) for call in (random_call(800), random_call(400, seed=1))
    )
    exact, errors = experts(*unseen), {}
    for method in ("rtn", "default"):

        def solve(problem, method=method):
            H_KK = problem.moments.mean_KK().float()
            return solve_layer(problem.weight_NK, H_KK, bits=2, group_size=16, method=method)

        packed, _ = quantise_experts(experts, [ExpertCall(seen, routing[0])], solve, name=NAME)
        errors[method] = float((packed(*unseen) - exact).detach().norm())
    assert errors["default"] < 0.8 * errors["rtn"]


def test_a_starved_expert_is_logged_and_reported(caplog):
    caplog.set_level(logging.WARNING)
    _, fallbacks = quantise_experts(
        make_experts("qwen3_moe"), [ExpertCall(*random_call(60, without=2)[:2])], solved, name=NAME
    )
    assert fallbacks == {f"{NAME}.gate_up.2": ALL_TOKENS, f"{NAME}.down.2": ALL_TOKENS}
    starved = "2 (0 tokens, calibrated on all tokens of the layer)"
    for projection, logged in zip(("gate_up", "down"), caplog.messages, strict=True):
        assert logged == (
            f"{NAME}.{projection}: too few tokens for 1 of 4 experts: {starved}; more calibration data cures that"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_the_same_and_saves_the_same(family, tmp_path):
    hf.register()
    llm = make_packed_moe(family)
    hf.declare_packed(llm)
    llm.save_pretrained(tmp_path / "a")
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
        assert codes_hash(again) == codes_hash(llm) and list(packed_modules(again)) == list(packed_modules(llm))
        for name, packed in packed_modules(llm).items():
            loaded = again.get_submodule(name)
            assert torch.equal(loaded.down.scale_zero, packed.down.scale_zero)
            assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not {type(m).__name__ for m in again.modules()} & {"Qwen3MoeExperts", "MixtralExperts", "GptOssExperts"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(again(ids).logits, llm(ids).logits)
    hf.declare_packed(again)
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_recogniser_around_experts_loads_the_same(family, tmp_path):
    hf.register()
    model = make_recogniser(family)
    for name, experts in fused_experts(model).items():
        replace_module(model, name, PackedExperts.from_solutions(experts, random_solutions(experts)))
    hf.declare_packed(model)
    model.save_pretrained(tmp_path)
    again = AudioLLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert set(packed_modules(again)) == {f"llm.model.layers.{at}.mlp.experts" for at in range(2)}
    ids = torch.randint(2, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.llm(ids).logits, model.llm(ids).logits) and codes_hash(again) == codes_hash(model)


def test_a_folder_whose_experts_do_not_fit_the_model_is_refused(tmp_path):
    config = hf.DecoupleQConfig(matrices=_forms(make_packed_moe("mixtral")))
    with pytest.raises(
        ValueError, match=r"packed as experts \{'gate_up': \[4, 48, 40\].*and the model has Qwen3MoeExperts"
    ):
        llm = make_moe("qwen3_moe")
        llm.model.layers[0].mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(3, 40, 24))
        llm.model.layers[0].mlp.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 48, 40))
        hf.place_packed(llm, config)


def _forms(llm):
    hf.declare_packed(llm)
    return llm.config.quantization_config.matrices


def test_a_packed_model_is_tuned_and_folded_in_place():
    llm = make_packed_moe("mixtral")
    ids = torch.randint(2, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    logits, codes = llm(ids).logits, codes_hash(llm)
    tune(llm)
    assert torch.equal(llm(ids).logits, logits) and codes_hash(llm) == codes
    llm(ids).logits.square().mean().backward()
    trained = [name for name, parameter in llm.named_parameters() if "_ENG" in name and parameter.grad is not None]
    assert len(trained) == 8
    fold(llm)
    assert torch.equal(llm(ids).logits, logits) and codes_hash(llm) == codes


def test_bits_are_counted_for_every_projection():
    matrices = {matrix.name: matrix for matrix in model_storage(make_packed_moe("qwen3_moe")).matrices}
    assert matrices[f"{NAME}.gate_up"].weights == EXPERTS * 48 * 40
    assert matrices[f"{NAME}.down"].bits == 8 * EXPERTS * (64 // 4 * 40 + 2 * 40 * 2 * 2)


def test_layers_that_only_route_are_told_from_those_that_compute():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 100, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    shared = Qwen2MoeConfig(**shape, moe_intermediate_size=24, shared_expert_intermediate_size=24)
    with torch.device("meta"):
        assert routing_layers(AutoModelForCausalLM.from_config(shared)) == {
            f"model.layers.{at}.mlp.shared_expert_gate" for at in range(2)
        }
    mlp = torch.nn.ModuleDict(
        {
            "gate": torch.nn.Linear(40, EXPERTS, bias=False),
            "experts": make_experts("mixtral"),
            "shared_expert": torch.nn.ModuleDict({"up_proj": torch.nn.Linear(40, 24)}),
        }
    )
    assert routing_layers(torch.nn.ModuleDict({"mlp": mlp, "head": torch.nn.Linear(40, EXPERTS)})) == {"mlp.gate"}
    assert routing_layers(mlp) == {"gate"}
    assert routing_layers(make_moe("mixtral")) == set()
