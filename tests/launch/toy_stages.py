"""Two stages without audio or models, for tests of the command line: they are named `toy_stages:Count` and so on."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from seedling.data.remote import RemoteConfig
from seedling.stages.runtime.artifacts import ArtifactSpec
from seedling.stages.runtime.config import StageConfig


@dataclass
class CountConfig(StageConfig):
    number: int = 1
    text: str = ""
    data: str = ""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    fail: str = ""
    sleep_seconds: float = 0.0
    resume: str = "auto"

    def __post_init__(self):
        if self.number < 0:
            raise ValueError(f"number ({self.number}) must not be negative")


class Count:
    """Writes its number, plus those of what it consumes; appends to a log, so that a test sees how often it ran."""

    consumes = {"first": ArtifactSpec("count", required=False), "second": ArtifactSpec("count", required=False)}
    produces = "count"
    Config = CountConfig

    def run(self, cfg, inputs, writer):
        if cfg.fail == "mistake":
            raise ValueError("this input\ncannot be counted")
        if cfg.fail == "bug":
            raise RuntimeError("a bug")
        if cfg.fail == "rank1":
            if os.environ["RANK"] == "1":
                sys.exit(7)
            # Until the launcher ends it: by itself it might fail first, at a barrier, with another code.
            time.sleep(3600)
        if cfg.fail == "last_rank":
            if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                raise RuntimeError("the last rank cannot go on")
            time.sleep(3600)
        if cfg.fail == "stop":
            signal.signal(signal.SIGTERM, lambda *_: self._stop(cfg))
            (Path(cfg.run_dir) / f"ready{os.environ['RANK']}").touch()
        time.sleep(cfg.sleep_seconds)
        total = cfg.number + sum(int((artifact.path / "number.txt").read_text()) for artifact in inputs.values())
        if os.environ["RANK"] == "0":
            (writer.path / "number.txt").write_text(str(total))
            (writer.path / "world.txt").write_text(os.environ["WORLD_SIZE"])
            (writer.path / "report.html").write_text(f"<p>{total}</p>")
            writer.metrics["number"] = total
            writer.metrics["wer"] = total / 100

    def _stop(self, cfg):
        # As slow as a checkpoint; both ranks need the time at once, not one after the other.
        time.sleep(1)
        (Path(cfg.run_dir) / f"stopped{os.environ['RANK']}").touch()
        sys.exit(75)


class NoConfig:
    """Not a stage: it has no Config."""


class NoTrain:
    """Not a stage: it is to be trained, and its Config has no `train`."""

    Config = CountConfig
