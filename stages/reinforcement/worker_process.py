"""A process that makes hypotheses, and the trainer's end of the socket between them.

A worker builds the stage itself and reads the audio itself, so that a request is a planned micro-batch, with weights
where it does not have them yet, and the answer is hypotheses with the version of the weights that made them. Messages
are pickled, weights follow them as raw bytes. The worker ends when the trainer does, and only then: a signal to stop is
the trainer's, which needs hypotheses to finish its step.
"""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait
from typing import Any, NamedTuple

import torch

from ...data.batches import leave_signals_to_the_trainer
from ...data.parallel import end_with_parent
from ...data.plan import MicroBatch
from ..runtime.artifacts import Artifact
from ..runtime.config import load_config
from ..runtime.parameters import freeze_others
from .generation import GeneratingStage, NBests, generate
from .weights import Weights, frozen_digest, put_weights

GRACE_SECONDS = 5.0  # until a process whose socket has closed has an exit code


class Recipe(NamedTuple):
    """What a worker is made from. The class must be importable, as those are that `seedling run` finds."""

    stage: type[GeneratingStage]
    config: dict[str, Any]  # the whole one, as plain values
    inputs: dict[str, Artifact]
    device: torch.device
    threads: int
    frozen: str  # hash of the weights that do not travel


class Request(NamedTuple):
    """Hypotheses for a micro-batch. With a `delivery`, its tensors follow, to be used from now on."""

    micro_batch: MicroBatch
    delivery: Weights | None


class Made(NamedTuple):
    hypotheses: NBests
    version: int  # of the weights that made them
    seconds: float  # reading the audio is part of it


class Failed(NamedTuple):
    """The stage has raised something; the worker lives on."""

    is_value_error: bool
    message: str


class WorkerLost(Exception):
    """A worker has died or hangs: another one may do the work. The text goes on after the worker's name."""


class Worker:
    """The trainer's end. One thread asks and closes; `kill` is anyone's."""

    def __init__(self, recipe: Recipe, *, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        self.server = socket.create_server(("127.0.0.1", 0))
        self.connection: Connection | None = None
        self.version: int | None = None
        # Spawned: a forked child would inherit the trainer's GPU and its threads' locks.
        self.process = multiprocessing.get_context("spawn").Process(
            target=work, args=(self.server.getsockname(), recipe), daemon=True
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None, "it has been started"
        return self.process.pid

    def make(self, micro_batch: MicroBatch, weights: Weights) -> Made:
        """Return hypotheses, made with these weights unless the worker errs. Raises WorkerLost, or what it raised."""
        with self._watched():
            if self.connection is None:
                self.connection = self._connected()
            delivery = None if self.version == weights.version else weights._replace(tensors=b"")
            self.connection.send_bytes(pickle.dumps(Request(micro_batch, delivery)))
            if delivery is not None:
                self.connection.send_bytes(weights.tensors)
            answer: Made | Failed = pickle.loads(self.connection.recv_bytes())
        if isinstance(answer, Failed):
            raise (ValueError if answer.is_value_error else RuntimeError)(answer.message)
        self.version = answer.version
        return answer

    def kill(self) -> None:
        """End the process, whatever it is doing; it has nothing that could be lost."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        self.kill()
        self.server.close()
        if self.connection is not None:
            self.connection.close()

    def _connected(self) -> Connection:
        ready = wait([self.server, self.process.sentinel], self.timeout_seconds)
        if self.server not in ready:
            raise EOFError if ready else BlockingIOError
        stream, _ = self.server.accept()
        limit_silence(stream, self.timeout_seconds)
        connection = Connection(stream.detach())
        deliver_challenge(connection, _authkey())
        answer_challenge(connection, _authkey())
        return connection

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Turn the ways in which a process can go into WorkerLost."""
        try:
            yield
        except BlockingIOError as silence:
            raise WorkerLost(f"was silent for {self.timeout_seconds:g} s") from silence
        except (EOFError, OSError, multiprocessing.AuthenticationError) as gone:
            self.process.join(GRACE_SECONDS)
            code = self.process.exitcode
            raise WorkerLost("broke off" if code is None else f"ended with exit code {code}") from gone


def limit_silence(stream: socket.socket, seconds: float) -> None:
    """Let reads and writes end with BlockingIOError when nothing comes or goes for so long."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        stream.setsockopt(socket.SOL_SOCKET, option, limit)


def work(address: tuple[str, int], recipe: Recipe) -> None:
    """Build the stage, then answer requests until the trainer is gone. What a worker process runs."""
    leave_signals_to_the_trainer()
    end_with_parent()
    torch.set_num_threads(recipe.threads)
    if recipe.device.type == "cuda":
        torch.cuda.set_device(recipe.device)
    maker = _attempt(partial(Maker, recipe))
    with Client(address, authkey=_authkey()) as connection:
        try:
            while True:
                micro_batch, delivery = pickle.loads(connection.recv_bytes())
                if delivery is not None:
                    delivery = delivery._replace(tensors=connection.recv_bytes())
                request = Request(micro_batch, delivery)
                answer = maker if isinstance(maker, Failed) else _attempt(partial(maker.make, request))
                connection.send_bytes(pickle.dumps(answer))
        except (EOFError, ConnectionError):
            return  # the trainer has closed its end


class Maker:
    """The stage as the trainer has built it, once more."""

    def __init__(self, recipe: Recipe):
        self.device, self.version = recipe.device, -1
        self.cfg = load_config(recipe.stage.Config, given=recipe.config).config
        self.stage = recipe.stage()
        torch.manual_seed(self.cfg.seed)  # as the trainer does: frozen weights may be drawn
        self.model = self.stage.build(self.cfg, recipe.inputs)
        freeze_others(self.model, self.stage.trainable)
        self.bf16 = self.cfg.train.precision != "fp32"
        if self.cfg.train.precision == "bf16":
            self.model.bfloat16()  # what DeepSpeed does to the trainer's
        self.model.to(self.device)
        self.dataset = self.stage.batches(self.cfg, "train").dataset
        if frozen_digest(self.model) != recipe.frozen:
            raise ValueError(
                f"generation worker: {recipe.stage.__name__}.build has made other frozen weights than in the trainer; "
                "it must depend on config, inputs and torch's seed alone"
            )

    def make(self, request: Request) -> Made:
        start = time.perf_counter()
        if request.delivery is not None:
            put_weights(self.model, request.delivery)
            self.version = request.delivery.version
        batch = self.dataset[request.micro_batch].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hypotheses = generate(self.stage, self.model, batch, seed=self.cfg.seed)
        return Made(hypotheses, self.version, time.perf_counter() - start)


def _attempt(action: Callable[[], Any]) -> Any:
    """Return what `action` returns, or Failed."""
    try:
        return action()
    except ValueError as error:
        return Failed(True, str(error))
    except Exception as error:
        traceback.print_exc()
        return Failed(False, f"{type(error).__name__} in a generation worker, traceback above: {error}")


def _authkey() -> bytes:
    return multiprocessing.current_process().authkey  # a spawned process is given its parent's
