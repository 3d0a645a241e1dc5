"""Beams as query positions, beams as rows, and no cache at all give the same scores."""

import itertools
import math
import random

import pytest
import torch
from random_llms import END, make_end_likely, prompts_of

from seedling.model import llm_scorer as module
from seedling.model.decoding import DecodeConfig, decode
from seedling.model.llm_scorer import RowScorer, TreeScorer, groups_by_length, llm_scorer, takes_trees

TREES = ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "granite", "cohere"]


@pytest.fixture
def little_room(monkeypatch):
    """The cache is thinned out at nearly every step."""
    monkeypatch.setattr(module, "ROOM", 1)
    monkeypatch.setattr(module, "STEPS_OF_ROOM", 2)


@pytest.mark.parametrize("family", TREES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_scorers_find_the_same(family, attention, little_room, tiny_llm):
    rng = random.Random(0)
    for beam_size in (1, 2, 3, 8):
        llm = tiny_llm(family, seed=beam_size)
        llm.set_attn_implementation(attention)
        make_end_likely(llm, by=3.0)
        prompts = prompts_of(llm, [3, 17, 9, 9, 1, 60, 12, 5], seed=beam_size)
        order = rng.sample(range(8), k=8)
        config = DecodeConfig(beam_size=beam_size, nbest=beam_size)
        limits = [rng.randint(1, 16) for _ in prompts]
        rows = decode(RowScorer(llm), prompts, limits=limits, end=END, config=config)
        prompts, limits = ([values[i] for i in order] for values in (prompts, limits))
        trees = decode(TreeScorer(llm), prompts, limits=limits, end=END, config=config)
        for found, i in zip(trees, order):
            assert [h.ids for h in found] == [h.ids for h in rows[i]]
            assert all(math.isclose(a.score, b.score, abs_tol=1e-3) for a, b in zip(found, rows[i]))


@torch.no_grad()
@pytest.mark.parametrize("scorer_class", [TreeScorer, RowScorer])
def test_rows_may_be_chosen_in_any_number_and_their_scores_are_those_without_a_cache(
    scorer_class, little_room, tiny_llm
):
    """As when several transcripts of an utterance are drawn at random and end one by one."""
    llm, rng = tiny_llm("qwen3"), random.Random(1)
    prompts = prompts_of(llm, [6, 2, 11, 30])
    scorer = scorer_class(llm)
    found = scorer.start(prompts)
    histories: list[tuple[int, list[int]]] = [(u, []) for u in range(4)]
    for _ in range(12):
        for row, (utterance, tokens) in enumerate(histories):
            said = llm.get_input_embeddings()(torch.tensor(tokens, dtype=torch.long))
            logits = llm(inputs_embeds=torch.cat([prompts[utterance], said])[None]).logits[0, -1]
            torch.testing.assert_close(found[row], logits.float().log_softmax(-1), atol=1e-3, rtol=1e-3)
        left = sorted({u for u, _ in histories})[-rng.randint(2, 4) :]
        chosen = [row for row, (u, _) in enumerate(histories) if u in left for _ in range(rng.randint(0, 2))]
        chosen = chosen[:7] or [0]
        scorer.select(torch.tensor(chosen))
        tokens = [rng.randrange(2, 300) for _ in chosen]
        histories = [(histories[row][0], [*histories[row][1], token]) for row, token in zip(chosen, tokens)]
        found = scorer.step(torch.tensor(tokens))


def test_the_cache_stays_about_as_long_as_a_hypothesis(tiny_llm):
    llm = tiny_llm("llama")
    make_end_likely(llm, by=-1e4)
    scorer, widest = TreeScorer(llm), 0
    step = scorer.step

    def watched(tokens_R):
        nonlocal widest
        scores = step(tokens_R)
        widest = max(widest, scorer.cache.columns)
        return scores

    scorer.step = watched
    decode(scorer, prompts_of(llm, [10, 7]), limits=[200, 200], end=END, config=DecodeConfig(beam_size=8))
    assert widest < 10 + 200 + 2 * 8 * module.STEPS_OF_ROOM, "8 beams of 200 tokens are 1600 columns"


def test_trees_are_for_lms_that_can_take_them(tiny_llm):
    for family in TREES:
        llm = tiny_llm(family)
        assert takes_trees(llm) and isinstance(llm_scorer(llm), TreeScorer)
    windowed = tiny_llm("gemma2")
    assert not takes_trees(windowed) and isinstance(llm_scorer(windowed), RowScorer)
    flash = tiny_llm("llama")
    flash.config._attn_implementation = "flash_attention_2"
    assert not takes_trees(flash)
    from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPTNeoConfig, Mamba2Config, MistralConfig

    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    for config in (
        MistralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, sliding_window=4),
        BloomConfig(**shape, n_head=4),
        GPTNeoConfig(
            vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        ),
        FalconConfig(**shape, num_attention_heads=4, alibi=True),
        Mamba2Config(**shape, num_heads=8, head_dim=8, n_groups=1, state_size=8),
    ):
        assert not takes_trees(AutoModelForCausalLM.from_config(config)), type(config).__name__


def test_prompts_of_like_length_are_read_together():
    assert groups_by_length([100, 90, 30, 95, 25]) == [[0, 3, 1], [2, 4]]
    assert sorted(itertools.chain(*groups_by_length([7, 1, 300, 20, 8]))) == [0, 1, 2, 3, 4]
