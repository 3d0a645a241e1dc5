"""Calibration by streaming, against plain forward hooks on whole models.

What a module is calibrated on is what the finished model sends it: everything before it is quantised, and nothing
behind it matters. So hooks on the finished model see the very inputs, whose numpy moments must be those that the solver
was given.
Shape letters: N output channels, K input channels, B, T batch and positions.
"""

import copy
import json
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from streamed_models import (
    GridSolver,
    make_llm,
    make_recogniser,
    put_on_grid,
    reader,
    speech_batches,
    token_batches,
)
from thread_ranks import on_ranks
from torch import nn

from seedling.quant.block_input import BlockInput
from seedling.quant.blocks import decoder_layers, parts_of, quantisable
from seedling.quant.blockwise import RefineConfig, refine_block
from seedling.quant.calibration import Calibration, CalibrationConfig
from seedling.quant.linear import PackedLinear
from seedling.quant.shared_inputs import input_groups
from seedling.quant.targets import Target

DENSE = ["llama", "qwen2", "qwen3", "gemma2"]


def all_targets(model, *, bits=3, group_size=16, converter=False):
    parts = [part for part in parts_of(model) if part.by_default or converter]
    return {
        name: Target(bits, group_size) for part in parts for block in part.blocks for name in quantisable(model, block)
    }


def quantise(model, batches, tmp_path, *, targets=None, solver=None, cfg=None, **arguments):
    solver = solver or GridSolver()
    calibration = Calibration(
        model, solve=solver, folder=tmp_path / "activations", cfg=cfg or CalibrationConfig(), **arguments
    )
    reports = calibration.run(parts_of(model), reader(batches), targets=targets or all_targets(model))
    return solver, {one.name: one for report in reports for one in report.modules}


def call(model, batch):
    with torch.no_grad():
        if isinstance(batch, dict):
            return model(**batch, use_cache=False).logits
        return model(batch.waveforms_BN, batch.lengths_B, batch.transcripts_ids, return_logits=True).logits_NV


def hooked_moments(model, names, batches):
    """{module: (X^T X / n, n)} in numpy, over what whole forward passes send it; padding by the model's own lengths."""
    seen: dict[str, list] = {name: [] for name in names}
    masks = {name: [valid(model, batch, name) for batch in batches] for name in names}

    def listener(name):
        return lambda module, args: seen[name].append(args[0].detach())

    hooks = [model.get_submodule(name).register_forward_pre_hook(listener(name)) for name in names]
    for batch in batches:
        call(model, batch)
    for hook in hooks:
        hook.remove()
    found = {}
    for name in names:
        rows = [x[mask].double().numpy() for x, mask in zip(seen[name], masks[name])]
        x_nK = np.concatenate(rows)
        found[name] = (x_nK.T @ x_nK / len(x_nK), len(x_nK))
    return found


def valid(model, batch, name):
    if isinstance(batch, dict):
        return batch["attention_mask"].bool()
    with torch.no_grad():
        speech = model.encode_speech(batch.waveforms_BN, batch.lengths_B)
        _, lengths = model.embed(speech, transcripts_ids=batch.transcripts_ids)
    part = name.split(".")[0]
    lengths_B = {"encoder": speech.encoder_lengths_B, "converter": speech.lengths_B, "llm": torch.tensor(lengths)}[part]
    return torch.arange(int(lengths_B.max())) < lengths_B[:, None]


def assert_asked_of_the_finished_model(model, solver, reports, weights, batches):
    """Whatever the solver was given for a weight is what hooks on the finished model see at that module."""
    asked = [weight_NK for weight_NK, _ in solver.asked]
    by_weight = {name: at for name, one in weights.items() for at, w in enumerate(asked) if same(w, one)}
    assert by_weight.keys() == reports.keys() and len(solver.asked) == len(reports)
    for name, (H_KK, count) in hooked_moments(model, reports, batches).items():
        given_KK = solver.asked[by_weight[name]][1].double().numpy()
        assert reports[name].tokens == count, name
        np.testing.assert_allclose(given_KK, H_KK, rtol=1e-4, atol=1e-5 * np.abs(H_KK).max(), err_msg=name)


def same(a, b):
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("family", DENSE)
def test_every_h_is_what_the_finished_llm_sends_to_the_module(family, tmp_path):
    model, batches = make_llm(family), token_batches()
    weights = {name: one.weight.clone() for name, one in model.named_modules() if type(one) is nn.Linear}
    solver, reports = quantise(model, batches, tmp_path)
    assert len(reports) == 7 * 2 and all(isinstance(model.get_submodule(name), PackedLinear) for name in reports)
    assert_asked_of_the_finished_model(model, solver, reports, weights, batches)


def test_every_h_is_what_the_finished_recogniser_sends_to_the_module(tmp_path):
    model, batches = make_recogniser(), speech_batches()
    weights = {name: one.weight.clone() for name, one in model.named_modules() if type(one) is nn.Linear}
    targets = all_targets(model, converter=True)
    solver, reports = quantise(model, batches, tmp_path, targets=targets)
    assert reports.keys() == targets.keys() and len(reports) == 2 * 8 + 1 + 2 * 7
    assert_asked_of_the_finished_model(model, solver, reports, weights, batches)


@pytest.mark.parametrize("family", DENSE)
def test_weights_that_the_codes_hold_exactly_give_the_full_precision_model(family, tmp_path):
    model, batches = make_llm(family), token_batches()
    put_on_grid(model, bits=2)
    before = [call(model, batch) for batch in batches]
    _, reports = quantise(model, batches, tmp_path, targets=all_targets(model, bits=2, group_size=-1))
    assert all(report.error == 0 for report in reports.values())
    for batch, logits in zip(batches, before):
        torch.testing.assert_close(call(model, batch), logits, rtol=1e-6, atol=1e-6)


def test_the_streams_stand_where_the_whole_model_would_take_them(tmp_path):
    """The refinement sees the quantised path's inputs, and the full-precision path's outputs as targets."""
    model, batches, met = make_recogniser(), speech_batches(), {}
    whole = copy.deepcopy(model)

    def refine(block, inputs, targets_BTD, *, name):
        met[name] = ([given.args[0] for given in inputs], list(targets_BTD), [given.valid_BT for given in inputs])
        return {"kept": True}

    quantise(model, batches, tmp_path, refine=refine)
    assert list(met) == [f"encoder.layers.{i}" for i in range(2)] + [f"llm.model.layers.{i}" for i in range(2)]
    for name, (inputs, targets, masks) in met.items():
        for at, batch in enumerate(batches):
            inside, outside = [], []
            hooks = [
                model.get_submodule(name).register_forward_pre_hook(lambda m, args, to=inside: to.append(args[0])),
                whole.get_submodule(name).register_forward_hook(lambda m, args, out, to=outside: to.append(out)),
            ]
            call(model, batch)
            call(whole, batch)
            for hook in hooks:
                hook.remove()
            torch.testing.assert_close(inputs[at], inside[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(targets[at], outside[0], rtol=1e-5, atol=1e-5)
            assert masks[at].shape == inputs[at].shape[:2]


def test_activations_in_files_change_nothing(tmp_path):
    reports = []
    for memory_gb in (8.0, 0.0, 1e-5):
        model, cfg = make_llm("qwen3"), CalibrationConfig(memory_gb=memory_gb)
        on_disk = []

        def look(report, folder=tmp_path / "activations", on_disk=on_disk):
            on_disk.append(len(list(folder.glob("*.pt"))))

        _, found = quantise(model, token_batches(), tmp_path, cfg=cfg, on_block=look)
        reports.append({name: (one.error, one.tokens) for name, one in found.items()})
        assert {8.0: max(on_disk) == 0, 0.0: max(on_disk) == 4, 1e-5: 0 < max(on_disk) < 4}[memory_gb], on_disk
        assert not (tmp_path / "activations").exists()
    assert reports[0] == reports[1] == reports[2]


def test_all_at_once_takes_every_h_of_a_block_on_its_full_precision_form(tmp_path):
    model, batches = make_llm("llama"), token_batches()
    whole = copy.deepcopy(model)
    first = [name for name in all_targets(model) if ".layers.0." in name]
    solver, _ = quantise(model, batches, tmp_path, cfg=CalibrationConfig(true_sequential=False))
    plain = hooked_moments(whole, first, batches)
    for name in first:
        at = next(i for i, (w, _) in enumerate(solver.asked) if same(w, whole.get_submodule(name).weight))
        np.testing.assert_allclose(solver.asked[at][1].double().numpy(), plain[name][0], rtol=1e-4, atol=1e-5)


def test_padding_has_no_part_in_anything(tmp_path):
    found = []
    for padding in (3, 59):
        batches = token_batches()
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = padding
        model = make_llm("llama")
        quantise(model, batches, tmp_path)
        found.append({name: tensor for name, tensor in model.state_dict().items() if name.endswith("codes")})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 14
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_errors_in_the_report_are_those_of_outputs(tmp_path):
    model, batches = make_llm("qwen2"), token_batches()
    weights = {name: one.weight.double() for name, one in model.named_modules() if type(one) is nn.Linear}
    _, reports = quantise(model, batches, tmp_path)
    for name, (H_KK, _) in hooked_moments(model, reports, batches).items():
        w_NK = weights[name].detach().numpy()
        lost_NK = model.get_submodule(name).dequantised_NK().double().numpy() - w_NK
        expected = np.einsum("nk,kl,nl", lost_NK, H_KK, lost_NK) / np.einsum("nk,kl,nl", w_NK, H_KK, w_NK)
        assert reports[name].error == pytest.approx(expected, rel=1e-3), name


def test_only_what_is_asked_for_is_quantised(tmp_path):
    model = make_recogniser()
    targets = {"llm.model.layers.1.mlp.down_proj": Target(4, 16)}
    _, reports = quantise(model, speech_batches(), tmp_path, targets=targets)
    packed = [name for name, one in model.named_modules() if isinstance(one, PackedLinear)]
    assert packed == list(targets) == list(reports)


def test_fewer_tokens_than_inputs_is_said(tmp_path, caplog):
    model = make_llm("llama")
    quantise(model, token_batches(1), tmp_path)
    assert (
        "fewer than its 32 inputs" in caplog.text and "self_attn.q_proj, model.layers.0.self_attn.k_proj" in caplog.text
    )


def test_activations_that_are_not_finite_are_one_error_that_names_module_and_batch(tmp_path):
    model = make_llm("llama")
    batches = token_batches()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 7] = 8
    batches[2]["input_ids"][0, 0] = 7
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*calibration batch 2;"):
        quantise(model, batches, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_quantised_with_the_rest(family, tmp_path):
    model, batches = make_llm(family), token_batches(6)
    _, reports = quantise(model, batches, tmp_path)
    experts = [name for name in reports if name.endswith("experts")]
    assert len(experts) == 2 and len(reports) == 2 * (4 + 1)
    for name in experts:
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert reports[name].tokens == 2 * tokens and 0 < reports[name].error < 0.2
    assert all(torch.isfinite(call(model, batch)).all() for batch in batches)


def test_errors_of_experts_are_those_of_the_stored_weights(tmp_path):
    """An expert's error is that of both projections on its own tokens, down's on what the stored gate_up makes."""
    model, batches, calls = make_llm("mixtral"), token_batches(6), []
    name = "model.layers.0.mlp.experts"
    experts = model.get_submodule(name)
    with torch.no_grad():  # exact in codes and float32 scales: what is lost is lost by scales of 16 bits
        for weight in (experts.gate_up_proj, experts.down_proj):
            codes = torch.randint(0, 4, weight.shape, generator=torch.Generator().manual_seed(3))
            codes[..., 0], codes[..., 1] = 0, 3
            weight.copy_((codes - 1.5) * 0.1234567)
    hook = experts.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    for batch in batches:
        call(model, batch)
    hook.remove()
    counts = torch.cat([batch["attention_mask"].reshape(-1).bool() for batch in batches])
    x_nK, index_nk = (torch.cat([one[at] for one in calls])[counts] for at in (0, 1))
    whole = [(experts.gate_up_proj[e].detach().double(), experts.down_proj[e].detach().double()) for e in range(4)]
    _, reports = quantise(model, batches, tmp_path, targets={name: Target(2, -1)})
    packed, lost, total = model.get_submodule(name), 0.0, 0.0
    for e in range(4):
        own_nK = x_nK[(index_nk == e).any(1)].double()
        stored = [one.dequantised_NK(e).double() for one in (packed.gate_up, packed.down)]
        gate_nI, up_nI = (own_nK @ stored[0].T).chunk(2, dim=1)
        for x, quantised_NK, weight_NK in zip((own_nK, nn.functional.silu(gate_nI) * up_nI), stored, whole[e]):
            lost += ((x @ (quantised_NK - weight_NK).T) ** 2).sum() / len(x)
            total += ((x @ weight_NK.T) ** 2).sum() / len(x)
    assert not reports[name].fallback and lost > 1e-7 * total
    assert reports[name].error == pytest.approx(float(lost / total), rel=1e-3)


def test_a_batch_that_is_not_finite_at_experts_has_its_number_among_all_ranks(tmp_path):
    model, batches = make_llm("mixtral"), token_batches(4)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 7] = 8
    batches[3]["input_ids"][0, 0] = 7
    calibration = Calibration(model, solve=GridSolver(), folder=tmp_path / "activations")
    targets = {"model.layers.0.mlp.experts": Target(2, 16)}
    with pytest.raises(ValueError, match=r"experts.*calibration batch 3;"):  # the second of a rank with 1 and 3
        calibration.run(parts_of(model), reader(batches, rank=1, size=2), targets=targets)


def test_modules_of_one_input_are_found_by_the_tensor_they_get():
    block = decoder_layers(make_llm("llama"))[0]
    names = {name: one for name, one in block.named_modules() if type(one) is nn.Linear}
    x, angles = torch.randn(1, 5, 32), (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
    groups = input_groups(block, names, [BlockInput((x,), {"position_embeddings": angles}, None)])
    assert [set(group.names) for group in groups] == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]


def test_a_tensor_written_to_between_two_modules_is_no_shared_input():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            y = self.a(x) + self.b(x)
            x.mul_(2)
            return y + self.c(x) + self.a(y)

    block = Writing()
    groups = input_groups(block, dict(block.named_children()), [BlockInput((torch.ones(1, 2, 3),), {}, None)])
    assert [(set(group.names), group.once) for group in groups] == [({"a"}, False), ({"b"}, True), ({"c"}, True)]


class Shelf(dict):
    """Keeps blocks in memory, by way of JSON as the stage's files do."""

    def save(self, name, tensors, **facts):
        self[name] = ({key: value.clone() for key, value in tensors.items()}, json.dumps(facts))

    def load(self, name):
        return (self[name][0], json.loads(self[name][1])) if name in self else None


def refine(block, inputs, targets_BTD, *, name):
    return asdict(refine_block(block, inputs, targets_BTD, cfg=RefineConfig(epochs=1, lr=1e-2), name=name))


@pytest.mark.parametrize("family", ["recogniser", "qwen3", "mixtral"])
def test_a_run_that_goes_on_from_kept_blocks_ends_in_the_same_bits(family, tmp_path):
    def made():
        return (make_recogniser(), speech_batches()) if family == "recogniser" else (make_llm(family), token_batches(6))

    whole, (model, batches) = Shelf(), made()
    _, reports = quantise(model, batches, tmp_path, kept=whole, refine=refine)
    for block in list(whole)[:-1]:
        shelf = Shelf({name: whole[name] for name in list(whole)[: list(whole).index(block) + 1]})  # killed behind it
        again, batches = made()
        solver, found = quantise(again, batches, tmp_path, kept=shelf, refine=refine)
        assert 0 < len(solver.asked) < len(reports) or family == "mixtral"
        assert {name: one.error for name, one in found.items()} == {name: one.error for name, one in reports.items()}
        state = again.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), f"{name}, killed behind {block}"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_targets_of_refinement_lie_between_both_paths(share, tmp_path):
    model, batches, met = make_llm("llama"), token_batches(), {}
    whole = copy.deepcopy(model)

    def look(block, inputs, targets_BTD, *, name):
        met[name] = list(zip(inputs, targets_BTD))
        return {}

    quantise(model, batches, tmp_path, refine=look, cfg=CalibrationConfig(full_share=share))
    for name, pairs in met.items():
        for batch, (given, target_BTD) in zip(batches, pairs):
            full = []
            hook = whole.get_submodule(name).register_forward_hook(lambda m, args, out, to=full: to.append(out))
            call(whole, batch)
            hook.remove()
            own = whole.get_submodule(name)(*given.args, **given.kwargs)
            torch.testing.assert_close(target_BTD, share * full[0] + (1 - share) * own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family, size", [("qwen2", 2), ("qwen2", 3), ("mixtral", 2)])
def test_any_number_of_ranks_packs_the_weights_of_one(family, size, tmp_path):
    """Three batches on two or three ranks; H differs by 1e-16 of its size, which turns no code of this solver."""
    batches = token_batches(3)
    alone = make_llm(family)
    _, expected = quantise(alone, batches, tmp_path / "alone", refine=refine)
    models = [make_llm(family) for _ in range(size)]

    def run(ranks):
        model = models[ranks.rank]
        calibration = Calibration(model, solve=GridSolver(), folder=tmp_path / "together", refine=refine, ranks=ranks)
        read = reader(batches, rank=ranks.rank, size=size)
        reports = calibration.run(parts_of(model), read, targets=all_targets(model))
        return model.state_dict(), {one.name: one for report in reports for one in report.modules}

    results = on_ranks(size, run)
    for state, reports in results:
        assert {name: one.tokens for name, one in reports.items()} == {
            name: one.tokens for name, one in expected.items()
        }
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert all(torch.equal(results[0][0][name], results[-1][0][name]) for name in results[0][0])
    assert not (tmp_path / "together").exists()


class LateShelf:
    """A shelf as a slow rank sees it: it looks half a second after the others have kept what they make."""

    def __init__(self, shelf):
        self.shelf, self.save = shelf, shelf.save

    def load(self, name):
        time.sleep(0.5)
        return self.shelf.load(name)


def test_ranks_that_differ_in_speed_take_the_same_way_where_a_block_is_left_alone(tmp_path):
    """Rank 0 keeps the block in the middle, in which there is nothing to do, before rank 1 looks for it."""
    batches = token_batches(2)
    models = [make_llm("llama", layers=3) for _ in range(2)]
    targets = {f"model.layers.{layer}.mlp.down_proj": Target(4, 16) for layer in (0, 2)}
    shared = Shelf()

    def run(ranks):
        model = models[ranks.rank]
        kept = LateShelf(shared) if ranks.rank else shared
        calibration = Calibration(model, solve=GridSolver(), folder=tmp_path / "activations", kept=kept, ranks=ranks)
        calibration.run(parts_of(model), reader(batches, rank=ranks.rank, size=2), targets=targets)
        return model.state_dict()

    one, two = on_ranks(2, run)
    assert list(shared) == [f"model.layers.{layer}" for layer in range(3)]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
