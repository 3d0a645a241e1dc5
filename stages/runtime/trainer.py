"""The one training loop. Read `fit`, `train_to_the_end` and `train_step`: the order in them is the whole of it.

Every rank runs the same steps, by construction of the plan. Before each step the ranks add up a few numbers on the CPU
(the loss's normaliser, seconds, bad utterances, requests to stop), so that all agree on the step, and on the step after
which to stop. A request to stop (signals.py) finishes the step, or ends the evaluation, writes a checkpoint and leaves
with exit code 75 (EX_TEMPFAIL: start again to go on).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch

from ...data.plan import Cursor
from .agreement import Agreed, agree
from .artifacts import Artifact, ArtifactWriter, check_target, load_artifact, load_inputs
from .checkpoint import (
    SHARDS,
    TrainState,
    check_resumable,
    checkpoint_name,
    damage_seen,
    delete_checkpoints,
    find_checkpoint,
    load_state,
    save_checkpoint,
)
from .communication import CommunicationWatch
from .engine import Engine, StepResult
from .evaluation import Evaluation, require_set_of
from .feed import FedStep, feed
from .length import run_length
from .logs import RunLog
from .meters import Meters, peak_memory_gb, resident_gb
from .parameters import format_table, numel, parameter_table
from .schedule import lr_factor
from .signals import Interrupted, StopAgreed, StopRequest
from .stage import LooksAhead, RunStage, TrainingStage, validation_sets
from .step_trace import OperationCounter
from .watchdog import Watchdog
from .world import World, init_world

log = logging.getLogger(__name__)


class Trainer:
    """One run of a training stage on this rank. `fit` trains to the end; `export` writes the artifact."""

    def __init__(
        self, stage: TrainingStage, cfg: Any, *, run_dir: Path, world: World, watchdog: Watchdog | None = None
    ):
        self.stage, self.cfg, self.train, self.run_dir, self.world = stage, cfg, cfg.train, run_dir, world
        self.watchdog = watchdog or watchdog_of(cfg, run_dir=run_dir, world=world)
        self.train.accumulation_steps(world.size)  # before anything slow
        self.memory_before = resident_gb()
        torch.manual_seed(cfg.seed)
        self.watchdog.beat("reading the inputs")
        self.inputs = load_inputs(stage.consumes, cfg.inputs, stage=cfg.stage)
        self.watchdog.beat("building the model")
        model = stage.build(cfg, self.inputs)
        self.watchdog.beat("planning the data")
        self.data = stage.batches(cfg, "train")
        self.valid = validation_sets(stage, cfg)
        require_set_of(self.train.keep_best, self.valid)
        self.summary = self.data.plan.summary(0)
        self.total_steps, self.steps_are_estimated = run_length(self.data.plan, self.summary, self.train)
        self.watchdog.beat("starting DeepSpeed")
        self.engine = Engine(stage, model, self.train, world=world, seed=cfg.seed)
        self.state = TrainState(
            data_fingerprint=self.data.fingerprint,
            frozen_digests=world.gather(self.engine.frozen_digest()),
            shapes=self.engine.saved_shapes(),
            config=asdict(cfg),
            world_size=world.size,
            zero_stage=self.engine.zero_stage,
            owes_evaluation=self.train.eval_first,
        )
        self.evaluation = Evaluation(
            stage,
            self.engine,
            self.valid,
            world=world,
            num_workers=self.train.num_workers,
            watchdog=self.watchdog,
        )
        self.latest_metrics: dict[str, float] = {}
        self.evaluated_step = self.saved_step = -1

    def fit(self) -> None:
        """Train from the newest checkpoint, or from the beginning, to the last step."""
        self.resume()
        self.meters, self.communication = Meters(self.world), CommunicationWatch(self.world)
        with closing(self._open_log()) as self.log, StopRequest() as self.stop, closing(self.steps()) as steps:
            self.announce()
            self.dry_run()
            try:
                self.train_to_the_end(steps)
            except StopAgreed:
                self.leave()

    def train_to_the_end(self, steps: Iterator[FedStep]) -> None:
        """Take the steps that are left, and all that comes between and after them; StopAgreed where a rank is asked."""
        if self.state.owes_evaluation:
            self.evaluate()
        for fed in self.meters.waited(steps):
            agreed = self.agree(fed)
            result = self.train_step(fed, agreed)
            self.count_step(fed, agreed, result)
            self.watchdog.beat(f"between steps {self.state.step} and {self.state.step + 1}")
            if self.due(self.train.log_every):
                self.log_metrics()
            if agreed.stop:
                raise StopAgreed
            if self.state.owes_evaluation:
                self.evaluate()
            if self.due(self.train.save_every):
                self.save_once()
        self.check_frozen()
        if self.train.save_every:
            self.save_once()
        if self.evaluated_step != self.state.step:
            self.evaluate()
        self.weights_step = self.return_to_best()

    def leave(self) -> NoReturn:
        """Stop as all ranks have agreed to. An evaluation that was due and is not done comes after the resume."""
        self.save_once()
        self.log.say(f"stopped on request after step {self.state.step}; start again to go on")
        raise Interrupted

    def train_step(self, fed: FedStep, agreed: Agreed) -> StepResult:
        """Forward and backward of this rank's micro-batches, clip, step; a step that is not finite changes nothing."""
        self.engine.set_lr(lr_factor(self.state.step, total_steps=self.total_steps, cfg=self.train))
        batches = [batch.to(self.world.device) for batch in fed.batches]
        with self.communication.step():
            result = self.engine.step(batches, agreed.count)
        self.state.step += 1
        if not result.applied:
            self.skip(batches, agreed)
        if self.state.step == 1:
            self.check_frozen()
        return result

    def agree(self, fed: FedStep) -> Agreed:
        """Sum what the ranks must agree on, and end the run where the data are too bad."""
        for bad in (bad for batch in fed.batches for bad in batch.bad):
            log.warning(f"bad utterance: {bad}")
        agreed = agree(fed, self.stage, stop=self.stop.requested, world=self.world)
        self.state.bad_utterances += int(agreed.bad)
        # Judged against a thousand utterances or an epoch at least: one in the first batch of ten is not yet 10 %.
        seen = max(self.state.samples_seen, min(1000, self.summary.utterances))
        if self.state.bad_utterances > self.train.max_bad_fraction * seen:
            raise ValueError(
                f"{self.state.bad_utterances} of {seen} utterances were unusable, more than train.max_bad_fraction="
                f"{self.train.max_bad_fraction} (each is named in the log above); repair the data "
                "(`seedling check-data`) or raise the limit"
            )
        return agreed

    def steps(self) -> Generator[FedStep, None, None]:
        """Planned steps with this rank's batches, from where the run stands to its last step."""
        cursor = Cursor.from_dict(self.state.cursor) if self.state.cursor else None
        remaining, epochs = self.total_steps - self.state.step, None
        if self.steps_are_estimated:
            remaining, epochs = None, self.train.epochs
        if remaining is None or remaining > 0:
            fed = feed(self.data, world=self.world, num_workers=self.train.num_workers, cursor=cursor, epochs=epochs)
            steps: Iterator[FedStep] = islice(fed, remaining)
            if isinstance(self.stage, LooksAhead):
                steps = self.stage.prepared(steps, weights=self.engine.whole_model, step=self.state.step)
            yield from steps  # closing this one closes that one

    def due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0)

    def at_last_step(self) -> bool:
        return self.state.step == self.total_steps and not self.steps_are_estimated

    def count_step(self, fed: FedStep, agreed: Agreed, result: StepResult) -> None:
        """Move the run's state past a step, the same on every rank."""
        self.state.cursor = fed.planned.cursor.to_dict()
        self.state.epoch = fed.planned.micro_batches[0].epoch
        self.state.samples_seen += int(agreed.utterances)
        # That of the last step comes after its checkpoint, where it is known to be the last.
        self.state.owes_evaluation = self.due(self.train.eval_every) and not self.at_last_step()
        self.meters.add(result, agreed)
        utterances = [pair for micro_batch in fed.planned.micro_batches for pair in micro_batch.utterances]
        self.log.advance(self.state.step, epoch=self.state.epoch, utterances=utterances)

    def skip(self, batches: list[Any], agreed: Agreed) -> None:
        """A step was dropped: name the utterances to blame, and stop the run when it happens too often."""
        self.state.nonfinite_steps += 1
        blames = [b for share in self.world.gather(self.engine.blame(batches, agreed.count)) for b in share]
        where = (
            "; ".join(f"{b.where} of {', '.join(b.keys)}" for b in blames) or "no single micro-batch (sum overflowed)"
        )
        message = f"step {self.state.step} skipped, not finite: {where}"
        if self.state.nonfinite_steps > self.train.max_nonfinite_steps:
            raise ValueError(
                f"{message}. That is {self.state.nonfinite_steps} such steps, more than train.max_nonfinite_steps="
                f"{self.train.max_nonfinite_steps}; look at these utterances, lower train.lr, or raise the limit"
            )
        self.log.say(message)

    def log_metrics(self) -> None:
        self.log.metrics(self.state.step, self.train_metrics())
        for remark in self.meters.remarks:
            self.log.say(remark)

    def train_metrics(self) -> dict[str, float]:
        factor = lr_factor(self.state.step - 1, total_steps=self.total_steps, cfg=self.train)
        rates = {name: self.train.lr[name] * factor for name in self.engine.groups}
        return self.meters.read() | {
            **self.communication.metrics,
            "train/lr": max(rates.values()),
            **{f"train/lr/{name}": rate for name, rate in rates.items()},
            "train/mem_growth_gb": peak_memory_gb() - self.memory_before,
            "train/ranks": self.world.size,
            "train/samples_seen": self.state.samples_seen,
            "train/epoch": self.state.epoch,
            "train/nonfinite_steps": self.state.nonfinite_steps,
            "train/bad_utterances": self.state.bad_utterances,
        }

    def evaluate(self) -> None:
        """Evaluate every validation set on the model as it is; the best so far is kept as a checkpoint."""
        values = self.measure()
        self.evaluated_step, self.state.owes_evaluation = self.state.step, False
        if name := self.train.keep_best:
            if name not in values:
                raise ValueError(f"train.keep_best is {name!r}; what is evaluated is {', '.join(values) or 'nothing'}")
            best = self.state.best["metrics"][name] if self.state.best.get("metric") == name else math.nan
            if math.isnan(best) or values[name] < best:
                self.state.best = {"metric": name, "metrics": values, "step": self.state.step}
                self.save()

    def measure(self) -> dict[str, float]:
        """Return the metrics of every validation set, having logged them."""
        values = self.evaluation.measure(step=self.state.step, stop=self.stop)
        if values:
            self.latest_metrics = values
            self.log.metrics(self.state.step, values)
            self.log.say(f"step {self.state.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        return values

    def return_to_best(self) -> int:
        """Load the weights of the best evaluation again, whose metrics the artifact then has; return their step."""
        best = self.state.best
        if not self.train.keep_best or best["step"] == self.state.step:
            return self.state.step
        what = f"{best['metric']} {best['metrics'][best['metric']]:.4g}"
        checkpoint = self.checkpoints / checkpoint_name(best["step"])
        if problem := damage_seen(checkpoint, world=self.world):
            if self.world.is_main:
                log.warning(
                    f"{checkpoint}: torn checkpoint ({problem}) of the best weights ({what}); the artifact has "
                    f"the last ones instead, of step {self.state.step}"
                )
            return self.state.step
        self.log.say(f"going back to the best weights ({what}), of step {best['step']}")
        self.save_once()  # a stop from here on must not need what is now replaced
        self.load_weights(checkpoint, load_state(checkpoint))
        self.latest_metrics = best["metrics"]
        return best["step"]

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one and train.resume allows it."""
        if self.train.resume == "never":
            delete_checkpoints(self.checkpoints, world=self.world)
            return
        self.watchdog.beat("looking for a whole checkpoint")
        checkpoint = find_checkpoint(self.checkpoints, world=self.world)
        if checkpoint is None:
            return
        state = load_state(checkpoint)
        changes = check_resumable(state, self.state, checkpoint=checkpoint)
        self.watchdog.beat(f"loading {checkpoint}")
        self.load_weights(checkpoint, state)
        kept = {f: getattr(self.state, f) for f in ("frozen_digests", "shapes", "config", "world_size", "zero_stage")}
        self.state = replace(state, **kept)
        self.saved_step = state.step
        if self.world.is_main:
            at = Cursor.from_dict(state.cursor) if state.cursor else Cursor()
            print(
                f"resuming from {checkpoint}: step {state.step + 1} of {self.total_steps}, epoch {at.epoch}, "
                f"step {at.step} in it, after {state.samples_seen} utterances"
            )
            for change in changes:
                log.warning(f"config changed since the checkpoint: {change}")

    def load_weights(self, checkpoint: Path, state: TrainState) -> None:
        self.engine.load(str(checkpoint), SHARDS, ranks=state.world_size, zero_stage=state.zero_stage)

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def save_once(self) -> None:
        """Write a checkpoint of the step that the run stands at, unless there is one."""
        if self.saved_step != self.state.step:
            self.save()

    def save(self) -> None:
        self.watchdog.beat(f"writing the checkpoint of step {self.state.step}")
        self.log.sync()
        save_checkpoint(
            self.checkpoints,
            self.state,
            save_shards=self.engine.save,
            world=self.world,
            keep_last=self.train.keep_last,
        )
        self.saved_step = self.state.step
        self.watchdog.beat(f"after the checkpoint of step {self.state.step}")

    def announce(self) -> None:
        """Say what is about to be trained on what."""
        plan, M = self.summary, self.train.micro_batches
        self.log.say(format_table(parameter_table(self.engine.model, self.engine.groups, self.train.lr)))
        self.log.say(
            f"data: {self.data.plan.amount(plan)}, {plan.steps} steps an epoch of {M} micro-batches, "
            f"refused {plan.num_refused}; {self.total_steps} steps "
            f"on {self.world.size} x {self.world.device.type}, {self.train.precision}, ZeRO {self.engine.zero_stage}"
        )
        if self.engine.zero_stage != self.train.zero_stage:
            self.log.say("train.zero_stage=0 with bf16 has no fp32 master weights in DeepSpeed: running at stage 1")
        for name in sorted(set(self.train.lr) - set(self.engine.groups)):
            self.log.say(f"train.lr.{name} has no effect: no trainable parameter is in that group")

    def dry_run(self) -> None:
        """Run the largest planned micro-batch before step 1, so that what does not fit into memory fails now.

        It is given the last index of the run: a stage may begin with steps that use a part of the model only.
        """
        if not self.train.dry_run:
            return
        last = self.total_steps * self.train.micro_batches - 1
        batch = self.data.dataset[self.summary.largest._replace(index=last)].to(self.world.device)
        with OperationCounter() as counter:
            took = self.engine.dry_run(batch)
        self.meters.know_work(counter.flops.model, padded_seconds=batch.padded_seconds, precision=self.train.precision)
        self.log.say(
            f"dry run of the largest micro-batch: {batch.amount}, "
            f"took {took:.2f} s, peak memory {peak_memory_gb():.2f} GB"
        )

    def check_frozen(self) -> None:
        """Frozen means bit-identical; the optimizer was never given these parameters (engine.py)."""
        mine = self.engine.frozen_digest()
        if mine != self.state.frozen_digests[self.world.rank]:
            raise AssertionError(f"rank {self.world.rank}: frozen parameters changed by step {self.state.step}")

    def export(self) -> Artifact:
        """Write RUN/artifact from the weights as they are; all ranks take part, rank 0 writes."""
        writer = ArtifactWriter(
            self.run_dir / "artifact",
            kind=self.stage.produces,
            stage=self.cfg.stage,
            inputs=self.inputs,
            config=asdict(self.cfg),
            metrics=self.latest_metrics,
            facts={
                "steps": self.weights_step,
                "samples_seen": self.state.samples_seen,
                "data_fingerprint": self.state.data_fingerprint,
                "parameters": sum(map(numel, self.engine.model.parameters())),
                "trainable_parameters": sum(map(numel, self.engine.trainable)),
            },
        )
        with self.engine.whole_model(everywhere=False) as model:
            if self.world.is_main:
                self.stage.export(model, writer.start())
                writer.finish()
            self.world.barrier()
        return load_artifact(writer.target, verify=False)

    def _open_log(self) -> RunLog:
        return RunLog(
            self.run_dir,
            cfg=self.train.wandb,
            is_main=self.world.is_main,
            step=self.state.step,
            total_steps=self.total_steps,
            config=asdict(self.cfg),
        )


def run_training(stage: TrainingStage, cfg: Any, *, run_dir: str | Path) -> Path:
    """Train `stage` to its artifact, RUN/artifact, going on from RUN/checkpoints if any. Call it on every rank.

    Raises ValueError for the user's mistakes, and Interrupted (a SystemExit with code 75) when asked to stop.
    """
    run_dir = Path(run_dir)
    check_target(run_dir / "artifact", kind=stage.produces, stage=cfg.stage)
    run_dir.mkdir(parents=True, exist_ok=True)
    world = init_world()
    with watchdog_of(cfg, run_dir=run_dir, world=world) as watchdog:
        trainer = Trainer(stage, cfg, run_dir=run_dir, world=world, watchdog=watchdog)
        trainer.fit()
        watchdog.beat("exporting the artifact")
        return trainer.export().path


def watchdog_of(cfg: Any, *, run_dir: Path, world: World) -> Watchdog:
    return Watchdog(run_dir, rank=world.rank, timeout=cfg.train.hang_timeout)


def run_computation(stage: RunStage, cfg: Any, *, run_dir: str | Path) -> Path:
    """Run a stage without gradients to RUN/artifact. Call it on every rank; all write into one staging folder."""
    run_dir = Path(run_dir)
    check_target(run_dir / "artifact", kind=stage.produces, stage=cfg.stage)
    run_dir.mkdir(parents=True, exist_ok=True)
    world = init_world()
    inputs = load_inputs(stage.consumes, cfg.inputs, stage=cfg.stage)
    writer = ArtifactWriter(
        run_dir / "artifact", kind=stage.produces, stage=cfg.stage, inputs=inputs, config=asdict(cfg)
    )
    if world.is_main:
        writer.start()
    world.barrier()
    torch.manual_seed(cfg.seed)
    stage.run(cfg, inputs, writer)
    world.barrier()
    if world.is_main:
        writer.finish()
    world.barrier()
    return writer.target
