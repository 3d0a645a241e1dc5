"""Dealing out bits: within the budget, as good as brute force on small cases, and errors that are those of modules."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from streamed_models import GridSolver, make_llm, reader, token_batches
from thread_ranks import on_ranks

from seedling.quant.blocks import parts_of, quantisable
from seedling.quant.linear import PackedLinear
from seedling.quant.sensitivity import Sensitivity, SensitivityReport, choose_bits
from seedling.quant.targets import Target

BITS = (2, 3, 4, 8)


def measured(count=5, *, seed=0, alike=False):
    """Errors that fall fourfold a bit, as those of round to nearest do, from starts of different sizes."""
    draws = np.random.default_rng(seed)
    return [
        Sensitivity(
            f"m{i}",
            100 if alike else int(draws.integers(1, 5)) * 100,
            {bits: float(start * 4.0 ** (2 - bits)) for bits in BITS},
            {bits: bits + 0.5 for bits in BITS},
        )
        for i, start in enumerate(10.0 ** draws.uniform(-3, 0, count))
    ]


def cost(modules, bits):
    stored = sum(one.bits_per_weight[bits[one.name]] * one.weights for one in modules)
    return stored / sum(one.weights for one in modules)


def loss(modules, bits):
    return sum(one.errors[bits[one.name]] for one in modules)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2.5, 3.1, 3.5, 4.3])
def test_among_modules_of_one_size_no_other_choice_within_the_budget_is_better(seed, budget):
    """Each step costs the same and gains less than the one before it: there the greedy choice is the best one."""
    modules, candidates = measured(seed=seed, alike=True), (2, 3, 4)
    chosen = choose_bits(modules, budget=budget, candidates=candidates)
    names = [one.name for one in modules]
    every = [dict(zip(names, bits)) for bits in itertools.product(candidates, repeat=len(modules))]
    best = min(loss(modules, bits) for bits in every if cost(modules, bits) <= budget + 1e-9)
    assert cost(modules, chosen) <= budget + 1e-9
    assert loss(modules, chosen) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2.5, 3.7, 5.0, 8.5, 20.0])
def test_among_modules_of_all_sizes_the_budget_is_kept_and_no_step_that_fits_is_left(seed, budget):
    modules = measured(seed=seed)
    chosen = choose_bits(modules, budget=budget, candidates=BITS)
    assert cost(modules, chosen) <= budget + 1e-9
    for one in modules:
        for bits in BITS:
            if bits > chosen[one.name]:
                assert cost(modules, {**chosen, one.name: bits}) > budget
    if budget >= 8.5:
        assert set(chosen.values()) == {8}


def padded(columns, *, rows=128, group_size=64):
    """Modules whose stored bits are those of real packed layers, padding included."""
    draws, modules = np.random.default_rng(1), []
    for i, K in enumerate(columns):
        weight_NK = torch.randn(rows, K, generator=torch.Generator().manual_seed(i))
        stored = {
            bits: PackedLinear.from_solution(
                GridSolver()(weight_NK, None, bits=bits, group_size=group_size), bias=None
            ).bits_per_weight
            for bits in BITS
        }
        start = float(10.0 ** draws.uniform(-3, 0))
        modules.append(Sensitivity(f"m{i}", rows * K, {bits: start * 4.0 ** (2 - bits) for bits in BITS}, stored))
    return modules


@pytest.mark.parametrize("budget", [4.5, 5.0, 6.0, 8.5])
def test_where_padding_makes_more_bits_cheaper_the_cheaper_ones_are_taken(budget):
    """A row of 128 columns in groups of 64 is padded to twice its size at 2 and 3 bits, to none at 4 and 8."""
    modules = padded([128, 128, 256, 128])
    assert modules[0].bits_per_weight == {2: 4.5, 3: 6.5, 4: 4.5, 8: 8.5}
    chosen = choose_bits(modules, budget=budget, candidates=BITS)
    assert cost(modules, chosen) <= budget + 1e-9
    assert all(chosen[one.name] in (4, 8) for one in modules if one.bits_per_weight[2] == 4.5)
    for one in modules:  # no other number of bits of one module would fit and lose less
        for bits in BITS:
            if one.errors[bits] < one.errors[chosen[one.name]]:
                assert cost(modules, {**chosen, one.name: bits}) > budget


def test_the_start_is_the_cheapest_number_of_bits_and_a_step_may_go_to_fewer_bits():
    """Of 2 and 3 bits the first is cheaper, of 3 and 4 the second; a measured error may rise with the bits."""
    modules = padded([128])
    assert choose_bits(modules, budget=4.5, candidates=(2, 3)) == {"m0": 2}
    assert choose_bits(modules, budget=4.5, candidates=(3, 4)) == {"m0": 4}
    odd = [Sensitivity("m0", 100, {2: 0.1, 4: 0.2}, {2: 5.0, 4: 4.5})]
    assert choose_bits(odd, budget=4.5, candidates=(2, 4)) == {"m0": 4}
    assert choose_bits(odd, budget=5.0, candidates=(2, 4)) == {"m0": 2}


def test_what_is_fixed_stays_and_counts():
    modules = measured(alike=True)
    chosen = choose_bits(modules, budget=4.5, candidates=(2, 3, 4), fixed={"m1": 8})
    assert chosen["m1"] == 8 and 4.0 < cost(modules, chosen) <= 4.5


def test_a_budget_below_the_fewest_bits_says_what_they_cost():
    with pytest.raises(ValueError, match=r"budget is 2 bits per weight, and the fewest bits cost 2\.500 with"):
        choose_bits(measured(), budget=2.0, candidates=BITS)


def test_errors_are_those_of_each_module_alone_on_full_precision_inputs(tmp_path):
    model, batches = make_llm("qwen2"), token_batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for block in parts_of(model)[0].blocks for name in quantisable(model, block)]
    inputs: dict[str, list] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    solver = GridSolver()
    report = SensitivityReport(
        model, candidates=[2, 4], solve=solver, scale_dtype=torch.bfloat16, folder=tmp_path / "activations"
    )
    found = report.run(parts_of(model), reader(batches), targets={name: Target(2, 16) for name in names})
    assert [one.name for one in found] and {one.name for one in found} == set(names)
    for one in found:
        weight_NK = model.get_submodule(one.name).weight.detach()
        x_nK = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(inputs[one.name], batches)])
        for bits in (2, 4):
            packed = PackedLinear.from_solution(solver(weight_NK, None, bits=bits, group_size=16), bias=None)
            lost = ((packed.dequantised_NK() - weight_NK) @ x_nK.T).square().sum() / (weight_NK @ x_nK.T).square().sum()
            assert one.errors[bits] == pytest.approx(lost.item(), rel=1e-3), one.name
            assert one.bits_per_weight[bits] == pytest.approx(packed.bits_per_weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_ranks_that_differ_in_speed_take_the_same_way_where_a_block_is_left_alone(tmp_path):
    """Rank 0 keeps the block in the middle, in which there is nothing to measure, before rank 1 looks for it."""
    batches, models, shelf = token_batches(2), [make_llm("llama", layers=3) for _ in range(2)], {}
    targets = {f"model.layers.{layer}.mlp.down_proj": Target(4, 16) for layer in (0, 2)}

    class Shelf:
        def __init__(self, rank):
            self.rank = rank

        def save(self, name, tensors, **facts):
            shelf[name] = (tensors, json.loads(json.dumps(facts)))

        def load(self, name):
            time.sleep(0.5 * self.rank)
            return shelf.get(name)

    def run(ranks):
        model = models[ranks.rank]
        report = SensitivityReport(
            model,
            candidates=[2, 4],
            solve=GridSolver(),
            scale_dtype=torch.bfloat16,
            folder=tmp_path / "activations",
            kept=Shelf(ranks.rank),
            ranks=ranks,
        )
        return report.run(parts_of(model), reader(batches, rank=ranks.rank, size=2), targets=targets)

    one, two = on_ranks(2, run)
    assert one == two and [module.name for module in one] == list(targets)
    assert len(shelf) == 3
