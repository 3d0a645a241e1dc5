"""Each reward on cases one can count by hand, and their weighted sum."""

from dataclasses import dataclass, field, fields

import jiwer
import pytest

from seedling.stages.reinforcement import rewards
from seedling.stages.reinforcement.rewards import RewardConfig, reward_of
from seedling.stages.runtime.config import ConfigError, TrainingStageConfig, load_config

NAMES = [field.name for field in fields(RewardConfig)]


def only(name: str) -> RewardConfig:
    return RewardConfig(**{"error_rate": 0.0, name: 1.0})


@pytest.mark.parametrize("hypothesis", ["call ann now", "call now", "call", "", "call ann now now now and now again"])
def test_error_rate_is_minus_jiwers(hypothesis):
    assert rewards.error_rate("call ann now", hypothesis) == pytest.approx(-jiwer.wer("call ann now", hypothesis))
    by_letter = rewards.error_rate("call ann now", hypothesis, unit="char")
    assert by_letter == pytest.approx(-jiwer.cer("call ann now", hypothesis))


@pytest.mark.parametrize(
    "reference, hypothesis, recall",
    [
        ("call ann lee and marc", "call ann lee and marc", 1.0),
        ("call ann lee and marc", "call ann lee and mark", 0.5),
        ("call ann lee and marc", "call ann and lee", 0.0),
        ("call marc and marc", "call marc", 0.5),
        ("call marc", "marc marc marc", 1.0),
        ("call marc", "", 0.0),
        ("call hannah", "call", 1.0),
        ("", "marc", 1.0),
    ],
)
def test_keyword_recall_is_the_share_of_what_was_said(reference, hypothesis, recall):
    assert rewards.keyword_recall(reference, hypothesis, keywords=["ann lee", "marc", "ann"]) == recall


def test_keyword_recall_of_no_keywords_is_perfect():
    assert rewards.keyword_recall("call ann", "", keywords=[]) == 1.0


@pytest.mark.parametrize(
    "reference, hypothesis, echo",
    [
        ("call ann lee", "call ann lee", 0),
        ("call him", "call ann lee", -1),
        ("call him", "marc ann lee marc", -3),
        ("call marc", "marc marc", -1),
        ("call marc", "call mark", 0),
        ("call ann lee", "call lee", 0),  # "lee" was said, within "ann lee"
        ("call lee", "call ann lee", -1),
        ("", "marc", -1),
        ("call marc", "", 0),
    ],
)
def test_echo_counts_context_phrases_beyond_those_that_were_said(reference, hypothesis, echo):
    assert rewards.echo(reference, hypothesis, phrases=["ann lee", "lee", "marc"]) == echo


def test_without_a_context_nothing_is_echoed():
    assert rewards.echo("call him", "call ann lee", phrases=[]) == 0
    assert rewards.echo("call him", "call ann lee", phrases=[""]) == 0


@pytest.mark.parametrize(
    "reference, hypothesis, penalty",
    [
        ("a b", "a b", 0),
        ("a b", "a x y b", 0),
        ("a b", "a x y z b", -3 / 2),
        ("a b", "x y z a u v w w b", -7 / 2),
        ("a b", "x y a u v b", 0),
        ("a b c", "x y z", 0),
        ("a b", "", 0),
        ("", "x y", 0),
        ("", "x y z", -3),
        ("", "", 0),
    ],
)
def test_hallucination_counts_insertions_that_come_in_runs(reference, hypothesis, penalty):
    assert rewards.hallucination(reference, hypothesis) == penalty


def test_hallucination_is_by_the_unit_that_is_asked_for():
    assert rewards.hallucination("打开", "打开灯吧", unit="mixed") == 0
    assert rewards.hallucination("打开", "打开灯吧请你", unit="mixed") == -4 / 2
    assert rewards.hallucination("打开", "打开 x y z", unit="mixed") == -3 / 2


@pytest.mark.parametrize(
    "reference, hypothesis, penalty",
    [("a b", "x y", 0), ("a b", "a", -0.5), ("a b", "a b c", -0.5), ("a b", "", -1), ("", "a b", -2), ("", "", 0)],
)
def test_length_counts_tokens_too_many_and_too_few(reference, hypothesis, penalty):
    assert rewards.length(reference, hypothesis) == penalty


def test_the_reward_of_a_hypothesis_is_the_weighted_sum():
    told = {"keywords": ["marc"], "phrases": ["marc", "ann"]}
    texts = "call marc", "call ann x y z"
    alone = {name: reward_of(only(name), *texts, **told) for name in NAMES}
    assert alone == {"error_rate": -2, "keyword_recall": 0, "echo": -1, "hallucination": -1.5, "length": -1.5}
    weights = {"error_rate": 1.0, "keyword_recall": 0.5, "echo": 0.25, "hallucination": 2.0, "length": 0.125}
    wanted = sum(weights[name] * alone[name] for name in weights)
    assert reward_of(RewardConfig(**weights), *texts, **told) == pytest.approx(wanted)
    assert reward_of(RewardConfig(), *texts, **told) == alone["error_rate"]


@pytest.mark.parametrize("unit", ["word", "char", "mixed"])
def test_the_unit_reaches_every_reward_that_counts_tokens(unit):
    texts = "打开 wifi", "打开灯请你吧 wifi now"
    told = {"unit": unit}
    for name in ("error_rate", "hallucination", "length"):
        assert reward_of(only(name), *texts, **told) == getattr(rewards, name)(*texts, **told)


def test_of_every_reward_a_perfect_hypothesis_has_the_most():
    told = {"keywords": ["marc"], "phrases": ["marc", "ann"]}
    everything = RewardConfig(keyword_recall=1.0, echo=1.0, hallucination=1.0, length=1.0)
    best = reward_of(everything, "call marc now", "call marc now", **told)
    assert best == 1
    for worse in ("call mark now", "call marc", "call marc ann now", "call marc now now now now", ""):
        assert reward_of(everything, "call marc now", worse, **told) < best


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_no_weight_is_refused_by_name(name, weight):
    with pytest.raises(ValueError, match=rf"reward.{name} is {weight}; a weight must be 0 or more and finite"):
        RewardConfig(**{name: weight})


def test_no_reward_at_all_is_refused():
    with pytest.raises(ValueError, match="all weights in reward are 0"):
        RewardConfig(error_rate=0.0)


def test_an_unknown_reward_is_one_line_with_the_nearest_name():
    @dataclass(kw_only=True)
    class ToyConfig(TrainingStageConfig):
        reward: RewardConfig = field(default_factory=RewardConfig)

    with pytest.raises(ConfigError, match=r"reward\.eco\b.*echo"):
        load_config(ToyConfig, given={"stage": "toy", "run_dir": "runs/toy", "reward": {"eco": 1.0}})
