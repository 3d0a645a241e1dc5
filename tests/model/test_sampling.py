"""Samples have the distribution they should have, and end one by one."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from random_llms import END, make_end_likely, prompts_of
from scipy.stats import chisquare
from table_scorer import TableScorer, forbidding

from seedling.model.decoding import DecodeConfig, Hypothesis, decode
from seedling.model.llm_scorer import RowScorer, TreeScorer
from seedling.model.sampling import sample


def drawn(scorer, prefixes, *, seed: int = 0, **settings) -> list[list[Hypothesis]]:
    settings = {"num": 1, "temperature": 1.0, "end": END} | settings
    return sample(scorer, prefixes, generator=torch.Generator().manual_seed(seed), **settings)


def said(samples: list[Hypothesis]) -> list[tuple[int, ...]]:
    return [tuple(h.ids + [END] * h.complete) for h in samples]


def remembering(scorer: TableScorer) -> TableScorer:
    """Thousands of rows share few histories."""
    free, known = scorer.next_of, {}

    def next_of(history):
        if history not in known:
            known[history] = free(history)
        return known[history]

    scorer.next_of = next_of
    return scorer


def tempered(log_probs_V: torch.Tensor, *, temperature: float, top_p: float) -> list[float]:
    """Probabilities of the next token, written down without sorting tensors."""
    weights = [math.exp(x / temperature) for x in log_probs_V.double().tolist()]
    share = {token: weight / sum(weights) for token, weight in enumerate(weights)}
    kept, total = {}, 0.0
    for token in sorted(share, key=lambda token: -share[token]):
        if total < top_p:
            kept[token] = share[token]
        total += share[token]
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(weights))]


def everything(scorer: TableScorer, prefix, *, limit: int, **settings) -> dict[tuple[int, ...], float]:
    """The probability of every transcript that may come out."""
    found, open_ones = {}, {(): 1.0}
    while open_ones:
        tokens, probability = open_ones.popitem()
        for token, share in enumerate(tempered(scorer.next_of((prefix, *tokens)), **settings)):
            longer = (*tokens, token)
            if share:
                (found if token == END or len(longer) == limit else open_ones)[longer] = probability * share
    return found


def surprise(samples: list[Hypothesis], expected: dict[tuple[int, ...], float]) -> float:
    """The p-value of drawing these."""
    counts = Counter(said(samples))
    assert counts.keys() <= expected.keys()
    return chisquare([counts[tokens] for tokens in expected], [len(samples) * p for p in expected.values()]).pvalue


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.8), (1.4, 0.6)])
def test_transcripts_come_as_often_as_their_probability_says(temperature, top_p):
    scorer, settings = remembering(TableScorer(4)), {"temperature": temperature, "top_p": top_p}
    for prefix, limit, samples in zip((3, 8), (3, 2), drawn(scorer, [3, 8], limits=[3, 2], num=3000, **settings)):
        assert surprise(samples, everything(scorer, prefix, limit=limit, **settings)) > 1e-3


def test_another_temperature_would_be_seen():
    scorer = remembering(TableScorer(4))
    (samples,) = drawn(scorer, [3], limits=[3], num=3000, temperature=1.5)
    assert surprise(samples, everything(scorer, 3, limit=3, temperature=1.0, top_p=1.0)) < 1e-6


@pytest.mark.parametrize("scorer_class", [TreeScorer, RowScorer])
def test_an_llms_tokens_come_as_often_as_its_forward_pass_says(scorer_class, tiny_llm):
    llm, num = tiny_llm("qwen3"), 3000
    (prompt,) = prompts_of(llm, [6])
    first = said(drawn(scorer_class(llm), [prompt], limits=[1], num=num, temperature=1.5)[0])
    with torch.no_grad():
        share_V = (llm(inputs_embeds=prompt[None]).logits[0, -1].double() / 1.5).softmax(-1)
    counts = torch.tensor([token for (token,) in first]).bincount(minlength=300)
    often = num * share_V >= 5  # the others together are one class
    observed = [*counts[often].tolist(), counts[~often].sum().item()]
    expected = [*(num * share_V[often]).tolist(), (num * share_V[~often].sum()).item()]
    assert often.sum() > 10
    assert chisquare(observed, expected).pvalue > 1e-3


def test_the_score_sums_the_scores_as_they_are(tiny_llm):
    scorer = TableScorer(9)
    for prefix, samples in zip("ab", drawn(scorer, ["a", "b"], limits=[6, 6], num=20, temperature=2.5, top_p=0.9)):
        for h, tokens in zip(samples, said(samples)):
            by_hand = sum(scorer.next_of((prefix, *tokens[:i]))[token].item() for i, token in enumerate(tokens))
            assert math.isclose(h.score, by_hand, abs_tol=1e-4) and h.rank_score == h.score


@pytest.mark.parametrize("scorer_class", [TreeScorer, RowScorer])
def test_near_temperature_0_every_sample_is_what_greedy_decoding_finds(scorer_class, tiny_llm):
    llm = tiny_llm("llama")
    make_end_likely(llm, by=3.0)
    prompts, limits = prompts_of(llm, [5, 12, 8, 20]), [15, 4, 15, 9]
    greedy = decode(scorer_class(llm), prompts, limits=limits, end=END, config=DecodeConfig())
    for samples, (best,) in zip(drawn(scorer_class(llm), prompts, limits=limits, num=3, temperature=1e-4), greedy):
        assert said(samples) == 3 * said([best])
        assert all(math.isclose(h.score, best.score, abs_tol=1e-3) for h in samples)


def test_so_few_of_the_likeliest_that_only_one_is_left_is_greedy_decoding_too():
    prefixes = list(range(6))
    greedy = decode(TableScorer(20), prefixes, limits=[8] * 6, end=END, config=DecodeConfig())
    samples = drawn(TableScorer(20), prefixes, limits=[8] * 6, num=2, temperature=3.0, top_p=1e-6)
    assert [said(of_one) for of_one in samples] == [2 * said(of_one) for of_one in greedy]


def test_the_seed_decides_and_samples_differ():
    settings = {"limits": [12, 12], "num": 8}
    first, again, other = (said(drawn(TableScorer(30), [1, 2], seed=s, **settings)[0]) for s in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 8
    same_prompt = drawn(TableScorer(30), ["x", "x"], **settings)
    assert said(same_prompt[0]) != said(same_prompt[1]), "two utterances share no luck"


def test_what_a_sample_draws_does_not_depend_on_when_the_others_end():
    long = drawn(TableScorer(30), [1, 2, 3], limits=[12, 12, 12], num=4)
    short = drawn(TableScorer(30), [1, 2, 3], limits=[1, 12, 2], num=4)
    assert said(short[1]) == said(long[1])
    assert [tokens[:2] for tokens in said(long[2])] == said(short[2])


def test_limits_hold_per_utterance_and_mark_what_was_cut():
    limits = [1, 5, 9]
    cut = drawn(forbidding(TableScorer(20), lambda _: [END]), [0, 1, 2], limits=limits, num=3)
    assert all(len(h.ids) == limit and not h.complete for of_one, limit in zip(cut, limits) for h in of_one)
    free = list(itertools.chain(*drawn(TableScorer(6), [0, 1, 2], limits=limits, num=30)))
    assert {h.complete for h in free} == {True, False}
    assert all(END not in h.ids for h in free)
    for of_one, limit in zip(drawn(TableScorer(6), [0, 1, 2], limits=limits, num=30), limits):
        assert all(len(h.ids) == limit if not h.complete else len(h.ids) < limit for h in of_one)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_forbidden_tokens_are_never_drawn_however_hot(top_p):
    def forbidden(history):
        return random.Random(repr(history)).sample(range(6), k=4)

    scorer = forbidding(TableScorer(6), forbidden)
    for prefix, samples in enumerate(drawn(scorer, [0, 1, 2], limits=[7] * 3, num=40, temperature=1e6, top_p=top_p)):
        for h, tokens in zip(samples, said(samples)):
            assert math.isfinite(h.score)
            assert all(token not in forbidden((prefix, *tokens[:i])) for i, token in enumerate(tokens))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_sample_that_nothing_may_follow_is_over_with_what_it_has(steps):
    def forbidden(history):
        return range(30) if history[0] == "stuck" and len(history) > steps else [END]

    stuck, free = drawn(forbidding(TableScorer(30), forbidden), ["stuck", "free"], limits=[6, 6], num=4)
    assert all(len(h.ids) == steps and not h.complete and math.isfinite(h.score) for h in stuck)
    assert all(len(h.ids) == 6 for h in free)


def test_samples_leave_the_batch_one_by_one():
    scorer = TableScorer(5)
    samples = list(itertools.chain(*drawn(scorer, [0, 1], limits=[10, 10], num=6)))
    lengths = [len(h.ids) + h.complete for h in samples]
    assert scorer.rows_seen == [2, *(sum(length > t for length in lengths) for t in range(1, max(lengths)))]


def test_nothing_to_draw_from_gives_nothing():
    assert sample(TableScorer(5), [], limits=[], end=END, num=3, temperature=1.0) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num": 0}, "num is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_that_cannot_be_met_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        drawn(TableScorer(5), [0], limits=[3], **settings)
