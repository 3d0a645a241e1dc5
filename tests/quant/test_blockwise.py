"""Refinement of blocks: never worse on held-out sequences, integers and padding without a say, a known optimum reached.

Shape letters: B sequences, T positions, D width, N output channels, K input channels, G groups per row.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from streamed_models import GridSolver, make_llm
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from seedling.quant.block_input import BlockInput
from seedling.quant.blockwise import RefineConfig, rate_share, refine_block
from seedling.quant.expert_layout import PROJECTIONS, expert_layout
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_experts import PackedExperts
from seedling.quant.packed_model import codes_hash, packed_modules, replace_module

FAST = RefineConfig(epochs=3, lr=3e-3, norm_lr=3e-3, batch=1, held_out=0.2)


class NormThenLinear(nn.Module):
    """A block with a norm, a bias and a residual; it returns a tuple, as some decoder layers do."""

    def __init__(self, D: int):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, hidden_BTD, *, gain=1.0):
        return hidden_BTD + gain * self.proj(self.norm(hidden_BTD)), "not a tensor"


def quantise(block: nn.Module, *, bits: int = 2, group_size: int = 16, dtype=torch.bfloat16) -> nn.Module:
    for name, module in list(block.named_modules()):
        if type(module) is nn.Linear:
            solution = GridSolver()(module.weight.detach().float(), None, bits=bits, group_size=group_size)
            replace_module(block, name, PackedLinear.from_solution(solution, bias=module.bias, scale_dtype=dtype))
    return block


def small_case(*, batches: int = 6, scale: float = 1.0, valid=None, seed: int = 0):
    """Return a quantised block, its inputs, and what its full-precision form gives."""
    torch.manual_seed(seed)
    exact = NormThenLinear(20).eval()
    nn.init.normal_(exact.proj.bias, std=0.3)
    nn.init.normal_(exact.norm.weight, mean=1.0, std=0.2)
    hidden = [scale * torch.randn(2, 7, 20) for _ in range(batches)]
    with torch.no_grad():
        targets = [exact(one)[0] for one in hidden]
    return quantise(exact), [BlockInput((one,), {}, valid) for one in hidden], targets


def llama_case(dtype: torch.dtype):
    """A decoder layer with padding behind an attention mask, and rotary tables in its kwargs."""
    torch.manual_seed(3)
    cfg = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa"
    )
    layer, rotary = LlamaDecoderLayer(cfg, 0).to(dtype).eval(), LlamaRotaryEmbedding(cfg)
    inputs, targets = [], []
    for T in (6, 9, 7, 8, 5):
        hidden_BTD = torch.randn(2, T, 32).to(dtype)
        valid_BT = torch.arange(T) < torch.tensor([[T], [T - 3]])
        seen = valid_BT[:, None, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
        mask = torch.zeros(2, 1, T, T, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        kwargs = {
            "attention_mask": mask,
            "position_embeddings": rotary(hidden_BTD, torch.arange(T)[None]),
            "past_key_values": None,
        }
        inputs.append(BlockInput((hidden_BTD,), kwargs, valid_BT))
        with torch.no_grad():
            targets.append(layer(hidden_BTD, **kwargs))
    return quantise(layer), inputs, targets


def tensors_of(block: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in block.state_dict().items()}


def same_bytes(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].numpy(force=True).tobytes() == other[key].numpy().tobytes()
        if one[key].dtype != torch.bfloat16
        else torch.equal(one[key].view(torch.int16), other[key].view(torch.int16))
        for key in one
    )


def error_of(block: nn.Module, inputs: list[BlockInput], targets: list[torch.Tensor]) -> float:
    """Mean squared error over all valid positions in float64, in plain words."""
    squares, count = 0.0, 0
    with torch.no_grad():
        for given, target in zip(inputs, targets):
            output = block(*given.args, **given.kwargs)
            output = output[0] if isinstance(output, tuple) else output
            for b in range(len(target)):
                for t in range(target.shape[1]):
                    if given.valid_BT is None or given.valid_BT[b, t]:
                        squares += float((output[b, t].double() - target[b, t].double()).square().sum())
                        count += target.shape[2]
    return squares / count


def test_refinement_lowers_the_error_and_leaves_the_integers():
    block, inputs, targets = small_case()
    modules, codes, before = packed_modules(block), codes_hash(block), error_of(block, inputs, targets)
    report = refine_block(block, inputs, targets, cfg=dataclasses.replace(FAST, epochs=20, patience=20), name="block")
    assert report.kept and report.after < 0.9 * report.before
    assert error_of(block, inputs, targets) < 0.9 * before
    assert codes_hash(block) == codes
    assert packed_modules(block) == modules, "the block has other modules than before"
    assert not any(parameter.grad is not None for parameter in block.parameters())


def test_the_reported_losses_are_those_of_the_block_before_and_after():
    """With all sequences but one batch alike, which one was held out does not matter."""
    block, inputs, targets = small_case(batches=1)
    inputs, targets = inputs * 4, targets * 4
    wanted = error_of(block, inputs, targets)
    report = refine_block(block, inputs, targets, cfg=dataclasses.replace(FAST, held_out=0.3), name="block")
    assert report.before * report.variance == pytest.approx(wanted, rel=1e-5)
    assert report.after * report.variance == pytest.approx(error_of(block, inputs, targets), rel=1e-5)
    stacked_nD = targets[0].double().flatten(0, 1)
    assert report.variance == pytest.approx(float(stacked_nD.var(0, correction=0).mean()), rel=1e-6)
    assert report.held_out_positions == targets[0].shape[0] * targets[0].shape[1]


@pytest.mark.parametrize("lr", [1e3, 1e30, 30.0])
def test_an_absurd_learning_rate_leaves_the_block_bit_for_bit(lr, caplog):
    block, inputs, targets = small_case()
    before = tensors_of(block)
    report = refine_block(block, inputs, targets, cfg=dataclasses.replace(FAST, lr=lr, norm_lr=lr), name="block 7")
    assert not report.kept and report.after == report.before
    assert same_bytes(tensors_of(block), before)
    assert "block 7" in caplog.text and report.stopped in caplog.text


def test_a_learning_rate_of_0_leaves_the_block_bit_for_bit():
    block, inputs, targets = llama_case(torch.bfloat16)
    before = tensors_of(block)
    report = refine_block(block, inputs, targets, cfg=dataclasses.replace(FAST, lr=0.0, norm_lr=0.0), name="block")
    assert not report.kept and report.epoch_losses == [report.before] * len(report.epoch_losses)
    assert same_bytes(tensors_of(block), before)


def test_targets_that_the_block_meets_already_are_left_alone():
    block, inputs, _ = small_case()
    with torch.no_grad():
        targets = [block(*given.args)[0] for given in inputs]
    report = refine_block(block, inputs, targets, cfg=FAST, name="block")
    assert report.steps == 0 and report.after == 0 and "0" in report.stopped


def test_the_best_epoch_is_kept_when_later_ones_are_worse():
    """Training sequences of pure noise: what they teach is wrong, and the held-out loss says so."""
    block, inputs, targets = small_case(batches=8)
    cfg = dataclasses.replace(FAST, lr=3e-2, norm_lr=3e-2, epochs=12, patience=3, held_out=1 / 8)
    noise = [target + torch.randn_like(target) * 3 for target in targets]
    held = held_out_batch(block, inputs, targets, cfg)
    noise[held] = targets[held]
    report = refine_block(block, inputs, noise, cfg=cfg, name="block")
    losses = [report.before, *report.epoch_losses]
    assert report.after == min(losses) == losses[report.best_epoch]
    assert report.stopped == "no better for 3 epochs" and len(report.epoch_losses) < 12
    assert error_of(block, [inputs[held]], [noise[held]]) == pytest.approx(report.after * report.variance, rel=1e-5)


def held_out_batch(block, inputs, targets, cfg) -> int:
    """Find the held-out batch from outside: the one whose target moves the loss before anything was trained."""
    cfg = dataclasses.replace(cfg, lr=0.0, norm_lr=0.0, epochs=1)
    plain = refine_block(copy.deepcopy(block), inputs, targets, cfg=cfg, name="block").before
    found = []
    for at in range(len(inputs)):
        moved = [target + (i == at) for i, target in enumerate(targets)]
        if refine_block(copy.deepcopy(block), inputs, moved, cfg=cfg, name="block").before != plain:
            found.append(at)
    assert len(found) == 1
    return found[0]


def least_squares(x_nK, y_nN, codes_NK, *, group_size):
    """Return the weights of the best scale and zero per row and group, by numpy.linalg.lstsq row by row."""
    x_nK, y_nN, codes_NK = (value.double().numpy() for value in (x_nK, y_nN, codes_NK))
    N, K = codes_NK.shape
    groups = [slice(first, min(first + group_size, K)) for first in range(0, K, group_size)]
    weight_NK = np.empty((N, K))
    for r in range(N):
        columns = [x_nK[:, j] @ codes_NK[r, j] for j in groups] + [x_nK[:, j].sum(1) for j in groups]
        solved = np.linalg.lstsq(np.stack(columns, 1), y_nN[:, r], rcond=None)[0]
        for at, j in enumerate(groups):
            weight_NK[r, j] = solved[at] * codes_NK[r, j] + solved[len(groups) + at]
    return torch.from_numpy(weight_NK)


def test_a_single_layer_comes_near_the_least_squares_optimum():
    torch.manual_seed(1)
    exact = nn.Linear(20, 6, bias=False)
    hidden = [torch.randn(8, 24, 20) @ (torch.eye(20) + 0.3 * torch.randn(20, 20)) for _ in range(8)]
    targets = [exact(one).detach() for one in hidden]
    solution = GridSolver()(exact.weight.detach(), None, bits=2, group_size=16)
    # float16: bfloat16's steps of 0.4 % would be seen beside what is left of the error.
    layer = PackedLinear.from_solution(solution, bias=None, scale_dtype=torch.float16)
    x_nK, y_nN = torch.cat([one.flatten(0, 1) for one in hidden]), torch.cat([one.flatten(0, 1) for one in targets])
    best_NK = least_squares(x_nK, y_nN, solution.codes_NK, group_size=16)
    bound = float((x_nK.double() @ best_NK.T - y_nN).square().mean())

    inputs = [BlockInput((one,), {}, None) for one in hidden]
    before = error_of(layer, inputs, targets)
    cfg = RefineConfig(epochs=40, patience=40, lr=2e-2, batch=8, held_out=0.1, min_lr_ratio=0.0)
    refine_block(layer, inputs, targets, cfg=cfg, name="layer")
    after = error_of(layer, inputs, targets)
    assert bound * 0.999 <= after, "no scale and zero can be better than least squares"
    assert after - bound < 0.02 * (before - bound), f"{before} -> {after}, the optimum is {bound}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_layer_is_refined_in_its_own_types(dtype):
    block, inputs, targets = llama_case(dtype)
    types = {key: value.dtype for key, value in block.state_dict().items()}
    report = refine_block(block, inputs, targets, cfg=dataclasses.replace(FAST, epochs=6), name="block")
    assert report.kept and report.after < 0.95 * report.before
    assert {key: value.dtype for key, value in block.state_dict().items()} == types
    assert block.input_layernorm.weight.dtype == dtype


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_refined_like_linear_layers(family):
    torch.manual_seed(2)
    block = make_llm(family).model.layers[0].mlp
    hidden = [torch.randn(2, 9, 32) for _ in range(8)]
    with torch.no_grad():
        targets = [block(one) for one in hidden]
    layout, solutions = expert_layout(block.experts, name="experts"), {}
    for projection in PROJECTIONS:
        weights = [layout.weight_NK(block.experts, projection, expert).detach() for expert in range(layout.experts)]
        solutions[projection] = [GridSolver()(weight_NK, None, bits=2, group_size=16) for weight_NK in weights]
    block.experts = PackedExperts.from_solutions(block.experts, solutions)
    codes, inputs = codes_hash(block), [BlockInput((one,), {}, None) for one in hidden]
    before = error_of(block, inputs, targets)
    report = refine_block(block, inputs, targets, cfg=dataclasses.replace(FAST, epochs=5), name="block")
    assert report.kept and report.after < 0.95 * report.before
    assert error_of(block, inputs, targets) < 0.95 * before
    assert codes_hash(block) == codes


def test_padding_does_not_change_the_result():
    results = []
    for padding in (0.0, 50.0):
        block, inputs, targets = llama_case(torch.float32)
        for given, target in zip(inputs, targets):
            given.args[0][~given.valid_BT] = padding
            target[~given.valid_BT] = -padding
        report = refine_block(block, inputs, targets, cfg=FAST, name="block")
        assert report.kept
        results.append((tensors_of(block), report))
    assert results[0][1] == results[1][1]
    assert same_bytes(results[0][0], results[1][0])


def test_scaling_the_activations_changes_nothing_but_the_units():
    reports = []
    for factor in (1.0, 2.0**7, 2.0**-7, 100.0, 0.01):
        torch.manual_seed(1)
        exact = nn.Linear(20, 6, bias=False)
        layer = quantise(nn.Sequential(exact))
        hidden = [torch.randn(2, 9, 20) for _ in range(10)]
        inputs = [BlockInput((factor * one,), {}, None) for one in hidden]
        targets = [factor * exact(one).detach() for one in hidden]
        report = refine_block(layer, inputs, targets, cfg=FAST, name="layer")
        assert report.kept
        reports.append((report.before, report.after, report.variance / factor**2))
    for scaled in reports[1:]:
        assert scaled == pytest.approx(reports[0], rel=1e-4)
    assert reports[1] == pytest.approx(reports[0], rel=1e-9), "powers of two are exact"


def test_the_seed_alone_decides():
    outcomes = []
    for seed in (0, 0, 1):
        block, inputs, targets = small_case()
        refine_block(block, inputs, targets, cfg=dataclasses.replace(FAST, seed=seed), name="block")
        torch.randn(3)  # the global generator has no say
        outcomes.append(tensors_of(block))
    assert same_bytes(outcomes[0], outcomes[1])
    assert not same_bytes(outcomes[0], outcomes[2])


def test_norms_and_biases_learn_only_if_asked():
    for norms, biases in ((True, False), (False, True)):
        block, inputs, targets = small_case()
        before = tensors_of(block)
        cfg = dataclasses.replace(FAST, train_norms=norms, train_biases=biases)
        assert refine_block(block, inputs, targets, cfg=cfg, name="block").kept
        changed = {key for key, value in tensors_of(block).items() if not torch.equal(value, before[key])}
        wanted = {"norm.weight", "norm.bias"} if norms else {"proj.bias"}
        assert changed == {"proj.scale_zero"} | wanted


def test_batches_of_a_step_count_by_their_valid_positions():
    """A step over two unequal batches is one over both joined: the mean is over positions, not over batches."""
    outcomes = []
    for joined in (True, False):
        torch.manual_seed(5)
        exact = nn.Linear(12, 4, bias=False)
        layer = quantise(nn.Sequential(exact))
        hidden_BTD = torch.randn(6, 8, 12)
        valid_BT = torch.arange(8) < torch.tensor([8, 1, 2, 8, 8, 1])[:, None]
        target_BTD = exact(hidden_BTD).detach()
        cuts = [slice(0, 6)] if joined else [slice(b, b + 1) for b in range(6)]
        inputs = [BlockInput((hidden_BTD[cut],), {}, valid_BT[cut]) for cut in cuts]
        targets = [target_BTD[cut] for cut in cuts]
        cfg = dataclasses.replace(FAST, epochs=1, batch=6, held_out=0.15, lr=0.05, warmup_ratio=0.0)
        report = refine_block(layer, inputs, targets, cfg=cfg, name="layer")
        assert report.steps == 1
        outcomes.append((report.before, report.epoch_losses[0]))
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    shares = [rate_share(step, 100, warmup_ratio=0.1, min_lr_ratio=0.2) for step in range(100)]
    np.testing.assert_allclose(shares[:11], np.arange(1, 12) / 11)
    np.testing.assert_allclose(shares[10:], 0.6 + 0.4 * np.cos(np.pi * np.arange(90) / 90))
    assert rate_share(0, 1, warmup_ratio=0.0, min_lr_ratio=0.0) == 1.0


def test_bad_input_is_named():
    block, inputs, targets = small_case()
    with pytest.raises(ValueError, match="layer 3: 6 calibration batches and 5 targets"):
        refine_block(block, inputs, targets[1:], cfg=FAST, name="layer 3")
    with pytest.raises(ValueError, match="layer 3: nothing in this block is packed"):
        refine_block(NormThenLinear(20), inputs, targets, cfg=FAST, name="layer 3")
    with pytest.raises(ValueError, match=r"layer 3: the block gives \[2, 7, 20\] in batch \d, its target is"):
        refine_block(block, inputs, [target[:, :5] for target in targets], cfg=FAST, name="layer 3")
    with pytest.raises(ValueError, match=r"layer 3: .*at least two"):
        one = [BlockInput((inputs[0].args[0][:1],), {}, None)]
        refine_block(block, one, [targets[0][:1]], cfg=FAST, name="layer 3")
    with pytest.raises(ValueError, match=r"layer 3: the mask of batch 0 is torch\.float32"):
        masked = [given._replace(valid_BT=torch.ones(2, 7)) for given in inputs]
        refine_block(block, masked, targets, cfg=FAST, name="layer 3")
    with pytest.raises(ValueError, match="layer 3: the held-out loss is nan before refinement"):
        refine_block(block, inputs, [target * float("nan") for target in targets], cfg=FAST, name="layer 3")


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("lr", -1.0), ("lr", float("nan")), ("held_out", 1.0), ("warmup_ratio", 2.0)]
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"refine\.{field} is"):
        RefineConfig(**{field: value})
