"""What ZeRO is said to hold, against what DeepSpeed holds in a real step, as its tensors are counted."""

import gc
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from seedling.stages.runtime.allocations import Allocations
from seedling.stages.runtime.engine import Engine
from seedling.stages.runtime.stage import StepOutput
from seedling.stages.runtime.step_trace import trace_step
from seedling.stages.runtime.train_config import TrainConfig
from seedling.stages.runtime.world import init_world
from seedling.stages.runtime.zero_memory import model_sizes, rank_memory

D = 384


@dataclass
class Rows:
    x_BD: Tensor
    index: int = 0


class Stack:
    """Five square layers, one of them frozen; few rows, so that the model is nearly all there is in memory."""

    def __init__(self, *, tied: bool = False):
        self.tied = tied

    def build(self) -> nn.Module:
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(5))
        if self.tied:
            model.layers[4].weight = model.layers[0].weight
        return model

    def trainable(self, name: str) -> str | None:
        return None if name.startswith("layers.2.") else "all"

    def loss(self, model: nn.Module, batch: Rows) -> StepOutput:
        x = batch.x_BD
        for layer in model.layers:
            x = layer(x).relu()
        return StepOutput(x.square().sum())


def config(zero_stage: int, precision: str, *, optimizer: str = "adamw", accumulation: int = 1) -> TrainConfig:
    return TrainConfig(
        max_steps=3,
        zero_stage=zero_stage,
        precision=precision,
        optimizer=optimizer,
        lr={"all": 1e-3},
        micro_batch_seconds=1,
        global_batch_seconds=accumulation,
    )


def planned(cfg: TrainConfig, *, ranks: int = 1, tied: bool = False):
    stage = Stack(tied=tied)
    with torch.device("meta"):
        model = stage.build()
    sizes = model_sizes(stage, model, cfg)
    trace = trace_step(stage, model, Rows(torch.randn(8, D)), precision=cfg.precision)
    return rank_memory(sizes, trace, cfg, ranks=ranks, accumulation=-(-cfg.micro_batches // ranks), gloo=True)


FP32 = [(0, "fp32", 1), (0, "fp32", 2), (0, "autocast", 1), (1, "fp32", 1), (1, "fp32", 2), (2, "fp32", 1)]
BF16 = [(1, "bf16", 1), (1, "bf16", 2), (2, "bf16", 1), (2, "bf16", 2), (3, "bf16", 2)]
CASES = [*FP32, (2, "fp32", 2), (3, "fp32", 1), *BF16]


@pytest.mark.parametrize("zero_stage, precision, accumulation", CASES)
def test_the_planned_peak_is_that_of_deepspeeds_tensors(zero_stage, precision, accumulation):
    cfg = config(zero_stage, precision, accumulation=accumulation)
    measured = peak_of_real_steps(cfg)
    memory = planned(cfg)
    assert memory.total == pytest.approx(measured, rel=0.05), f"{memory}, measured {measured:,}"


@pytest.mark.parametrize("zero_stage, precision", [(0, "fp32"), (2, "fp32"), (2, "bf16")])
def test_a_matrix_in_two_places_has_one_gradient(zero_stage, precision):
    cfg = config(zero_stage, precision)
    assert planned(cfg, tied=True).total == pytest.approx(peak_of_real_steps(cfg, tied=True), rel=0.05)


def test_muons_step_is_planned_with_its_workspace():
    cfg = config(0, "fp32", optimizer="muon")
    assert planned(cfg).total == pytest.approx(peak_of_real_steps(cfg), rel=0.05)


def peak_of_real_steps(cfg: TrainConfig, *, tied: bool = False) -> int:
    """Return the peak of all tensors from building the model to the end of three steps."""
    stage, world = Stack(tied=tied), init_world()
    gc.collect()
    with Allocations() as memory:
        engine = Engine(stage, stage.build(), cfg, world=world, seed=1)
        engine.set_lr(1.0)
        for _ in range(3):
            batches = [Rows(torch.randn(8, D)) for _ in range(cfg.micro_batches)]
            engine.step(batches, 8.0)
    return memory.peak


def test_more_ranks_need_less_where_their_stage_shares():
    for zero_stage in (1, 2, 3):
        totals = [planned(config(zero_stage, "bf16", accumulation=64), ranks=R).total for R in (2, 8, 64)]
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]
    alone, many = (planned(config(0, "fp32", accumulation=64), ranks=R) for R in (1, 64))
    assert (many.weights, many.moments) == (alone.weights, alone.moments)


def test_frozen_weights_have_neither_gradient_nor_moments():
    memory = planned(config(0, "fp32"))
    layer = 4 * (D * D + D)
    assert memory.weights == 5 * layer
    assert memory.moments == 2 * 4 * layer
