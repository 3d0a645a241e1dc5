"""What is advised so that a run fits: followed to the letter, it runs and fits."""

import pytest
from tiny_runs import LM, PRETRAIN, make_shards, sentences, write_yaml

from seedling.launch.cli import main
from seedling.launch.commands.plan import verdict
from seedling.launch.fitting import Fit, Fitting, value_of
from seedling.launch.plan import plan_run, setting, settings
from seedling.launch.stage_lookup import load_stage_config
from seedling.stages.runtime.gpus import GPUS

CONTEXT = 2e9
ENCODER = PRETRAIN["encoder"] | {"dim": 32, "num_layers": 4, "num_heads": 2}


def gpu(usable):
    """A GPU with room for so many bytes."""
    return GPUS["h100"]._replace(memory=CONTEXT + 1.05 * usable)


def planned(file, stage, *overrides):
    stage_class, loaded = load_stage_config(stage, str(file), overrides=list(overrides))
    return plan_run(stage_class(), loaded.config)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """The config file of a small encoder on many utterances of up to 1.1 s: what it takes is activations."""
    folder = tmp_path_factory.mktemp("fitting")
    shards = make_shards(folder / "corpus", sentences(120, seed=1))
    train = PRETRAIN["train"] | {"micro_batch_seconds": 16, "global_batch_seconds": 32}
    values = PRETRAIN | {"encoder": ENCODER, "train": train, "run_dir": str(folder / "run")}
    return write_yaml(folder / "audio.yaml", values | {"data": {"train": [str(shards)]}})


@pytest.fixture(scope="module")
def audio_run(audio):
    return planned(audio, "encoder_pretrain")


def followed(file, stage, fit):
    """Plan what was advised, given as a user would give it."""
    run = planned(file, stage, *str(fit).split())
    run.train.accumulation_steps(fit.ranks)
    return setting(run, zero_stage=run.train.zero_stage, ranks=fit.ranks)


def peak(run, ranks):
    return min(at.memory.total for at in settings(run, [ranks]))


def test_what_fits_needs_no_change_and_what_another_stage_makes_fit_that_stage(audio, audio_run):
    totals = {at.zero_stage: at.memory.total for at in settings(audio_run, [2])}
    assert Fitting(audio_run, gpu(2 * max(totals.values()))).nearest(2) == Fit({}, 2)
    if smaller := [z for z, total in totals.items() if total < 0.999 * totals[0]]:
        room = gpu(max(totals[z] for z in smaller))
        fit = Fitting(audio_run, room).nearest(2)
        assert fit.changes.keys() == {"train.zero_stage"} and followed(audio, "encoder_pretrain", fit).fits(room)


@pytest.mark.parametrize(("share", "ranks"), [(0.9, 1), (0.6, 2), (0.3, 3)])
def test_what_is_advised_runs_and_fits(audio, audio_run, share, ranks):
    room = gpu(share * peak(audio_run, ranks))
    fit = Fitting(audio_run, room).nearest(ranks)
    assert fit is not None and fit.changes
    assert followed(audio, "encoder_pretrain", fit).fits(room), fit
    if "train.micro_batch_seconds" in fit.changes:
        assert fit.changes["train.micro_batch_seconds"] in (8, 4, 2)  # 1 s has no room for the longest utterance


def test_a_step_keeps_its_size_where_the_ranks_can_share_it(audio_run):
    room = gpu(0.6 * peak(audio_run, 2))
    fit = Fitting(audio_run, room).nearest(2)
    assert "train.micro_batch_seconds" in fit.changes and "train.global_batch_seconds" not in fit.changes
    three = Fitting(audio_run, gpu(1e12)).nearest(3)
    assert three == Fit({"train.global_batch_seconds": 48.0}, 3)  # 2 micro-batches become 3
    assert verdict(three, 3) == "fits with train.global_batch_seconds=48"


def test_micro_batches_keep_room_for_the_longest_utterance_of_validation_too(audio, audio_run, tmp_path):
    long = make_shards(tmp_path / "long", ["call Mark dim lamp stop six go open call Mark dim lamp"])  # 3.8 s
    run = planned(audio, "encoder_pretrain", f"data.valid={{long: {long}}}")
    for share in (0.6, 0.35, 0.2):
        fit = Fitting(run, gpu(share * peak(run, 1))).nearest(1)
        assert fit is None or value_of(run.cfg, "train.micro_batch_seconds") >= 4
        assert fit is None or fit.changes.get("train.micro_batch_seconds", 16) >= 4, fit


def test_more_ranks_are_advised_where_what_ranks_share_is_too_large(audio):
    small = planned(audio, "encoder_pretrain", "train.micro_batch_seconds=2")
    alone, many = (peak(small, ranks) for ranks in (1, 16))
    room = gpu(many + 0.02 * (alone - many))
    fit = Fitting(small, room).nearest(1)
    assert fit.ranks > 1 and verdict(fit, 1).startswith(f"too large; fits on {fit.ranks} ranks")
    run = planned(audio, "encoder_pretrain", "train.micro_batch_seconds=2", *str(fit).split())
    run.train.accumulation_steps(fit.ranks)
    assert setting(run, zero_stage=run.train.zero_stage, ranks=fit.ranks).fits(room)


def test_where_nothing_helps_that_is_said(audio_run):
    weights = setting(audio_run, zero_stage=0, ranks=1).memory.weights
    assert Fitting(audio_run, gpu(weights / 2)).nearest(1) is None
    assert verdict(None, 1).startswith("too large; no ZeRO stage")


def test_more_ranks_than_utterances_cannot_share_a_step(audio_run):
    with pytest.raises(ValueError, match=r"the corpus has 120 utterances .* a step takes 128 micro-batches"):
        Fitting(audio_run, gpu(1e12)).nearest(128)


def test_layers_that_are_recomputed_already_are_not_advised_again(audio):
    for already in (False, True):
        run = planned(audio, "encoder_pretrain", f"encoder.activation_checkpointing={str(already).lower()}")
        search = Fitting(run, gpu(0.1 * peak(run, 1)))
        tried = {name for changes in search._candidates(1) for name in changes}
        assert ("encoder.activation_checkpointing" in tried) == (not already)


def test_what_has_no_audio_is_told_of_its_own_settings(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in sentences(400, seed=1)))
    values = LM | {"text": [str(tmp_path / "text.txt")], "run_dir": str(tmp_path / "run"), "max_tokens": 800}
    file = write_yaml(tmp_path / "lm.yaml", values)
    run = planned(file, "lm_pretrain")
    room = gpu(0.8 * peak(run, 1))
    fit = Fitting(run, room).nearest(1)
    assert fit.changes.keys() <= {"max_tokens", "train.global_batch_seconds", "train.zero_stage"}
    assert fit.changes["max_tokens"] < 800
    assert followed(file, "lm_pretrain", fit).fits(room)
    # As much text in a step as before.
    tokens = fit.changes["max_tokens"] * planned(file, "lm_pretrain", *str(fit).split()).train.micro_batches
    assert tokens == 800 * run.train.micro_batches


def test_the_command_follows_its_own_advice(audio, audio_run, capsys):
    memory = f"{(CONTEXT + 1.05 * 0.6 * peak(audio_run, 2)) / 1e9:.6f}"
    given = ["plan", "encoder_pretrain", "--config", str(audio), "--ranks", "2", "--gpu", f"{memory},989,450,50,67"]
    assert main(given) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("2 ranks, ZeRO 0: too large"))
    assert main([*given, *line.partition(" with ")[2].split()]) == 0
