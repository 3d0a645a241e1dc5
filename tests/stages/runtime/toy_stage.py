"""A stage small enough to train in milliseconds, on the real plan: regression over utterances of 1 to 9 frames.

The count is frames, which differ between utterances, so means of means would show. Dropout shows whether seeds hold, a
frozen layer whether it stays frozen. As a script it trains: `python toy_stage.py ROOT '{"name": {"train": {...}}}'`.
Shape letters: B utterances, T frames, D features.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from seedling.data.batches import BadUtterance, PlannedBatches
from seedling.data.plan import Plan, PlanConfig
from seedling.stages.runtime.artifacts import ArtifactWriter
from seedling.stages.runtime.config import TrainingStageConfig
from seedling.stages.runtime.stage import StepOutput
from seedling.stages.runtime.train_config import TrainConfig, WandbConfig
from seedling.stages.runtime.trainer import run_training

DIM = 6


@dataclass
class ToyConfig(TrainingStageConfig):
    stage: str = "toy"
    run_dir: str = ""
    utterances: int = 120
    width: int = 16
    layers: int = 0  # more of them between body and head, named as Muon wants them
    dropout: float = 0.1
    nan_keys: list[str] = field(default_factory=list)
    inf_gradient_keys: list[str] = field(default_factory=list)
    bad_keys: list[str] = field(default_factory=list)
    sleep_seconds: float = 0.0  # of a forward pass, on rank `sleep_rank` or on all, of step `sleep_step` or of all
    sleep_rank: int | None = None
    sleep_step: int | None = None  # from 0
    stop_after: int = 0  # steps, after which a rank is asked to stop, as a cluster would


class ToyCorpus:
    """An index as the plan wants it: one frame counts as one second."""

    def __init__(self, utterances: int):
        rows = np.zeros(
            utterances, dtype=[("key", "S8"), ("samples", "i8"), ("sample_rate", "i4"), ("text_chars", "i4")]
        )
        rows["key"] = [f"u{i:04d}".encode() for i in range(utterances)]
        rows["samples"] = 1 + np.arange(utterances) * 7 % 9
        rows["sample_rate"] = 1
        self.shards, self.rows_S, self.fingerprint = ["toy"], np.array([utterances]), f"toy-{utterances}"
        self.rows = rows

    def expect(self, shards: list[int]) -> None:
        pass

    def index(self, shard: int) -> np.ndarray:
        return self.rows


@dataclass
class ToyBatch:
    keys: list[str]
    x_BTD: torch.Tensor
    y_BT: torch.Tensor
    mask_BT: torch.Tensor
    index: int
    epoch: int
    bad: list

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def utterances(self) -> int:
        return len(self)

    @property
    def seconds(self) -> float:
        return float(self.mask_BT.sum())

    @property
    def padded_seconds(self) -> float:
        return float(self.mask_BT.numel())

    characters = padded_characters = 0

    @property
    def amount(self) -> str:
        return f"{len(self)} rows"

    def to(self, device) -> ToyBatch:
        return replace(self, **{n: getattr(self, n).to(device) for n in ("x_BTD", "y_BT", "mask_BT")})

    def pin_memory(self) -> ToyBatch:
        return self


@dataclass
class ToyDataset:
    corpus: ToyCorpus
    bad_keys: list[str]

    def __getitem__(self, micro_batch) -> ToyBatch:
        rows = [row for _, row in micro_batch.utterances]
        keys = [self.corpus.rows["key"][row].decode() for row in rows]
        frames = [int(self.corpus.rows["samples"][row]) for row in rows]
        x = torch.zeros(len(rows), max(frames, default=1), DIM)
        for b, (row, T) in enumerate(zip(rows, frames)):
            x[b, :T] = torch.randn(T, DIM, generator=torch.Generator().manual_seed(row))
        mask = torch.arange(x.shape[1]) < torch.tensor(frames)[:, None]
        bad = [BadUtterance("toy", key, "cannot be read") for key in keys if key in self.bad_keys]
        return ToyBatch(keys, x, x.sum(-1).sin(), mask, micro_batch.index, micro_batch.epoch, bad)


class ToyModel(nn.Module):
    def __init__(self, width: int, dropout: float, layers: int = 0):
        super().__init__()
        self.frozen = nn.Linear(DIM, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 1)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        h_BTW = self.body(self.frozen(x_BTD).tanh())
        for layer in self.layers:
            h_BTW = h_BTW + layer(h_BTW).tanh()
        return self.head(h_BTW)[..., 0]


class ToyStage:
    consumes = {}
    produces = "toy_model"
    Config = ToyConfig

    def build(self, cfg: ToyConfig, inputs: dict) -> nn.Module:
        self.cfg = cfg
        return ToyModel(cfg.width, cfg.dropout, cfg.layers)

    def trainable(self, parameter_name: str) -> str | None:
        group = parameter_name.split(".")[0]
        return None if group == "frozen" else group

    def batches(self, cfg: ToyConfig, split: str) -> PlannedBatches:
        corpus = ToyCorpus(cfg.utterances if split == "train" else 24)
        limits = PlanConfig(max_seconds=cfg.train.micro_batch_seconds, window_utterances=50)
        plan = Plan(corpus, limits, seed=cfg.seed, micro_batches_per_step=cfg.train.micro_batches)
        return PlannedBatches(plan, ToyDataset(corpus, cfg.bad_keys if split == "train" else []))

    def count(self, batch: ToyBatch) -> int:
        return int(batch.mask_BT.sum())

    def loss(self, model: nn.Module, batch: ToyBatch) -> StepOutput:
        sleeps = self.cfg.sleep_rank is None or os.environ.get("RANK") == str(self.cfg.sleep_rank)
        sleeps &= self.cfg.sleep_step in (None, batch.index // self.cfg.train.micro_batches)
        time.sleep(self.cfg.sleep_seconds if model.training and sleeps else 0)
        if model.training and self.cfg.stop_after and batch.index == self.cfg.stop_after * self.cfg.train.micro_batches:
            os.kill(os.getpid(), signal.SIGTERM)
        error_BT = (model(batch.x_BTD) - batch.y_BT).float() ** 2 * batch.mask_BT
        loss_sum = error_BT.sum()
        if model.training and set(batch.keys) & set(self.cfg.nan_keys):
            loss_sum = loss_sum * float("nan")
        if model.training and set(batch.keys) & set(self.cfg.inf_gradient_keys):
            zero = loss_sum * 0  # finite loss, infinite slope
            loss_sum = loss_sum + zero.sqrt()
        return StepOutput(loss_sum, {"abs_error": (error_BT.detach().sqrt().sum(), batch.mask_BT.sum())})

    def evaluate(self, model: nn.Module, batches) -> dict:
        total, count = 0.0, 0
        for batch in batches:
            total += float(self.loss(model, batch).loss_sum)
            count += self.count(batch)
        return {"loss": (total, count)}

    def export(self, model: nn.Module, writer: ArtifactWriter) -> None:
        torch.save(model.state_dict(), writer.path / "model.pt")


def toy_config(
    run_dir, *, seed: int = 1, train: dict | None = None, schema: type[ToyConfig] = ToyConfig, **toy
) -> ToyConfig:
    """Return a config of 20 steps of 4 micro-batches, without W&B; `train` and `toy` override it."""
    settings = {
        "max_steps": 0 if train and "epochs" in train else 20,
        "micro_batch_seconds": 12,
        "global_batch_seconds": 48,
        "lr": {"body": 1e-2, "head": 2e-2},
        "warmup_steps": 3,
        "log_every": 5,
        "save_every": 4,
        "wandb": {"mode": "disabled"},
        **(train or {}),
    }
    settings["wandb"] = WandbConfig(**settings["wandb"])
    return schema(run_dir=str(run_dir), seed=seed, train=TrainConfig(**settings), **toy)


def main(root: str, runs: str) -> None:
    """Train {name: settings} one after the other in RUN_DIR/name: starting a process costs more than training."""
    torch.set_num_threads(1)
    for name, settings in json.loads(runs).items():
        run_dir = f"{root}/{name}"
        run_training(ToyStage(), toy_config(run_dir, **settings), run_dir=run_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
