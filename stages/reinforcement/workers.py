"""Generation in processes beside each rank, which are given the weights every `every` steps.

At a delivery the weights are copied once, the steps up to the next one are pulled ahead, and this rank's micro-batches
of all of them are put into one queue. A thread for each worker takes the next one from it. So workers are busy while
the trainer trains, but for the time between a delivery and its first hypotheses; and what they make depends on the
weights and the micro-batch, not on which of them makes it. A worker that dies or hangs is replaced and its micro-batch
made again with the weights that it was to be made with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import islice
from queue import SimpleQueue
from typing import Any

from torch import nn

from ...data.plan import MicroBatch
from ..runtime.artifacts import Artifact
from ..runtime.feed import FedStep
from ..runtime.world import local_device
from .generation import Generated, GeneratingStage, Generation, InProcess, WholeModel, generate
from .weights import Weights, frozen_digest, take_weights
from .worker_process import Made, Recipe, Worker, WorkerLost

log = logging.getLogger(__name__)


def make_generation(stage: GeneratingStage, cfg: Any, inputs: dict[str, Artifact]) -> Generation:
    """Return what `cfg.generation` asks for. Processes start with training, so `build` may call this anywhere."""
    return Workers(stage, cfg, inputs) if cfg.generation.workers else InProcess(stage, cfg)


@dataclass
class Job:
    """A micro-batch of a step, whose hypotheses are to be made with these weights."""

    micro_batch: MicroBatch
    step: int
    weights: Weights  # kept for as long as a job may have to be done again
    made: Future[Made] = field(default_factory=Future)

    @property
    def age(self) -> int:
        return self.step - self.weights.version


class Workers:
    """Generation by `cfg.generation.workers` processes, alive from the first step to the end of training."""

    def __init__(self, stage: GeneratingStage, cfg: Any, inputs: dict[str, Artifact]):
        self.stage, self.cfg, self.inputs, self.settings = stage, cfg, inputs, cfg.generation
        self.refused = self.restarts = 0
        self.jobs: dict[int, Job] = {}  # by the micro-batch's index
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self.workers: list[Worker | None] = []
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()  # over starting workers and counting
        self.closed = False

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.pid for worker in self.workers if worker is not None]

    def prepared(self, steps: Iterator[FedStep], *, weights: WholeModel, step: int) -> Iterator[FedStep]:
        every = self.settings.every
        # The first steps before the threads: data loaders fork when they are first asked, and should have none beside.
        ahead = deque(islice(steps, every - step % every))
        try:
            while ahead:
                with weights() as model:
                    taken = take_weights(model, version=step)
                    if not self.threads:
                        self._open(model, most=every * len(ahead[0].batches))
                for number, fed in enumerate(ahead, start=step):
                    self._submit(fed, step=number, weights=taken)
                while ahead:
                    fed = ahead.popleft()
                    yield fed
                    for micro_batch in fed.share:
                        del self.jobs[micro_batch.index]
                    step += 1
                ahead.extend(islice(steps, every))
        finally:
            self._close()

    def of(self, model: nn.Module, batch: Any, **known: Any) -> Generated:
        start = time.perf_counter()
        job = self.jobs.get(batch.index)
        if job is None:  # the dry run's, which is the same on all ranks: under ZeRO-3 they go through it together
            hypotheses = generate(self.stage, model, batch, seed=self.cfg.seed, **known)
            seconds = time.perf_counter() - start
            return Generated(hypotheses, 0, seconds, waited=seconds)
        made = job.made.result()
        assert len(made.hypotheses) == len(batch), "a batch is a pure function of its micro-batch"
        return Generated(made.hypotheses, made.version, made.seconds, job.age, time.perf_counter() - start)

    def start(self, recipe: Recipe) -> Worker:
        """Start a process; it builds its model while others do."""
        return Worker(recipe, timeout_seconds=self.settings.timeout_seconds)

    def _submit(self, fed: FedStep, *, step: int, weights: Weights) -> None:
        for micro_batch in fed.share:
            job = self.jobs[micro_batch.index] = Job(micro_batch, step, weights)
            self.queue.put(job)

    def _open(self, model: nn.Module, *, most: int) -> None:
        places = range(self.settings.workers)
        if len(places) > most:
            log.warning(
                f"generation.workers is {len(places)}, and between two deliveries of weights there are {most} "
                "micro-batches for them: the others have nothing to do"
            )
        self.closed = False
        self.recipe = Recipe(
            stage=type(self.stage),
            config=asdict(self.cfg),
            inputs=self.inputs,
            device=local_device(),
            threads=self.settings.worker_threads,
            frozen=frozen_digest(model),
        )
        for _ in places:
            self.workers.append(self.start(self.recipe))
        self.threads = [threading.Thread(target=self._serve, args=(place,), daemon=True) for place in places]
        for thread in self.threads:
            thread.start()

    def _close(self) -> None:
        with self.lock:
            self.closed = True
            for worker in filter(None, self.workers):
                worker.kill()
        for _ in self.threads:
            self.queue.put(None)
        for thread in self.threads:
            thread.join()
        for worker in filter(None, self.workers):
            worker.close()
        self.threads, self.workers = [], []
        self.jobs.clear()

    def _serve(self, place: int) -> None:
        """Do jobs until there is none: what a thread runs."""
        while (job := self.queue.get()) is not None:
            try:
                job.made.set_result(self._do(job, place))
            except BaseException as error:  # raised again where the hypotheses are waited for
                job.made.set_exception(error)

    def _do(self, job: Job, place: int) -> Made:
        """Have the worker in `place` make a job's hypotheses, again where it dies or they are refused."""
        index, tries = job.micro_batch.index, self.settings.max_restarts + 1
        for _ in range(tries):
            worker = self._worker(place)
            try:
                made = worker.make(job.micro_batch, job.weights)
            except WorkerLost as lost:
                if self.closed:
                    raise
                self._leave(place)
                problem = f"generation worker {place} {lost} over micro-batch {index}"
            else:
                problem = self._objection(made, job)
                if problem is None:
                    return made
                with self.lock:
                    self.refused += 1
            log.warning(problem)
        raise RuntimeError(
            f"{problem}, after {tries - 1} such failures (generation.max_restarts={tries - 1}); it says why above. "
            "Exit code -9 is mostly a lack of memory: lower generation.workers or train.micro_batch_seconds"
        )

    def _objection(self, made: Made, job: Job) -> str | None:
        """Say why hypotheses are refused."""
        what = f"hypotheses of micro-batch {job.micro_batch.index} refused: they are of version {made.version}"
        if (age := job.step - made.version) > self.settings.oldest:
            return f"{what}, {age} steps old, and generation.max_staleness is {self.settings.oldest}"
        return f"{what} instead of {job.weights.version}" if made.version != job.weights.version else None

    def _worker(self, place: int) -> Worker:
        """Return the worker in a place, a new one where it was lost."""
        with self.lock:
            if self.closed:
                raise RuntimeError("training has ended")
            worker = self.workers[place]
            if worker is None:
                worker = self.workers[place] = self.start(self.recipe)
                self.restarts += 1
            return worker

    def _leave(self, place: int) -> None:
        with self.lock:
            worker, self.workers[place] = self.workers[place], None
        if worker is not None:
            worker.close()
