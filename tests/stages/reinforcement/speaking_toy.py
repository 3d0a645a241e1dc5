"""The toy stage with hypotheses: what it says shows every bit of its weights, and it learns from what it says.

As a script it trains, as toy_stage.py does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from toy_stage import ToyConfig, ToyStage, toy_config

from seedling.model.decoding import Hypothesis
from seedling.stages.reinforcement.generation import Generated, GenerationConfig
from seedling.stages.reinforcement.workers import make_generation
from seedling.stages.runtime.stage import StepOutput
from seedling.stages.runtime.trainer import run_training


@dataclass
class SpeakingConfig(ToyConfig):
    stage: str = "speaking_toy"
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    generate_seconds: float = 0.0
    refuse_keys: list[str] = field(default_factory=list)  # a ValueError in generate
    fail_keys: list[str] = field(default_factory=list)  # a RuntimeError in generate
    kill_at: int = -1  # the micro-batch while which the trainer kills its first worker


class SpeakingToy(ToyStage):
    Config = SpeakingConfig
    cfg: SpeakingConfig

    def build(self, cfg, inputs):
        self.generation = make_generation(self, cfg, inputs)
        self.heard: dict[int, Generated] = {}
        return super().build(cfg, inputs)

    def prepared(self, steps, *, weights, step):
        return self.generation.prepared(steps, weights=weights, step=step)

    def generate(self, model, batch) -> list[list[Hypothesis]]:
        """Two hypotheses an utterance: the bits of what the model gives, and those of some noise."""
        time.sleep(self.cfg.generate_seconds)
        if said := set(batch.keys) & set(self.cfg.refuse_keys):
            raise ValueError(f"{min(said)} cannot be said; leave it out")
        if said := set(batch.keys) & set(self.cfg.fail_keys):
            raise RuntimeError(f"{min(said)} went wrong")
        given_BT = model(batch.x_BTD).float() * batch.mask_BT
        noise_B = torch.rand(len(batch))
        rows = zip(given_BT.view(torch.int32).tolist(), given_BT.mean(1).tolist(), noise_B.tolist())
        return [[Hypothesis(bits, score), Hypothesis([], noise)] for bits, score, noise in rows]

    def loss(self, model, batch) -> StepOutput:
        generated = self.generation.of(model, batch)
        if model.training:
            self.heard[batch.index] = generated
        if batch.index == self.cfg.kill_at and self.generation.pids and not self.generation.restarts:
            os.kill(self.generation.pids[0], signal.SIGKILL)
        pids = Path(self.cfg.run_dir) / f"pids{os.environ['RANK']}"
        if self.generation.pids and not pids.exists():
            pids.write_text(json.dumps(self.generation.pids))
        aim_B1 = torch.tensor([[spoken.score + noise.score] for spoken, noise in generated.hypotheses])
        return super().loss(model, replace(batch, y_BT=batch.y_BT + 0.3 * aim_B1))


def speaking_config(run_dir, *, generation: dict | None = None, train: dict | None = None, **given) -> SpeakingConfig:
    given["generation"] = GenerationConfig(**(generation or {}))
    return toy_config(run_dir, train={"max_steps": 7, "save_every": 0} | (train or {}), schema=SpeakingConfig, **given)


def main(root: str, runs: str) -> None:
    torch.set_num_threads(1)
    for name, settings in json.loads(runs).items():
        run_training(SpeakingToy(), speaking_config(f"{root}/{name}", **settings), run_dir=f"{root}/{name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
