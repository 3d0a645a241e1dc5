"""The loop from outside: what it trains, logs, refuses and hands on. Kills and resumes are in test_checkpoint.py."""

import json
import os
import signal
from itertools import islice

import pytest
import torch
from toy_jobs import load_weights, read_lines
from toy_stage import ToyStage, toy_config

from seedling.data.plan import Plan
from seedling.stages.runtime import evaluation
from seedling.stages.runtime.artifacts import load_artifact
from seedling.stages.runtime.checkpoint import list_checkpoints
from seedling.stages.runtime.parameters import digest
from seedling.stages.runtime.schedule import lr_factor
from seedling.stages.runtime.seeds import seed_forward
from seedling.stages.runtime.signals import Interrupted
from seedling.stages.runtime.train_config import TrainConfig
from seedling.stages.runtime.trainer import run_computation, run_training


def train(run_dir, stage=None, **settings):
    return run_training(stage or ToyStage(), toy_config(run_dir, **settings), run_dir=run_dir)


def test_training_learns_logs_and_hands_on(tmp_path):
    path = train(tmp_path, train={"max_steps": 60, "eval_every": 20, "lr": {"body": 3e-2, "head": 3e-2}}, dropout=0.0)
    artifact = load_artifact(path, kind="toy_model")
    lines = read_lines(tmp_path / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert [line["step"] for line in lines if "valid/dev/loss" in line] == [20, 40, 60]
    assert artifact.metrics["valid/dev/loss"] == lines[-1]["valid/dev/loss"]
    assert artifact.facts["steps"] == 60 and artifact.facts["trainable_parameters"] == 289
    names = ["loss", "lr", "grad_norm", "tokens_per_s", "audio_hours_per_s", "padding_frac_audio", "data_wait_frac"]
    for name in [*names, "mem_peak_gb", "samples_seen", "epoch"]:
        assert f"train/{name}" in lines[0]
    json.dumps(artifact.manifest)


def test_the_logged_loss_is_a_sum_over_a_count(tmp_path):
    """One step of the untrained model: the log equals the loss over all frames, whatever the micro-batches."""
    train(tmp_path, train={"max_steps": 1, "log_every": 1, "dry_run": False}, dropout=0.0)
    logged = read_lines(tmp_path / "metrics.jsonl")[0]["train/loss"]
    stage, cfg = ToyStage(), toy_config(tmp_path, dropout=0.0)
    torch.manual_seed(cfg.seed)
    model = stage.build(cfg, {})
    data = stage.batches(cfg, "train")
    batches = [data.dataset[m] for m in next(data.plan.steps()).micro_batches]
    expected = sum(float(stage.loss(model, b).loss_sum.detach()) for b in batches) / sum(map(stage.count, batches))
    assert logged == pytest.approx(expected, rel=1e-6)


def test_epochs_consume_every_utterance_that_often(tmp_path):
    train(tmp_path, train={"epochs": 2, "save_every": 0})
    seen = [tuple(pair) for line in read_lines(tmp_path / "ledger.jsonl") for pair in line["utterances"]]
    assert sorted(seen) == sorted([(0, row) for row in range(120)] * 2)


@pytest.mark.parametrize("error", [0.5, 2.0])
def test_epochs_too_long_to_be_counted_end_where_the_plan_does(tmp_path, monkeypatch, error):
    """Whatever the estimate of their steps was: it serves the learning rate."""
    exact = Plan.summary

    def estimated(plan, epoch=0):
        summary = exact(plan, epoch)
        return summary._replace(steps=round(summary.steps * error), sampled_windows=1)

    monkeypatch.setattr(Plan, "summary", estimated)
    train(tmp_path, train={"epochs": 2, "save_every": 0})
    seen = [tuple(pair) for line in read_lines(tmp_path / "ledger.jsonl") for pair in line["utterances"]]
    assert sorted(seen) == sorted([(0, row) for row in range(120)] * 2)


def test_the_dry_run_and_the_log_interval_change_nothing(tmp_path):
    train(tmp_path / "a", train={"max_steps": 6, "dry_run": True, "log_every": 1, "eval_every": 2})
    train(tmp_path / "b", train={"max_steps": 6, "dry_run": False, "log_every": 5})
    a, b = load_weights(tmp_path / "a"), load_weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_further_goes_on_from_the_last_checkpoint(tmp_path, capsys):
    constant = {"schedule": "constant", "warmup_steps": 0}
    train(tmp_path / "two", train={"max_steps": 4, **constant})
    train(tmp_path / "two", train={"max_steps": 8, **constant})
    assert "step 5 of 8" in capsys.readouterr().out
    train(tmp_path / "one", train={"max_steps": 8, **constant})
    a, b = load_weights(tmp_path / "two"), load_weights(tmp_path / "one")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("save_every", "kept"), [(4, ["step_000006", "step_000004"]), (0, [])])
def test_the_last_step_is_kept_before_it_is_evaluated(tmp_path, save_every, kept):
    """So that what fails from there on costs no step; a run that wants no checkpoints gets none."""

    class Failing(ToyStage):
        def evaluate(self, model, batches):
            raise RuntimeError("no evaluation")

    with pytest.raises(RuntimeError, match="no evaluation"):
        train(tmp_path, Failing(), train={"max_steps": 6, "save_every": save_every, "eval_every": 6})
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == kept


class Asked(ToyStage):
    """Is asked to stop in the evaluation of a step, before its last batch, and counts the batches."""

    def __init__(self, step=None):
        self.step, self.seen = step, {}

    def batches(self, cfg, split):
        self.limits = cfg.train
        return super().batches(cfg, split)

    def loss(self, model, batch):
        if model.training:
            self.trained = batch.index // self.limits.micro_batches + 1
        return super().loss(model, batch)

    def evaluate(self, model, batches):
        def watched():
            for number, batch in enumerate(batches):
                self.seen[self.trained] = number + 1
                if number == 0 and self.trained == self.step:
                    os.kill(os.getpid(), signal.SIGUSR1)
                yield batch

        return super().evaluate(model, watched())


@pytest.mark.parametrize(("step", "save_every"), [(4, 0), (4, 4), (6, 4), (6, 0)])
def test_a_request_to_stop_ends_an_evaluation_which_comes_after_the_resume(tmp_path, monkeypatch, step, save_every):
    monkeypatch.setattr(evaluation, "BATCHES_A_LOOK", 2)
    settings = {"train": {"max_steps": 6, "eval_every": 4, "save_every": save_every, "log_every": 1, "dry_run": False}}
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted):
            train(tmp_path / "asked", stage := Asked(step), **settings)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stage.seen[step] == 2
    newest = list_checkpoints(tmp_path / "asked" / "checkpoints")[0]
    assert newest.name == f"step_{step:06d}"
    train(tmp_path / "asked", **settings)
    train(tmp_path / "straight", stage := Asked(), **settings)
    assert set(stage.seen) == {4, 6} and stage.seen[4] > 2
    evaluations = [
        [(line["step"], line["valid/dev/loss"]) for line in lines if "valid/dev/loss" in line]
        for lines in (read_lines(tmp_path / name / "metrics.jsonl") for name in ("asked", "straight"))
    ]
    assert evaluations[0] == evaluations[1] and [at for at, _ in evaluations[1]] == [4, 6]


def test_resume_never_starts_anew_and_deletes_the_old_checkpoints(tmp_path):
    train(tmp_path, train={"max_steps": 8})
    train(tmp_path, train={"max_steps": 4, "resume": "never"})
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_000004"]
    assert len(read_lines(tmp_path / "ledger.jsonl")) == 4


class Judged(ToyStage):
    """Its evaluations say what they are told to, one after the other."""

    def __init__(self, *losses: float):
        self.losses = iter(losses)

    def evaluate(self, model, batches):
        return {"loss": (next(self.losses), 1.0)}


KEEP_BEST = {"schedule": "constant", "warmup_steps": 0, "keep_last": 1, "save_every": 4, "eval_every": 2}


def test_the_best_evaluation_is_gone_back_to_also_by_a_run_that_was_interrupted(tmp_path):
    """The lowest is after step 4, of 10; it is not evaluated again."""
    keep = {**KEEP_BEST, "keep_best": "valid/dev/loss"}
    train(tmp_path / "best", Judged(3.0, 1.0, 2.0, float("nan"), 1.5), train={"max_steps": 10, **keep})
    train(tmp_path / "again", Judged(3.0, 1.0, 2.0, 5.0), train={"max_steps": 8, **keep})
    assert [p.name for p in list_checkpoints(tmp_path / "again" / "checkpoints")] == ["step_000008", "step_000004"]
    train(tmp_path / "again", Judged(1.5), train={"max_steps": 10, **keep})
    train(tmp_path / "four", Judged(3.0, 1.0), train={"max_steps": 4, **KEEP_BEST})
    four = load_weights(tmp_path / "four")
    for name in ("best", "again"):
        artifact = load_artifact(tmp_path / name / "artifact")
        assert artifact.facts["steps"] == 4 and artifact.metrics == {"valid/dev/loss": 1.0}
        found = load_weights(tmp_path / name)
        assert all(torch.equal(found[key], four[key]) for key in four), name


def test_what_a_run_begins_with_can_be_the_best_of_it_and_so_can_what_it_ends_with(tmp_path):
    keep = {**KEEP_BEST, "keep_best": "valid/dev/loss", "max_steps": 4, "eval_first": True}
    train(tmp_path / "first", Judged(1.0, 2.0, 3.0), train=keep)
    torch.manual_seed(1)
    fresh = ToyStage().build(toy_config(tmp_path), {}).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in load_weights(tmp_path / "first").items())
    train(tmp_path / "last", Judged(3.0, 2.0, 1.0), train=keep)
    train(tmp_path / "plain", Judged(3.0, 2.0, 1.0), train={**keep, "keep_best": ""})
    plain = load_weights(tmp_path / "plain")
    assert all(torch.equal(value, plain[key]) for key, value in load_weights(tmp_path / "last").items())


def test_where_the_best_weights_are_torn_the_artifact_has_the_last_ones_and_says_so(tmp_path, caplog):
    class TornBest(Judged):
        def evaluate(self, model, batches):
            for shard in tmp_path.glob("checkpoints/step_000002/shards/*"):
                shard.write_bytes(b"torn")
            return super().evaluate(model, batches)

    keep = {**KEEP_BEST, "keep_best": "valid/dev/loss", "max_steps": 4}
    artifact = load_artifact(train(tmp_path, TornBest(1.0, 2.0), train=keep))
    assert artifact.facts["steps"] == 4 and artifact.metrics == {"valid/dev/loss": 2.0}
    assert "step_000002: torn checkpoint" in caplog.text and "the last ones instead, of step 4" in caplog.text
    train(tmp_path / "plain", Judged(1.0, 2.0), train={**keep, "keep_best": ""})
    plain = load_weights(tmp_path / "plain")
    assert all(torch.equal(value, plain[key]) for key, value in load_weights(tmp_path).items())


def test_the_best_of_what_nobody_measures_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="keep_best is 'valid/dev/wer'; what is evaluated is valid/dev/loss"):
        train(tmp_path, train={**KEEP_BEST, "max_steps": 4, "keep_best": "valid/dev/wer"})
    with pytest.raises(ValueError, match=r"train.eval_every is 0"):
        TrainConfig(max_steps=4, keep_best="valid/dev/loss")


def test_the_best_of_no_validation_set_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"keep_best is 'valid/test/loss'; what is evaluated is valid/dev/\.\.\."):
        train(tmp_path, Judged(), train={**KEEP_BEST, "max_steps": 4, "keep_best": "valid/test/loss"})
    assert not (tmp_path / "checkpoints").exists()


def test_autocast_trains_weights_in_float32_and_not_as_float32_does(tmp_path):
    for precision in ("autocast", "fp32"):
        train(tmp_path / precision, dropout=0.0, train={"max_steps": 4, "precision": precision})
    autocast, fp32 = load_weights(tmp_path / "autocast"), load_weights(tmp_path / "fp32")
    assert all(value.dtype == torch.float32 for value in autocast.values())
    for name, value in fp32.items():
        torch.testing.assert_close(autocast[name], value, atol=0.02, rtol=0)
    assert any(not torch.equal(autocast[name], value) for name, value in fp32.items())
    learnt = autocast["head.weight"]
    assert not torch.equal(learnt, learnt.bfloat16().float()), "small changes are kept"


def test_too_many_steps_that_are_not_finite_stop_the_run_naming_the_utterances(tmp_path):
    with pytest.raises(ValueError, match=r"loss of .*u0051.*more than train.max_nonfinite_steps=0"):
        train(tmp_path, nan_keys=["u0051"], train={"max_steps": 40, "max_nonfinite_steps": 0})


def test_too_many_bad_utterances_stop_the_run(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"2 of 120 utterances were unusable, more than train.max_bad_fraction=0.01"):
        train(tmp_path, bad_keys=["u0011", "u0022", "u0033"], train={"epochs": 1})
    assert "bad utterance: toy: u00" in caplog.text


def test_a_frozen_parameter_that_changes_is_caught_after_the_first_step(tmp_path):
    class Leaky(ToyStage):
        def loss(self, model, batch):
            if model.training and batch.index == 1:
                model.frozen.bias.data[0] += 1e-3
            return super().loss(model, batch)

    with pytest.raises(AssertionError, match="frozen parameters changed by step 1"):
        train(tmp_path, Leaky())


class Peeking(ToyStage):
    """Looks three steps ahead, and notes the weights as it finds them."""

    def prepared(self, steps, *, weights, step):
        self.seen, self.closed = [], False
        try:
            while ahead := list(islice(steps, 3)):
                with weights() as model:
                    self.seen.append((step, model.training, digest(model.parameters())))
                yield from ahead
                step += len(ahead)
        finally:
            self.closed = True


def test_a_stage_may_look_at_steps_ahead_between_optimizer_steps_and_it_does_not_show(tmp_path):
    settings = {"train": {"max_steps": 8, "save_every": 4, "schedule": "constant", "warmup_steps": 0}}
    halfway = {"train": {**settings["train"], "max_steps": 4}}
    train(tmp_path / "plain", **settings)
    train(tmp_path / "peeking", first := Peeking(), **halfway)
    train(tmp_path / "peeking", second := Peeking(), **settings)
    assert [seen[:2] for seen in (*first.seen, *second.seen)] == [(0, False), (3, False), (4, False), (7, False)]
    assert len({weights for *_, weights in (*first.seen, *second.seen)}) == 4
    assert first.closed and second.closed
    a, b = load_weights(tmp_path / "peeking"), load_weights(tmp_path / "plain")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert read_lines(tmp_path / "peeking" / "ledger.jsonl") == read_lines(tmp_path / "plain" / "ledger.jsonl")


def test_what_looks_ahead_is_closed_before_an_error_leaves_the_run(tmp_path):
    stage = Peeking()
    try:
        train(tmp_path, stage, nan_keys=["u0051"], train={"max_steps": 40, "max_nonfinite_steps": 0})
    except ValueError as error:
        assert stage.closed and "u0051" in str(error)  # here, as what is collected with the traceback closes too
    else:
        pytest.fail("the run went on")


@pytest.mark.parametrize(("steps", "epochs"), [(0, 0), (5, 5)])
def test_the_end_of_training_must_be_said_once(tmp_path, steps, epochs):
    with pytest.raises(ValueError, match="set exactly one of them"):
        train(tmp_path, train={"max_steps": steps, "epochs": epochs})


def test_a_stage_without_gradients_writes_its_artifact(tmp_path):
    class Count:
        consumes, produces, Config = {}, "report", ToyStage.Config

        def run(self, cfg, inputs, writer):
            (writer.path / "report.txt").write_text(str(cfg.utterances))
            writer.metrics["utterances"] = cfg.utterances

    path = run_computation(Count(), toy_config(tmp_path), run_dir=tmp_path)
    assert load_artifact(path, kind="report").metrics == {"utterances": 120}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [0.5, 1, 1, 0.55, 0.1]), ("linear", [0.5, 1, 1, 0.55, 0.1]), ("constant", [0.5, 1, 1, 1, 1])],
)
def test_schedules_warm_up_and_end_where_they_should(schedule, expected):
    cfg = TrainConfig(warmup_steps=2, schedule=schedule, min_lr_ratio=0.1)
    assert [lr_factor(s, total_steps=12, cfg=cfg) for s in (0, 1, 2, 7, 12)] == pytest.approx(expected)


def test_the_peak_is_held_before_it_falls():
    cfg = TrainConfig(warmup_steps=2, schedule="linear", hold_ratio=0.5)
    assert [lr_factor(s, total_steps=12, cfg=cfg) for s in (1, 2, 7, 9.5, 12)] == pytest.approx([1, 1, 1, 0.5, 0])


def test_seeds_differ_between_micro_batches_and_between_runs():
    def draw(seed, index):
        seed_forward(seed, index)
        return torch.rand(3).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(seed, index)) for seed in (1, 2) for index in range(20)}) == 40
