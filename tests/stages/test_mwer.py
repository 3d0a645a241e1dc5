"""mwer on the spoken toy language: its loss is the formula's, errors become fewer, degenerate lists do no harm."""

import math
from pathlib import Path

import pytest
import tiny_runs
import torch

from seedling.data.contexts.sidecar import UtteranceContext
from seedling.data.scoring import count_errors
from seedling.launch.cli import main
from seedling.launch.stage_lookup import load_stage_config
from seedling.model.ctc import text_bytes
from seedling.model.decoding import Hypothesis
from seedling.stages.mwer import MWER
from seedling.stages.runtime.artifacts import lineage, load_artifact
from seedling.stages.runtime.trainer import Trainer
from seedling.stages.runtime.world import init_world

VALUES = {
    "ctc_weight": 0.5,
    "context": {"max_tokens": 200},
    "train": tiny_runs.SFT["train"],
}


@pytest.fixture(scope="module")
def half_learnt(tmp_path_factory, shards, lm_run) -> Path:
    """A recogniser that was stopped when it had begun to listen: it still makes errors."""
    data = (f"data.train=[{shards}]", f"inputs.llm={lm_run}/artifact", *tiny_runs.BY_HEART, "train.max_steps=90")
    return tiny_runs.train("sft", tmp_path_factory.mktemp("half") / "run", tiny_runs.SFT, *data)


@pytest.fixture
def given(shards, half_learnt) -> list[str]:
    return [f"data.train=[{shards}]", f"inputs.acllm={half_learnt}/artifact", "train.max_steps=3", "train.save_every=3"]


@pytest.fixture
def trainer(given, tmp_path):
    """make(*overrides) -> Trainer, not started"""

    def make(*more: str) -> Trainer:
        config = tiny_runs.write_yaml(tmp_path / "mwer.yaml", VALUES)
        _, loaded = load_stage_config("mwer", config, overrides=[f"run_dir={tmp_path}/run", *given, *more])
        (tmp_path / "run").mkdir(exist_ok=True)
        return Trainer(MWER(), loaded.config, run_dir=tmp_path / "run", world=init_world())

    return make


def first_batch(trainer: Trainer):
    return next(trainer.data.first(1))


# ---- the loss


@pytest.mark.parametrize("with_contexts", [False, True])
def test_the_loss_is_the_formula_on_whole_forward_passes(trainer, shards, tmp_path, with_contexts):
    """Each hypothesis alone through AudioLLM.forward, probabilities and errors by hand."""
    contexts = tiny_runs.make_contexts(
        tmp_path / "sidecar", shards, lambda text: [UtteranceContext("relevant", text.split()[0], (text.split()[0],))]
    )
    triples = [f"contexts=[{contexts}]", "context.share=0.6"] if with_contexts else []
    trained = trainer("ce_weight=0.3", "nbest.size=5", *triples)
    stage, model, batch = trained.stage, trained.engine.model.double(), first_batch(trained)
    batch.waveforms_BN = batch.waveforms_BN.double()
    out = stage.loss(model, batch)
    hypotheses = stage.generate(model.eval(), batch)
    model.train()
    prompts = stage.prompts(batch)
    assert with_contexts == any(prompts.contexts_ids or [])

    def log_probs(of_each):
        got = model(batch.waveforms_BN, batch.lengths_B, [one.ids for one in of_each], prompts.contexts_ids)
        nll = got.nll_N.split([len(one.ids) + 1 for one in of_each])
        return torch.stack([-nll_T[: len(nll_T) - (not one.complete)].sum() for one, nll_T in zip(of_each, nll)])

    expected, spread = 0.0, 0
    ranks = [log_probs([h[min(n, len(h) - 1)] for h in hypotheses]) for n in range(5)]
    for b, reference in enumerate(batch.texts):
        risks, scores, seen = [], [], set()
        for n, one in enumerate(hypotheses[b]):
            text = stage.processor.decode(one.ids)
            if text.lower() not in seen:
                seen.add(text.lower())
                risks.append(count_errors(reference.lower().split(), text.lower().split()).errors)
                scores.append(ranks[n][b])
        phat = torch.stack(scores).softmax(0)
        expected = expected + sum(phat * (torch.tensor(risks) - sum(risks) / len(risks))) / len(risks)
        spread += len(set(risks)) > 1
    ctc = model.ctc_loss(batch.waveforms_BN, batch.lengths_B, [text_bytes(text) for text in batch.texts])
    ce = -log_probs([Hypothesis(ids) for ids in stage.transcripts(batch)]).sum()
    assert spread > 1, "lists without spread would make this an easy test"
    whole = expected + 0.3 * (ce + 0.5 * ctc.loss_sum.double())
    torch.testing.assert_close(out.loss_sum.double(), whole, rtol=1e-5, atol=1e-5)


def test_the_encoder_runs_once_an_utterance_in_a_step(trainer):
    trained = trainer()
    calls = []
    trained.engine.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    trained.stage.loss(trained.engine.model, first_batch(trained))
    assert len(calls) == 1
    for setting in ("encoder.dropout=0.1", "encoder.train_attention_chunks=[5,10]", "specaugment.num_time_masks=1"):
        varied, calls = trainer(setting), []
        varied.engine.model.encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        varied.stage.loss(varied.engine.model, first_batch(varied))
        assert len(calls) == 2, f"{setting}: what is searched is what decoding hears"


def test_a_micro_batch_with_nothing_in_it_moves_nothing(trainer):
    trained = trainer()
    stage, model, batch = trained.stage, trained.engine.model, first_batch(trained)
    batch.keys, batch.texts = [""], [""]
    batch.waveforms_BN, batch.lengths_B, batch.meta = torch.zeros(1, 16000), torch.tensor([16000]), [{}]
    out = stage.loss(model, batch)
    assert stage.count(batch) == 0 and stage.nbests(batch, [[Hypothesis([5])]])[0].hypotheses == []
    ctc = model.ctc_loss(batch.waveforms_BN, batch.lengths_B, [[]])
    torch.testing.assert_close(out.loss_sum, 0.01 * 0.5 * ctc.loss_sum)


@pytest.mark.parametrize("objective", ["mwer", "grpo"])
@pytest.mark.parametrize(
    "lists",
    [
        lambda ids: [],
        lambda ids: [Hypothesis(ids)],
        lambda ids: [Hypothesis(ids), Hypothesis(ids)],
        lambda ids: [Hypothesis([]), Hypothesis([], complete=False)],
        lambda ids: [Hypothesis(ids * 40, complete=False), Hypothesis(ids)],
    ],
    ids=["none", "one", "equal", "empty", "as long as it may be"],
)
def test_degenerate_lists_leave_the_run_alive(trainer, objective, lists, monkeypatch):
    sampled = ["objective=grpo", "nbest.draw=sample"] if objective == "grpo" else []
    trained = trainer("ce_weight=0", "ctc_weight=0", *sampled)
    stage, model, batch = trained.stage, trained.engine.model, first_batch(trained)
    monkeypatch.setattr(stage, "generate", lambda *_, **__: [lists(ids) for ids in stage.transcripts(batch)])
    batch.texts[0] = ""  # a reference without words
    out = stage.loss(model, batch)
    out.loss_sum.backward()
    gradients = [p.grad for p in trained.engine.trainable if p.grad is not None]
    assert torch.isfinite(out.loss_sum) and all(torch.isfinite(g).all() for g in gradients)
    if max(len(lists([1])), 0) < 2:
        assert out.loss_sum == 0 and not any(g.any() for g in gradients)


def test_a_hypothesis_whose_score_is_not_finite_is_left_out_and_counted(trainer, monkeypatch):
    trained = trainer()
    stage, model, batch = trained.stage, trained.engine.model, first_batch(trained)
    from seedling.stages import mwer

    whole = mwer.score_lists

    def spoilt(*args, **kwargs):
        scored = whole(*args, **kwargs)
        log_probs_BNT = scored.log_probs_BNT.clone()
        log_probs_BNT[0, 0, 0] = math.nan
        vars(scored)["log_probs_BNT"] = log_probs_BNT
        return scored

    monkeypatch.setattr(mwer, "score_lists", spoilt)
    out = stage.loss(model, batch)
    out.loss_sum.backward()
    assert torch.isfinite(out.loss_sum) and float(out.metrics["rl/not_finite_frac"][0]) == 1
    assert all(torch.isfinite(p.grad).all() for p in trained.engine.trainable if p.grad is not None)


# ---- what it does


def test_errors_become_fewer_and_the_log_tells_before_and_after(given, shards, tmp_path):
    run = tiny_runs.train(
        "mwer",
        tmp_path / "run",
        VALUES,
        *given,
        f"data.valid.dev={shards}",
        "llm_training=full",
        "train.max_steps=40",
        "train.micro_batch_seconds=12",
        "train.global_batch_seconds=12",
        "train.lr.encoder=3e-3",
        "train.lr.converter=3e-3",
        "train.eval_first=true",
        "train.save_every=0",
    )
    for name in ("wer", "rl/wer_expected", "rl/wer_of_first"):
        before, after = (tiny_runs.curve(run, f"valid/dev/{name}")[i] for i in (0, -1))
        assert after < 0.8 * before, (name, before, after)
    assert [a.stage for a in lineage(load_artifact(run / "artifact").path)] == ["mwer", "sft", "lm_pretrain"]
    lines = [line for line in tiny_runs.read_lines(run / "metrics.jsonl") if "train/loss" in line]
    logged = {"rl/risk_mean", "rl/wer_oracle", "rl/distinct_frac", "rl/zero_spread_frac", "rl/age"}
    logged |= {f"time/{part}_s" for part in ("generation", "scoring", "forward", "backward", "update")}
    assert logged <= lines[0].keys()
    for line in lines:
        assert line["rl/wer_oracle"] <= min(line["rl/wer_expected"], line["rl/wer_of_first"]) + 1e-9
        assert line["time/generation_s"] + line["time/scoring_s"] <= line["time/forward_s"] + 1e-3


def test_grpo_raises_its_reward(given, tmp_path):
    run = tiny_runs.train(
        "mwer",
        tmp_path / "run",
        VALUES,
        *given,
        "objective=grpo",
        "nbest={size: 6, draw: sample}",
        "grpo.kl_weight=0.01",
        "llm_training=full",
        "ctc_weight=0",
        "ce_weight=0",
        "train.max_steps=30",
        "train.micro_batch_seconds=12",
        "train.global_batch_seconds=12",
        "train.lr={encoder: 3e-3, converter: 3e-3, llm: 1e-3}",
        "train.save_every=0",
    )
    rewards = tiny_runs.curve(run, "rl/reward_mean")
    assert sum(rewards[-5:]) / 5 > 0.8 * sum(rewards[:5]) / 5 and sum(rewards[:5]) / 5 < -0.1
    divergence = tiny_runs.curve(run, "rl/kl")
    assert abs(divergence[0]) < 1e-4 < abs(divergence[-1])


def test_hypotheses_of_workers_give_the_same_run_and_stale_ones_are_clipped(given, tmp_path):
    """One process beside: made with the weights of each step it is the run without; of every second, ratios move."""
    sampled = ("objective=grpo", "nbest={size: 3, draw: sample}", "train.max_steps=4", "train.save_every=0")
    alone = tiny_runs.train("mwer", tmp_path / "alone", VALUES, *given, *sampled)
    beside = tiny_runs.train("mwer", tmp_path / "beside", VALUES, *given, *sampled, "generation.workers=1")
    assert tiny_runs.curve(alone, "rl/reward_mean") == tiny_runs.curve(beside, "rl/reward_mean")
    for a, b in zip(tiny_runs.weights(alone).values(), tiny_runs.weights(beside).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    late = tiny_runs.train("mwer", tmp_path / "late", VALUES, *given, *sampled, "generation={workers: 1, every: 2}")
    assert tiny_runs.curve(late, "rl/age") == [0, 1, 0, 1]
    assert tiny_runs.curve(late, "rl/clipped_frac")[0] == 0 < max(tiny_runs.curve(late, "rl/clipped_frac"))


def test_the_reference_in_a_list_changes_the_loss_and_not_what_is_logged_of_the_search(trainer):
    logged, losses = [], []
    for add in ("false", "true"):
        trained = trainer("ce_weight=0", "ctc_weight=0", f"nbest.add_reference={add}")
        out = trained.stage.loss(trained.engine.model, first_batch(trained))
        losses.append(out.loss_sum.item())
        logged.append({name: tuple(map(float, m)) for name, m in out.metrics.items() if name.startswith("rl/")})
    assert losses[0] != losses[1]
    assert logged[0]["rl/wer_oracle"] == logged[1]["rl/wer_oracle"] and logged[0]["rl/wer_oracle"][0] > 0
    for name in ("rl/wer_expected", "rl/wer_of_first", "rl/list_size", "rl/distinct_frac", "rl/risk_mean"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-4), name


def test_old_probabilities_of_an_added_reference_are_those_of_the_weights_that_generated(given, tmp_path):
    """With weights that stand still every ratio is 1, and advantages of a group sum to 0: so does the loss."""
    still = ["train.lr={encoder: 0, converter: 0}", "ctc_weight=0", "ce_weight=0", "train.max_steps=2"]
    sampled = ["objective=grpo", "nbest={size: 3, draw: sample, add_reference: true}"]
    workers = "generation={workers: 1, every: 2}"
    run = tiny_runs.train("mwer", tmp_path / "run", VALUES, *given, *still, *sampled, workers, "train.save_every=0")
    assert tiny_runs.curve(run, "rl/age") == [0, 1]
    assert tiny_runs.curve(run, "train/loss") == pytest.approx([0, 0], abs=1e-5)
    assert tiny_runs.curve(run, "rl/clipped_frac") == [0, 0]


def test_keywords_of_every_source_count_in_rewards_too(trainer):
    sampled = ("objective=grpo", "nbest.draw=sample", "risk={keyword_weight: 5, keywords: [rare], rare_max_count: 8}")
    trained = trainer(*sampled, "reward={error_rate: 0, keyword_recall: 1}")
    stage, batch = trained.stage, first_batch(trained)
    (nbest, *_), text = stage.nbests(batch, [[Hypothesis([])] for _ in batch.keys]), batch.texts[0]
    said = stage.risks.phrases_in(text)
    assert set(said) <= set(text.lower().split())
    assert stage._rewards(batch, 0, nbest) == [0.0 if said else 1.0]
    found = {text: stage.risks.phrases_in(text) for text in batch.texts}
    assert any(found.values()) and not all(found.values()), "both kinds of utterance are here"
    weighted = trainer(*sampled, "reward.error_rate=1").stage
    for b, text in enumerate(batch.texts):
        nbest = weighted.nbests(batch, [[Hypothesis([])] for _ in batch.keys])[b]
        assert weighted._rewards(batch, b, nbest) == pytest.approx([-1.0])
        (half,) = weighted._rewards(batch, b, nbest._replace(texts=[" ".join(found[text])]))
        costs = [5 if word in found[text] else 1 for word in text.lower().split()]
        if set(costs) == {1, 5}:
            assert half == pytest.approx(-costs.count(1) / sum(costs))


def test_a_head_without_a_loss_stands_still(trainer):
    trained = trainer("ce_weight=0")
    assert not any(p.requires_grad for p in trained.engine.model.ctc_head.parameters())
    assert "ctc_loss" not in trained.stage.loss(trained.engine.model, first_batch(trained)).metrics


def test_metrics_per_token_are_per_token(trainer):
    trained = trainer()
    stage, batch = trained.stage, first_batch(trained)
    metrics = stage.loss(trained.engine.model, batch).metrics
    tokens = sum(len(ids) + 1 for ids in stage.transcripts(batch))
    assert metrics["nll"][1] == metrics["ctc_loss"][1] == tokens and stage.count(batch) == len(batch)


def test_keywords_cost_more_and_rare_ones_are_counted_in_the_training_texts(trainer):
    trained = trainer("risk={keyword_weight: 5, keywords: [rare], rare_max_count: 8}")
    stage, batch = trained.stage, first_batch(trained)
    texts = [text for text in tiny_runs.sentences(12, seed=1) for _ in range(4)]
    counts = {word: sum(text.lower().split().count(word) for text in texts) for word in " ".join(texts).lower().split()}
    rare = {word for word, count in counts.items() if count <= 8}
    assert rare and rare != set(counts)
    for text in batch.texts:
        (missed,) = stage.risks.of(text, [""])
        assert missed.risk == sum(5 if word in rare else 1 for word in text.lower().split())
        assert missed.errors == len(text.split())


# ---- looking before leaping


def test_check_takes_the_loss_and_generates_nothing(given, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MWER, "generate", lambda *_, **__: pytest.fail("there are no weights to search with"))
    config = tiny_runs.write_yaml(tmp_path / "c.yaml", VALUES | {"ctc_weight": 0})
    arguments = [f"run_dir={tmp_path}/run", *given, f"data.valid.dev={shards}"]
    assert main(["check", "mwer", "--config", str(config), *arguments]) == 0
    assert "shapes: all fit, from the dearest micro-batch to the loss" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    lost = ["risk.keywords=[list]", "risk.keyword_list=/nowhere"]
    assert main(["check", "mwer", "--config", str(config), *arguments, *lost]) == 2
    assert "/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["objective=ppo"], "objective is 'ppo'"),
        (["objective=grpo"], "nbest.draw=sample"),
        (["nbest.size=0"], "nbest.size is 0"),
        (["nbest={size: 8, decode: {beam_size: 4}}"], "nbest.decode.beam_size=8"),
        (["nbest.temperature=0"], "nbest.temperature is 0"),
        (["nbest.temperature=0.5"], "which beam search has no use for"),
        (["nbest={draw: sample, decode: {beam_size: 8}}"], "nbest.decode.beam_size is set"),
        (["ce_weight=-1"], "ce_weight is -1"),
        (["grpo.kl_weight=0.1"], "grpo is set and objective is mwer"),
        (["reward.echo=1"], "reward is set and objective is mwer"),
        (["grpo.clip_low=2"], "grpo.clip_low is 2"),
        (["grpo.kl_weight=-1"], "grpo.kl_weight is -1"),
        (["risk.keyword_weight=0.5"], "risk.keyword_weight is 0.5"),
        (["risk.keywords=[list]", "risk.keyword_list=/nowhere"], "/nowhere"),
        (["reward.error_rate=0"], "reward"),
        (["generation.every=2"], "generation.workers"),
        (["train.zero_stage=3"], "train.zero_stage=2"),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_exit_2(given, tmp_path, capsys, more, said):
    config = tiny_runs.write_yaml(tmp_path / "c.yaml", VALUES)
    assert main(["run", "mwer", "--config", str(config), f"run_dir={tmp_path}/run", *given, *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0], errors
