"""The toy stage in a process to which one thing happens, at a place that is given: {"kind", "rank", "at"}.

Utterances are read from ROOT/shard.bin, which may be cut short. A fault leaves ROOT/fired when it happens.
"""

import errno
import json
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import toy_stage
from toy_stage import BadUtterance, PlannedBatches, ToyDataset, ToyStage, toy_config

from seedling.stages.runtime import evaluation
from seedling.stages.runtime.trainer import run_training

ROW_BYTES = 8
# At step `at`, in the forward pass of the rank.
IN_A_STEP = ("kill", "stop", "hang", "terminate", "crash", "nan")
# At the `at`-th thing that the rank does to files while it writes a checkpoint.
IN_A_CHECKPOINT = ("kill_in_save", "no_room", "write_error")


@dataclass
class Fault:
    kind: str
    rank: int
    at: int
    root: Path

    def here(self) -> bool:
        return int(os.environ["RANK"]) == self.rank

    def fire(self) -> None:
        """What cannot be survived; `nan` is the loss's business."""
        (self.root / "fired").write_text(self.kind)
        if self.kind in ("kill", "kill_in_save"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "hang":
            time.sleep(1e6)
        if self.kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "crash":
            raise RuntimeError("the GPU has fallen off the bus")
        if self.kind == "no_room":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.kind == "write_error":
            raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file")


def disturb_checkpoints(fault: Fault) -> None:
    """Count what is done to files below checkpoints/, and let the fault happen at the `at`-th time."""
    done = 0

    def ours(path: object) -> bool:
        return "/checkpoints/" in str(path)

    def touched(path: object) -> None:
        nonlocal done
        if ours(path):
            done += 1
            if done == fault.at:
                fault.fire()

    def hook(event: str, args: tuple) -> None:
        # Of a folder that is there already makedirs asks nothing but whether it is one, whatever the error.
        made = event == "os.mkdir" and not os.path.isdir(args[0])
        if made or event == "os.rename" or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            touched(args[0])

    def save(state: dict, path: str, **options: object) -> None:
        touched(path)
        plain_save(state, path, **options)
        size = os.path.getsize(path)
        if fault.kind == "kill_in_save" and ours(path) and done + 1 == fault.at:
            os.truncate(path, size // 2)
        touched(path)

    plain_save, torch.save = torch.save, save
    if fault.kind != "write_error":  # that is what torch's writer says, of torch's files
        sys.addaudithook(hook)


@dataclass
class ShardDataset(ToyDataset):
    shard: str = ""

    def __getitem__(self, micro_batch):
        batch = super().__getitem__(micro_batch)
        with open(self.shard, "rb") as file:
            rows = [row for _, row in micro_batch.utterances]
            whole = [len(os.pread(file.fileno(), ROW_BYTES, row * ROW_BYTES)) == ROW_BYTES for row in rows]
        bad = [BadUtterance("shard.bin", key, "ends early") for key, there in zip(batch.keys, whole) if not there]
        return replace(batch, bad=bad)


class FaultyStage(ToyStage):
    def __init__(self, root: Path, fault: Fault | None):
        self.root, self.fault = root, fault

    def batches(self, cfg, split):
        planned = super().batches(cfg, split)
        dataset = ShardDataset(planned.dataset.corpus, [], str(self.root / "shard.bin"))
        return PlannedBatches(planned.plan, dataset)

    def loss(self, model, batch):
        output = super().loss(model, batch)
        fault, step = self.fault, batch.index // self.cfg.train.micro_batches
        if fault and fault.here() and fault.kind in IN_A_STEP and model.training and step == fault.at:
            if fault.kind == "nan":  # each time: the trainer looks at the step again to find what to blame
                output = output._replace(loss_sum=output.loss_sum * float("nan"))
            else:  # once: a second SIGTERM would mean that the run should not wait for its checkpoint
                self.fault = None
            fault.fire()
        return output


def with_small_files(root: str, runs: str) -> None:
    """Train toy runs where no file may grow beyond 50 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    toy_stage.main(root, runs)


def with_no_room_for_copies(root: str, runs: str) -> None:
    """Train toy runs where rank 0 can copy no file into a checkpoint."""

    def refuse(event: str, args: tuple) -> None:
        if event == "shutil.copyfile" and "/checkpoints/" in str(args[1]):
            raise OSError(errno.ENOSPC, "No space left on device", args[1])

    if os.environ["RANK"] == "0":
        sys.addaudithook(refuse)
    toy_stage.main(root, runs)


class StuckBuild(ToyStage):
    def build(self, cfg, inputs):
        if os.environ["RANK"] == "1":
            time.sleep(1e6)
        return super().build(cfg, inputs)


class AskedInEvaluation(ToyStage):
    """Rank 1 is asked to stop at the first batch of its first evaluation."""

    def evaluate(self, model, batches):
        def watched():
            for number, batch in enumerate(batches):
                if number == 0 and os.environ["RANK"] == "1":
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return super().evaluate(model, watched())


def with_a_stuck_build(root: str, runs: str) -> None:
    train_toy_runs(StuckBuild(), root, runs)


def asked_in_evaluation(root: str, runs: str) -> None:
    evaluation.BATCHES_A_LOOK = 2
    train_toy_runs(AskedInEvaluation(), root, runs)


def train_toy_runs(stage: ToyStage, root: str, runs: str) -> None:
    torch.set_num_threads(1)
    for name, settings in json.loads(runs).items():
        run_training(stage, toy_config(f"{root}/{name}", **settings), run_dir=f"{root}/{name}")


def main(root: str, runs: str) -> None:
    """Train the run `run` of `root` with settings and, perhaps, a fault."""
    torch.set_num_threads(1)
    settings = json.loads(runs)
    folder = Path(root)
    fault = Fault(**settings.pop("fault"), root=folder) if settings.get("fault") else None
    settings.pop("fault", None)
    name = settings.pop("name")
    stage = FaultyStage(folder, fault)
    cfg = toy_config(folder / name, **settings)
    if fault and fault.here() and fault.kind in IN_A_CHECKPOINT:
        disturb_checkpoints(fault)
    run_training(stage, cfg, run_dir=folder / name)
