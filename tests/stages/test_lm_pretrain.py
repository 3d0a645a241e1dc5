"""lm_pretrain on a toy language: a Hugging Face folder comes out, and it can repeat what stands in its prompt."""

import pytest
import tiny_runs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedling.data.batches import STAND_IN_KEY
from seedling.data.text import TextBatch
from seedling.launch.cli import main
from seedling.launch.stage_lookup import load_stage_config
from seedling.model.llm import load_llm, load_tokenizer
from seedling.model.prompt import tokenize
from seedling.stages.lm_pretrain import LMPretrain, SmallLMConfig
from seedling.stages.runtime.artifacts import load_artifact


def test_the_folder_loads_as_any_hugging_face_model_and_goes_through_our_own_loader(lm_run):
    folder = lm_run / "artifact"
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert llm.config.model_type == "llama" and llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    assert (llm.config.eos_token_id, llm.config.vocab_size) == (tokenizer.eos_token_id, len(tokenizer))
    ours = load_llm(folder, dtype=torch.float32)
    assert not tiny_runs.differing(llm.state_dict(), ours.state_dict())
    assert load_tokenizer(folder)("call Marc").input_ids == tokenizer("call Marc").input_ids


def test_it_has_learnt_the_language_and_to_repeat_better_than_to_guess(lm_run):
    metrics = load_artifact(lm_run / "artifact").metrics
    sentences, repetitions = metrics["valid/dev/loss_sentences"], metrics["valid/dev/loss_repetitions"]
    # Two words of 8 and the end after 1 to 3 of them: (2 ln 8 + ln 3) / 3 = 1.75 nats. Untrained: ln 340 = 5.8.
    assert sentences < 2.3, sentences
    assert repetitions < 0.8 * sentences, (repetitions, sentences)


def test_what_it_says_by_itself_are_sentences_of_the_language(lm_run):
    llm, tokenizer = (auto.from_pretrained(lm_run / "artifact") for auto in (AutoModelForCausalLM, AutoTokenizer))
    torch.manual_seed(0)
    start = torch.full((40, 1), tokenizer.bos_token_id)
    ids = llm.generate(start, do_sample=True, top_k=0, max_new_tokens=12)
    said = [tokenizer.decode(row, skip_special_tokens=True).split() for row in ids]
    right = sum(word in tiny_runs.WORDS for words in said for word in words) / sum(map(len, said))
    assert right > 0.7, said
    assert (ids == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.7, said


@pytest.fixture
def stage(tmp_path):
    """A stage with its model built, untrained."""
    (tmp_path / "text.txt").write_text("\n".join(tiny_runs.sentences(20, seed=0)))
    config = tiny_runs.write_yaml(tmp_path / "lm.yaml", tiny_runs.LM)
    overrides = [f"run_dir={tmp_path}/run", f"text=[{tmp_path}/text.txt]"]
    _, loaded = load_stage_config("lm_pretrain", config, overrides=overrides)
    stage = LMPretrain()
    torch.manual_seed(0)
    return stage, stage.build(loaded.config, {}), loaded.config


def test_the_normaliser_counts_exactly_the_tokens_that_have_a_loss(stage):
    stage, model, cfg = stage
    planned = stage.batches(cfg, "train")
    for step in planned.plan.steps(epochs=1):
        batch = planned.dataset[step.micro_batches[0]]
        nll_N, _ = model([tokenize(stage.tokenizer, text) for text in batch.texts])
        assert stage.count(batch) == len(nll_N)


def test_the_loss_is_the_sum_of_both_kinds_and_the_metrics_split_it(stage):
    stage, model, _ = stage
    batch = TextBatch(keys=list("abcdefghijklmnop"), texts=tiny_runs.sentences(16, seed=5), index=0, epoch=0)
    torch.manual_seed(3)
    with torch.no_grad():
        loss_sum, metrics = stage.loss(model, batch)
    parts = {name: (float(value), int(count)) for name, (value, count) in metrics.items()}
    assert sum(value for value, _ in parts.values()) == pytest.approx(float(loss_sum), rel=1e-5)
    assert sum(count for _, count in parts.values()) == stage.count(batch)
    assert all(count > 0 for _, count in parts.values())


def test_validation_does_not_depend_on_what_drew_random_numbers_before(stage):
    """Or curves of two runs, or of one and two ranks, could not be compared."""
    stage, model, _ = stage
    batches = [TextBatch(keys=["a"], texts=[text], index=i, epoch=0) for i, text in enumerate(tiny_runs.WORDS)]
    torch.manual_seed(1)
    first = stage.evaluate(model, batches)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = stage.evaluate(model, reversed(batches))
    assert all(second[name] == pytest.approx(first[name], rel=1e-5) for name in first), (first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_stands_in_for_an_empty_micro_batch_counts_nowhere(stage):
    stage, model, _ = stage
    sentence = TextBatch(keys=["a"], texts=["call Marc"], index=0, epoch=0)
    stand_in = TextBatch(keys=[STAND_IN_KEY], texts=[""], index=1, epoch=0)
    assert stage.evaluate(model, [sentence, stand_in]) == stage.evaluate(model, [sentence])


def test_without_validation_text_there_is_nothing_to_validate(stage):
    stage, _, cfg = stage
    assert stage.batches(cfg, "valid") is None


def test_a_width_that_the_heads_cannot_share_is_named():
    with pytest.raises(ValueError, match=r"lm\.dim \(50\).*lm\.num_heads \(4\)"):
        SmallLMConfig(dim=50, num_heads=4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lm.vocab_size=100", "vocab_size (100) must be at least 259"),
        ("text=[/nowhere.txt]", "/nowhere.txt"),
        ("text=[]", "text"),
        ("repetition.share=2", "repetition.share is 2"),
        ("train.lr={lm: 1e-3}", "train.lr.llm"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, override, said):
    (tmp_path / "text.txt").write_text("call Marc\n")
    values = tiny_runs.LM | {"train": tiny_runs.LM["train"] | {"lr": {}}} if "train.lr" in override else tiny_runs.LM
    config = tiny_runs.write_yaml(tmp_path / "lm.yaml", values)
    arguments = [f"run_dir={tmp_path}/run", f"text=[{tmp_path}/text.txt]", override]
    assert main(["run", "lm_pretrain", "--config", str(config), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0]
    assert not (tmp_path / "run" / "artifact").exists()


def test_check_builds_on_meta_and_trains_nothing(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(tiny_runs.sentences(20, seed=0)))
    config = tiny_runs.write_yaml(tmp_path / "lm.yaml", tiny_runs.LM)
    arguments = [f"run_dir={tmp_path}/run", f"text=[{tmp_path}/text.txt]"]
    assert main(["check", "lm_pretrain", "--config", str(config), *arguments]) == 0
    out = capsys.readouterr().out
    assert "of 20 sentences, " in out and "utterances" not in out and " h," not in out
    assert "shapes: all fit, from the dearest micro-batch to the loss" in out
    assert "no validation set" in out
    assert not (tmp_path / "run").exists()


def test_the_log_of_a_run_on_text_speaks_of_text(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(tiny_runs.sentences(60, seed=0)))
    short = (f"text=[{tmp_path}/text.txt]", "train.max_steps=2", "train.log_every=1", "train.dry_run=true")
    run = tiny_runs.train("lm_pretrain", tmp_path / "run", tiny_runs.LM, *short)
    out = capsys.readouterr().out
    assert "data: 60 sentences, " in out and "dry run of the largest micro-batch: " in out and "tokens/s" in out
    assert "utterances" not in out and "audio" not in out
    lines = [line for line in tiny_runs.read_lines(run / "metrics.jsonl") if "train/loss" in line]
    assert len(lines) == 2 and not [name for line in lines for name in line if "audio" in name]
    assert all(0 < line["train/padding_frac_text"] < 0.5 for line in lines)
