"""context_sft on the spoken toy language: triples are what they are said to be, pairs stay what they were."""

import math

import pytest
import tiny_runs

from seedling import load
from seedling.data.contexts.sidecar import UtteranceContext
from seedling.launch.stage_lookup import load_stage_config
from seedling.stages.context_sft import ContextSFT
from seedling.stages.runtime.artifacts import lineage, load_artifact
from seedling.stages.runtime.trainer import Trainer
from seedling.stages.runtime.world import init_world

CONTEXT_SFT = {name: tiny_runs.SFT[name] for name in ("ctc_weight", "train")} | {
    "encoder": {"dropout": 0.1},
    "context": {"share": 0.5},
}


def word_lists(text: str) -> list[UtteranceContext]:
    """A list with the words of the utterance, one with words that it does not say, and none."""
    words = sorted(set(text.split()))
    others = tuple(word for word in tiny_runs.WORDS if word not in words)
    return [
        UtteranceContext("relevant", ", ".join((*words, others[0])), (*words, others[0])),
        UtteranceContext("irrelevant", ", ".join(others), others),
        UtteranceContext("empty", "", ()),
    ]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory, shards):
    return tiny_runs.make_contexts(tmp_path_factory.mktemp("sidecar") / "contexts", shards, word_lists)


@pytest.fixture
def given(shards, contexts, sft_run) -> list[str]:
    """Three steps on the corpus and its contexts."""
    data = [f"data.train=[{shards}]", f"contexts=[{contexts}]", f"inputs.acllm={sft_run}/artifact"]
    return [*data, "train.max_steps=3", "train.save_every=3"]


@pytest.fixture
def trainer(given, tmp_path):
    """make(*overrides) -> Trainer, not started"""

    def make(*more: str) -> Trainer:
        config = tiny_runs.write_yaml(tmp_path / "context_sft.yaml", CONTEXT_SFT)
        _, loaded = load_stage_config("context_sft", config, overrides=[f"run_dir={tmp_path}/run", *given, *more])
        (tmp_path / "run").mkdir(exist_ok=True)
        return Trainer(ContextSFT(), loaded.config, run_dir=tmp_path / "run", world=init_world())

    return make


def batches(trainer: Trainer, *, epochs: int = 1) -> list:
    steps = trainer.data.plan.steps(epochs=epochs)
    return [trainer.data.dataset[micro_batch] for step in steps for micro_batch in step.micro_batches]


def test_it_trains_evaluates_with_and_without_contexts_and_what_comes_out_loads(
    trainer, shards, contexts, tmp_path, sft_run
):
    trained = trainer(f"data.valid.dev={shards}", f"valid_contexts.dev={contexts}")
    trained.fit()
    artifact = load_artifact(trained.export().path, kind="acllm")
    assert [a.stage for a in lineage(artifact.path)] == ["context_sft", "sft", "lm_pretrain"]
    names = {name.removeprefix("valid/dev/") for name in artifact.metrics}
    own = {"loss", "wer", "cer", "phrase_recall"}
    assert names == own | {f"context_{name}" for name in own} | {"ctc_wer", "ctc_cer", "ctc_phrase_recall"}
    assert load(tmp_path / "run").model.processor.prompts.context_tokens == trained.cfg.context.max_tokens == 512
    lines = tiny_runs.read_lines(tmp_path / "run/metrics.jsonl")
    assert all(math.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
    changed = tiny_runs.differing(tiny_runs.weights(sft_run), tiny_runs.weights(artifact.path))
    assert {name.split(".")[0] for name in changed} == {"encoder", "converter", "ctc_head"}
