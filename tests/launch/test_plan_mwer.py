"""The plan of a run that learns from its own hypotheses: what it holds besides, and what its config refuses."""

import pytest
import torch
from tiny_runs import SFT, make_contexts, make_llm, make_shards, sentences, write_yaml
from transformers import AutoModelForCausalLM

from seedling.data.contexts.sidecar import UtteranceContext
from seedling.launch.cli import main
from seedling.launch.plan import allowed_stages, left_out, plan_run, setting
from seedling.launch.stage_lookup import load_stage_config
from seedling.stages.runtime.artifacts import ArtifactWriter, load_inputs

GRPO = ("objective=grpo", "nbest.draw=sample")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus with a list of names for each utterance, and an untrained recogniser."""
    folder = tmp_path_factory.mktemp("mwer")
    shards = make_shards(folder / "corpus", sentences(24, seed=1))
    make_contexts(folder / "contexts", shards, lambda text: [UtteranceContext("relevant", f"{text} " * 8, ())])
    values = SFT | {"inputs": {"llm": str(make_llm(folder / "llm"))}, "data": {"train": [str(shards)]}}
    file = write_yaml(folder / "sft.yaml", values | {"run_dir": str(folder / "sft")})
    stage_class, loaded = load_stage_config("sft", str(file))
    torch.manual_seed(0)
    stage = stage_class()
    model = stage.build(loaded.config, load_inputs(stage.consumes, loaded.config.inputs, stage="sft"))
    writer = ArtifactWriter(folder / "sft" / "artifact", kind="acllm", stage="sft").start()
    stage.export(model, writer)
    writer.finish()
    return folder


def planned(folder, *overrides):
    values = {
        "inputs": {"acllm": str(folder / "sft" / "artifact")},
        "data": {"train": [str(folder / "corpus" / "shards")]},
        "ctc_weight": 0.5,
        "context": {"max_tokens": 200, "share": 1.0},
        "train": SFT["train"],
        "run_dir": str(folder / "run"),
    }
    stage_class, loaded = load_stage_config(
        "mwer", str(write_yaml(folder / "mwer.yaml", values)), overrides=list(overrides)
    )
    return plan_run(stage_class(), loaded.config)


def test_zero_3_is_for_workers_only(folder):
    assert allowed_stages(planned(folder)) == [0, 1, 2]
    beside = planned(folder, "generation.workers=2")
    assert allowed_stages(beside) == [0, 1, 2, 3]
    assert left_out(planned(folder)) == [] and "generation.workers=2 is not in the plan" in left_out(beside)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_recogniser_that_a_run_began_with_is_held_whole_on_each_rank(folder, precision):
    plain = planned(folder, *GRPO, f"train.precision={precision}")
    kept = planned(folder, *GRPO, f"train.precision={precision}", "grpo.kl_weight=0.1")
    weights = {R: setting(kept, zero_stage=1, ranks=R).memory.weights for R in (1, 8)}
    assert weights[1] == weights[8] == setting(plain, zero_stage=1, ranks=8).memory.weights + kept.sizes.another
    parameters = kept.sizes.trainable + kept.sizes.frozen
    least, most = (2, 4) if precision == "bf16" else (4, 4)  # an encoder trained in fp32 is loaded in it
    assert least * parameters <= kept.sizes.another - kept.sizes.buffers <= most * parameters
    assert plain.sizes.another == 0


def test_a_run_that_keeps_its_first_policy_can_be_checked_without_weights(folder, capsys):
    planned(folder)  # writes the config
    given = ["check", "mwer", "--config", str(folder / "mwer.yaml"), *GRPO, "grpo.kl_weight=0.1"]
    assert main(given) == 0
    assert "shapes: all fit" in capsys.readouterr().out


def test_the_cache_of_a_search_holds_the_contexts(folder):
    without = planned(folder, "nbest.decode.context_search=plain")
    contexts = f"contexts=[{folder / 'contexts'}]"
    plain, joint = (planned(folder, contexts, f"nbest.decode.context_search={kind}") for kind in ("plain", "joint"))
    assert 0 < without.generation < plain.generation < joint.generation


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_keys_and_values_have_the_type_of_a_real_cache(folder, precision):
    """As what transformers keeps of a forward pass of the recogniser's LLM, for one position."""
    run = planned(folder, f"train.precision={precision}")
    llm, batch = AutoModelForCausalLM.from_pretrained(folder / "llm"), largest_batch(run)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        cache = llm.get_decoder()(torch.tensor([[1, 2, 3, 4]]), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)) / 4
    assert run.generation % held == 0
    positions = run.generation / held / len(batch)
    assert positions > run.cfg.nbest.size * 10, "each hypothesis has its own tokens"


def largest_batch(run):
    planned = run.stage.batches(run.cfg, "train")
    return planned.dataset[planned.plan.summary(0).largest]
