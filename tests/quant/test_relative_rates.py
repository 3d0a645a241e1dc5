"""Learning rates of a block: each tensor's by its size, everything else frozen, and zeros are told.

What a step of Adam moves is measured from outside: about the rate, so that relative moves come out equal.
"""

import pytest
import torch
from streamed_models import GridSolver
from torch import nn

from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import replace_module, tune
from seedling.quant.relative_rates import relative_groups


def make_block(size: float) -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"norm": nn.LayerNorm(16), "proj": nn.Linear(16, 4), "router": nn.Linear(16, 4)})
    nn.init.normal_(block.proj.bias)
    nn.init.normal_(block.norm.bias, std=0.01)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(size)
    solution = GridSolver()(block.proj.weight.detach(), None, bits=2, group_size=-1)
    replace_module(block, "proj", PackedLinear.from_solution(solution, bias=block.proj.bias))
    tune(block)
    return block


def rates_of(block: nn.Module, **settings) -> dict[str, float]:
    settings = {"lr": 1e-3, "norm_lr": 1e-2, "norms": True, "biases": True, "name": "block"} | settings
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    groups = relative_groups(block, **settings)
    rates = {names[id(one)]: group["lr"] for group in groups for one in group["params"]}
    assert {name for name, one in block.named_parameters() if one.requires_grad} == set(rates)
    return rates


@pytest.mark.parametrize("size", [1.0, 1000.0, 0.001])
def test_rates_follow_the_size_of_each_tensor(size):
    block = make_block(size)
    rates = rates_of(block)
    assert rates.pop("proj.scale_ratio_NG") == rates.pop("proj.centre_shift_NG") == 1e-3
    assert rates.pop("proj.bias") == pytest.approx(1e-3 * float(block.proj.bias.detach().norm()) / 2, rel=1e-5)
    assert rates.pop("router.bias") == pytest.approx(1e-3 * float(block.router.bias.detach().norm()) / 2, rel=1e-5)
    # A norm's bias of 0.01 is small beside what it is added to, and may move as far as its weight.
    assert rates.pop("norm.weight") == rates.pop("norm.bias") == pytest.approx(1e-2 * size, rel=1e-5)
    assert not rates, "the router's weight must stay frozen"


def test_norms_and_biases_stay_frozen_unless_asked():
    scales = {"proj.scale_ratio_NG", "proj.centre_shift_NG"}
    assert set(rates_of(make_block(1.0), norms=False, biases=False)) == scales
    assert set(rates_of(make_block(1.0), norms=True, biases=False)) == scales | {"norm.weight", "norm.bias"}
    assert set(rates_of(make_block(1.0), norms=False)) == scales | {"proj.bias", "router.bias"}


def test_what_has_no_size_stays_and_is_told(caplog):
    block = make_block(1.0)
    nn.init.zeros_(block.router.bias)
    assert "router.bias" not in rates_of(block)
    assert "router.bias" in caplog.text and "all zeros" in caplog.text
