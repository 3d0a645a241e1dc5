"""Real processes: what they make, how they end, and that training does not show who made its hypotheses."""

import json
import os
import signal
import socket
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from speaking_toy import SpeakingToy, speaking_config
from toy_jobs import Job, largest_difference, load_weights

from seedling.stages.reinforcement.generation import generate
from seedling.stages.reinforcement.weights import changing, frozen_digest, take_weights
from seedling.stages.reinforcement.worker_process import Maker, Recipe, Request, Worker, WorkerLost, limit_silence
from seedling.stages.runtime.parameters import freeze_others
from seedling.stages.runtime.trainer import run_training

REFUSED, FAILED = "u0011", "u0022"


def recipe(cfg, model, **changes) -> Recipe:
    made = Recipe(SpeakingToy, asdict(cfg), {}, torch.device("cpu"), threads=1, frozen=frozen_digest(model))
    return made._replace(**changes)


def built(cfg) -> tuple[SpeakingToy, torch.nn.Module]:
    """The stage and its model as the trainer builds them."""
    stage = SpeakingToy()
    torch.manual_seed(cfg.seed)
    model = stage.build(cfg, {})
    freeze_others(model, stage.trainable)
    return stage, model


def runs_on(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def train(run_dir, **settings) -> SpeakingToy:
    stage = SpeakingToy()
    run_training(stage, speaking_config(run_dir, **settings), run_dir=run_dir)
    return stage


# ---- training with workers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The stages of finished runs, with the weights they exported."""
    root = tmp_path_factory.mktemp("trained")
    runs = {
        "here": {},
        "killed": {"generation": {"workers": 2}, "kill_at": 9, "generate_seconds": 0.05},
        **{f"{n} of 2": {"generation": {"workers": n, "every": 2}} for n in (1, 2, 3)},
    }
    stages = {name: train(root / name, **settings) for name, settings in runs.items()}
    return {name: (stage, load_weights(root / name)) for name, stage in stages.items()}


def assert_same_training(a, b):
    (stage, weights), (other, other_weights) = a, b
    assert all(torch.equal(weights[name], other_weights[name]) for name in other_weights)
    assert stage.heard.keys() == other.heard.keys()
    for index, heard in stage.heard.items():
        assert heard.hypotheses == other.heard[index].hypotheses and heard.version == other.heard[index].version


def test_a_killed_worker_does_not_show_and_with_every_1_workers_train_as_the_trainer_alone(trained):
    killed, _ = trained["killed"]
    assert killed.generation.restarts == 1 and killed.generation.refused == 0
    assert all(heard.age == 0 for heard in killed.heard.values()) and len(killed.heard) == 28
    assert_same_training(trained["killed"], trained["here"])


def test_training_does_not_depend_on_the_number_of_workers(trained):
    one, weights = trained["1 of 2"]
    assert [one.heard[4 * step].version for step in range(7)] == [0, 0, 2, 2, 4, 4, 6]
    assert_same_training(trained["2 of 2"], trained["1 of 2"])
    assert_same_training(trained["3 of 2"], trained["1 of 2"])
    fresh = trained["here"][1]
    assert any(not torch.equal(weights[name], fresh[name]) for name in fresh)  # else this test could not fail


def test_no_process_is_left_when_training_ends(trained):
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert not any(stage.generation.pids for stage, _ in trained.values())


# ---- one worker


@pytest.fixture(scope="module")
def alive(tmp_path_factory):
    """A worker, the config it was made with, and the trainer's model with other weights than at the start."""
    folder = tmp_path_factory.mktemp("alive")
    cfg = speaking_config(folder, refuse_keys=[REFUSED], fail_keys=[FAILED])
    stage, model = built(cfg)
    with torch.no_grad():
        for tensor in changing(model).values():
            tensor += 0.1
    worker = Worker(recipe(cfg, model), timeout_seconds=600)
    yield worker, stage, model, cfg
    worker.close()
    assert not psutil.pid_exists(worker.pid)


def micro_batches(stage, cfg, *, having=(), without=()):
    """The planned micro-batches of an epoch that have these utterances, and none of those."""
    data = stage.batches(cfg, "train")
    for step in data.plan.steps(epochs=1):
        for micro_batch in step.micro_batches:
            batch = data.dataset[micro_batch]
            if set(having) <= set(batch.keys) and not set(without) & set(batch.keys):
                yield micro_batch, batch


def test_a_worker_makes_what_the_trainer_would_with_the_weights_it_was_given_last(alive):
    worker, stage, model, cfg = alive
    for version in (3, 4):
        weights = take_weights(model, version=version)
        for micro_batch, batch in list(micro_batches(stage, cfg, without=[REFUSED, FAILED]))[:2]:
            made = worker.make(micro_batch, weights)
            assert made.hypotheses == generate(stage, model, batch, seed=cfg.seed)
            assert made.version == version and made.seconds > 0
        with torch.no_grad():
            model.head.weight += 0.1


def test_what_the_stage_raises_travels_and_the_worker_lives_on(alive):
    worker, stage, model, cfg = alive
    weights = take_weights(model, version=9)
    refused, _ = next(micro_batches(stage, cfg, having=[REFUSED]))
    failed, _ = next(micro_batches(stage, cfg, having=[FAILED], without=[REFUSED]))
    with pytest.raises(ValueError, match=f"^{REFUSED} cannot be said; leave it out$"):
        worker.make(refused, weights)
    with pytest.raises(RuntimeError, match=f"RuntimeError in a generation worker, .*: {FAILED} went wrong"):
        worker.make(failed, weights)
    fine, batch = next(micro_batches(stage, cfg, without=[REFUSED, FAILED]))
    assert worker.make(fine, weights).hypotheses == generate(stage, model, batch, seed=cfg.seed)


def test_a_signal_to_stop_is_the_trainers(alive):
    worker, stage, model, cfg = alive
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    fine, _ = next(micro_batches(stage, cfg, without=[REFUSED, FAILED]))
    assert worker.make(fine, take_weights(model, version=10)).version == 10


def test_a_worker_that_hangs_and_one_that_is_killed_are_lost(alive):
    """The last test of this worker."""
    worker, stage, model, cfg = alive
    weights = take_weights(model, version=11)
    fine, _ = next(micro_batches(stage, cfg, without=[REFUSED, FAILED]))
    with socket.socket(fileno=os.dup(worker.connection.fileno())) as stream:
        limit_silence(stream, 0.3)
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerLost, match="was silent for"):
        worker.make(fine, weights)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match="ended with exit code -9"):
        worker.make(fine, weights)


def test_one_that_dies_or_hangs_before_it_has_a_model_is_lost(tmp_path):
    cfg = speaking_config(tmp_path)
    _, model = built(cfg)
    worker = Worker(recipe(cfg, model), timeout_seconds=0.05)
    with pytest.raises(WorkerLost, match=r"was silent for 0.05 s"):
        worker.make(None, take_weights(model, version=0))
    worker.kill()
    with pytest.raises(WorkerLost, match="ended with exit code -9"):
        worker.make(None, take_weights(model, version=0))
    worker.close()


# ---- the model that a worker has


def test_frozen_weights_other_than_the_trainers_are_refused(tmp_path):
    cfg = speaking_config(tmp_path)
    _, model = built(cfg)
    Maker(recipe(cfg, model))
    with pytest.raises(ValueError, match=r"SpeakingToy.build has made other frozen weights than in the trainer"):
        Maker(recipe(cfg, model, config=asdict(speaking_config(tmp_path, seed=2))))


def test_weights_of_another_model_are_refused(tmp_path):
    cfg = speaking_config(tmp_path)
    _, model = built(cfg)
    maker = Maker(recipe(cfg, model))
    model.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"do not both have a weight head.bias; `build` must make the same model"):
        maker.make(Request(None, take_weights(model, version=0)))


def test_buffers_and_tied_weights_travel_and_frozen_ones_do_not():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3), "n": torch.nn.BatchNorm1d(3)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    model.register_buffer("draft", torch.ones(2), persistent=False)
    norm = {f"n.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert changing(model).keys() == {"a.weight", "b.bias"} | norm


def test_a_worker_in_bf16_makes_what_a_bf16_run_makes(tmp_path):
    cfg = speaking_config(tmp_path, train={"precision": "bf16", "zero_stage": 2, "max_steps": 1})
    stage = SpeakingToy()
    run_training(stage, cfg, run_dir=tmp_path)
    _, model = built(cfg)
    maker = Maker(recipe(cfg, model.bfloat16()))
    first = next(stage.batches(cfg, "train").plan.steps()).micro_batches
    for micro_batch in first:
        made = maker.make(Request(micro_batch, take_weights(model, version=0)))
        assert made.hypotheses == stage.heard[micro_batch.index].hypotheses


# ---- several ranks, and a trainer that dies


def test_ranks_under_zero_3_train_with_workers_and_take_them_along_when_killed(trained, tmp_path):
    """Delivering weights is a collective there. Every rank is killed at once, as by a machine that fails."""
    generation = {"workers": 1}
    runs = {
        "short": {"generation": generation, "train": {"zero_stage": 3}},
        "long": {"generation": generation, "generate_seconds": 0.2, "train": {"zero_stage": 3, "max_steps": 500}},
    }
    job = Job(tmp_path, runs, ranks=2, toy=Path(__file__).with_name("speaking_toy.py"))
    try:
        job.wait_for_step("long", 2)
        pids = [pid for rank in range(2) for pid in json.loads((tmp_path / "long" / f"pids{rank}").read_text())]
        assert len(pids) == 2 and all(map(runs_on, pids))
    finally:
        job.kill()
    assert largest_difference(load_weights(tmp_path / "short"), trained["here"][1]) < 1e-5
    deadline = time.time() + 600
    while any(map(runs_on, pids)):
        assert time.time() < deadline, f"of the workers {pids} some are left"
        time.sleep(0.05)
