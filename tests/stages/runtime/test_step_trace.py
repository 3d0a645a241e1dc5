"""What a step costs by shapes alone, against closed forms and against the same step with real weights."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from seedling.stages.runtime.allocations import Allocations
from seedling.stages.runtime.stage import StepOutput
from seedling.stages.runtime.step_trace import OperationCounter, trace_step
from seedling.stages.runtime.zero_3_linear import linear_layers

B, D, H = 50, 64, 256


@dataclass
class Rows:
    x_BD: Tensor
    index: int = 0


class TwoLayers:
    """A stage whose first layer may be frozen, or recomputed."""

    def __init__(self, *, recompute: bool = False):
        self.recompute = recompute

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))

    def loss(self, model: nn.Module, batch: Rows) -> StepOutput:
        first, act, last = model
        if self.recompute:
            h_BH = checkpoint(lambda x: act(first(x)).sin(), batch.x_BD, use_reentrant=False)
        else:
            h_BH = act(first(batch.x_BD)).sin()
        return StepOutput(last(h_BH).square().sum())


def trace(stage, *, frozen=(), precision="fp32", zero_3=False):
    with torch.device("meta"):
        model = stage.build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    return trace_step(stage, model, Rows(torch.randn(B, D)), precision=precision, zero_3=zero_3)


def test_operations_are_two_for_each_weight_and_row_and_pass():
    flops = trace(TwoLayers()).flops
    assert flops.forward == 2 * B * (D * H + H * D)
    assert flops.backward == 2 * B * (D * H + 2 * H * D)  # nobody wants the gradient of the data
    assert flops.recomputed == 0 and flops.model == flops.hardware


def test_a_frozen_layer_has_no_gradient_of_its_weights():
    frozen = trace(TwoLayers(), frozen=["2."])
    assert frozen.flops.backward == 2 * B * (D * H + H * D)
    assert sum(segment.gradient for segment in frozen.segments) == D * H + H
    below = trace(TwoLayers(), frozen=["0."])
    assert below.flops.backward == 2 * B * H * D


@pytest.mark.parametrize("zero_3", [False, True])
def test_what_is_recomputed_counts_apart_and_is_not_kept(zero_3):
    plain, again = trace(TwoLayers(), zero_3=zero_3), trace(TwoLayers(recompute=True), zero_3=zero_3)
    assert again.flops.forward == plain.flops.forward == 2 * B * (D * H + H * D)
    assert again.flops.backward == plain.flops.backward == 2 * B * (D * H + 2 * H * D)
    assert again.flops.recomputed == 2 * B * D * H
    assert again.saved < plain.saved


@pytest.mark.parametrize("zero_3", [False, True])
def test_a_step_with_values_counts_the_same(zero_3):
    """The counter of a run, in which a backward pass may have a thread of its own, against that of the plan."""
    stage = TwoLayers(recompute=True)
    with linear_layers(zero_3=zero_3), OperationCounter() as counter:
        stage.loss(stage.build(), Rows(torch.randn(B, D))).loss_sum.backward()
    assert counter.flops == trace(stage, zero_3=zero_3).flops


def test_every_gradient_is_noted_once_when_it_is_whole():
    segments = trace(TwoLayers()).segments
    assert sum(segment.gradient for segment in segments) == 2 * D * H + D + H
    assert [segment.gradient for segment in segments if segment.gradient][-1] in (
        D * H,
        H,
    )  # the first layer comes last


class Tied:
    """A stage whose first and last layer are one matrix, as a language model's embeddings and head."""

    def build(self) -> nn.Module:
        first, last = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        last.weight = first.weight
        return nn.Sequential(first, nn.ReLU(), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D), nn.ReLU(), last)

    def loss(self, model: nn.Module, batch: Rows) -> StepOutput:
        return StepOutput(model(batch.x_BD).square().sum())


def test_a_tied_matrix_has_one_gradient_that_is_whole_at_the_end():
    segments = [segment.gradient for segment in trace(Tied()).segments if segment.gradient]
    assert segments[-1] == D * D
    assert sum(segments) == D * D + 2 * D * H + D + H


@pytest.mark.parametrize("zero_3", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("stage", [TwoLayers(), Tied()], ids=["two layers", "tied"])
def test_shapes_alone_give_the_memory_of_real_weights(stage, precision, zero_3):
    found = trace(stage, precision=precision, zero_3=zero_3)
    model, batch = stage.build(), Rows(torch.randn(B, D))
    if precision == "bf16":
        model.bfloat16()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with linear_layers(zero_3=zero_3), Allocations([*model.parameters(), batch.x_BD]) as memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            loss = stage.loss(model, batch).loss_sum
        loss = loss.float()
        assert (memory.live, memory.restart_peak()) == (found.saved, found.forward_peak)
        loss.backward()
    assert memory.peak == max(segment.peak for segment in found.segments)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_traced_twice_with_the_same_result(precision):
    stage = TwoLayers()
    with torch.device("meta"):
        model = stage.build()
    assert len({str(trace_step(stage, model, Rows(torch.randn(B, D)), precision=precision)) for _ in range(2)}) == 1


def test_zero_3_saves_the_input_of_a_frozen_layer_too():
    saved = [trace(TwoLayers(), frozen=["2."], zero_3=zero_3).saved for zero_3 in (False, True)]
    assert saved[1] == saved[0] + 4 * B * H


class Attends:
    def build(self) -> nn.Module:
        return nn.Linear(D, 3 * D, bias=False)

    def loss(self, model: nn.Module, batch: Rows) -> StepOutput:
        q, k, v = (part.view(1, 1, -1, D) for part in model(batch.x_BD).chunk(3, dim=-1))
        return StepOutput(scaled_dot_product_attention(q, k, v).sum())


def test_attention_counts_by_the_square_of_its_length():
    flops = trace(Attends()).flops
    assert flops.forward == 2 * B * D * 3 * D + 2 * (2 * B * B * D)


class Chooses(TwoLayers):
    def loss(self, model: nn.Module, batch: Rows) -> StepOutput:
        y = model(batch.x_BD)
        return StepOutput(y[y > 0].sum())


def test_a_step_that_hangs_on_values_says_so():
    with pytest.raises(ValueError, match=r"stage Chooses: aten\.\S+ needs the values .*seedling run"):
        trace(Chooses())
