"""The shipped self-supervised pipelines: two iterations, the second on the first one's labels, a probe after each."""

import pytest

from seedling.launch.pipeline_config import load_pipeline

CHAIN = ["pretrain_1", "probe_1", "labels", "pretrain_2", "probe_2"]


@pytest.fixture(params=["ssl_demo", "ssl_base", "ssl_2b"])
def pipeline(request, monkeypatch):
    for name in ("UNLABELLED", "LABELLED", "DEV"):
        monkeypatch.setenv(f"SEEDLING_{name}", f"data/{name.lower()}")
    return load_pipeline(request.param)


def config(pipeline, name) -> dict:
    return next(step.reads["config"] for step in pipeline.steps if step.name == name)


def test_a_probe_follows_each_iteration_and_labels_lie_between(pipeline):
    assert [step.name for step in pipeline.steps][-len(CHAIN) :] == CHAIN
    made = {step.name: str(step.output) for step in pipeline.steps}
    inputs = {name: config(pipeline, name)["inputs"] for name in CHAIN}
    assert inputs == {
        "pretrain_1": {},
        "probe_1": {"encoder": made["pretrain_1"]},
        "labels": {"encoder": made["pretrain_1"], "probe": made["probe_1"]},
        "pretrain_2": {"labeler": made["labels"]},
        "probe_2": {"encoder": made["pretrain_2"]},
    }


def test_the_iterations_differ_in_their_labels_alone_and_the_probes_in_their_encoder(pipeline):
    for first, second in (("pretrain_1", "pretrain_2"), ("probe_1", "probe_2")):
        one, two = config(pipeline, first), config(pipeline, second)
        assert {key for key in one if one[key] != two[key]} == {"inputs"}


def test_what_is_learnt_from_is_labelled(pipeline):
    labels, pretrain = config(pipeline, "labels"), config(pipeline, "pretrain_2")
    assert labels["data"]["train"] == pretrain["data"]["train"] and labels["data"]["valid"] == pretrain["data"]["valid"]
    for limit in ("min_seconds", "max_utterance_seconds"):
        assert labels["data"]["limits"][limit] == pretrain["data"]["limits"][limit], limit
