"""Pseudo speech keeps what it promises: its tokens, in their order, as long and as disturbed as the config allows."""

import pytest
import torch
from torch import nn

from seedling.model.prompt import PromptTokens
from seedling.model.repetition import ContextDraw, Heard, PseudoSpeech, RepeatingLM, RepetitionConfig

VOCABULARY, WIDTH = 40, 16
ORDINARY = list(range(3, VOCABULARY))
PLAIN = {"drop": 0.0, "substitute": 0.0, "max_mix": 0.0}


@pytest.fixture
def embeddings() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(VOCABULARY, WIDTH)


def pseudo_speech(**settings) -> PseudoSpeech:
    return PseudoSpeech(RepetitionConfig(**settings), ordinary_tokens=torch.tensor(ORDINARY))


def runs(speech_SL: torch.Tensor, embeddings: nn.Embedding) -> list[tuple[int | None, int]]:
    """Return (token, or None for a blank; positions that it lasts), where every position is a token's row or zeros."""
    heard: list[tuple[int | None, int]] = []
    for row_L in speech_SL:
        token = None
        if row_L.any():
            (token,) = (embeddings.weight == row_L).all(1).nonzero()[0].tolist()
        if heard and heard[-1][0] == token:
            heard[-1] = (token, heard[-1][1] + 1)
        else:
            heard.append((token, 1))
    return heard


def test_without_disturbance_the_tokens_come_in_order_for_as_long_as_allowed(embeddings):
    speech, tokens = pseudo_speech(**PLAIN, max_hold=3, max_blanks=2), [5, 9, 7, 30, 12, 5]
    holds, blanks = set(), set()
    for seed in range(100):
        torch.manual_seed(seed)
        heard = runs(speech(tokens, embeddings), embeddings)
        assert [token for token, _ in heard if token is not None] == tokens, f"seed {seed}"
        holds |= {count for token, count in heard if token is not None}
        blanks |= {count for token, count in heard if token is None}
    assert holds == {1, 2, 3} and blanks == {1, 2}


def test_a_hold_of_one_without_blanks_is_the_tokens_own_embeddings(embeddings):
    speech_SL = pseudo_speech(**PLAIN, max_hold=1, max_blanks=0)([4, 4, 8], embeddings)
    assert torch.equal(speech_SL, embeddings.weight[[4, 4, 8]])


def test_mixing_leaves_the_token_the_nearest(embeddings):
    """At most half of another embedding is mixed in, so that the token can still be heard."""
    speech = pseudo_speech(drop=0.0, substitute=0.0, max_mix=0.45, max_hold=1, max_blanks=0)
    torch.manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (200,))
    mixed_SL = speech(tokens.tolist(), embeddings)
    assert not torch.equal(mixed_SL, embeddings.weight[tokens])
    nearest = torch.cdist(mixed_SL, embeddings.weight).argmin(1)
    assert torch.equal(nearest, tokens)


@pytest.mark.parametrize("what", ["drop", "substitute"])
def test_at_most_the_configured_share_is_dropped_or_replaced(embeddings, what):
    """Hardness is uniform from 0 to 1, so half of the share on average."""
    speech = pseudo_speech(**{**PLAIN, what: 0.4}, max_hold=1, max_blanks=0)
    tokens, hit = ORDINARY * 4, []
    for seed in range(60):
        torch.manual_seed(seed)
        speech_SL = speech(tokens, embeddings)
        if what == "drop":
            hit.append(1 - len(speech_SL) / len(tokens))
        else:
            hit.append(float((speech_SL != embeddings.weight[tokens]).any(1).float().mean()))
    assert max(hit) < 0.55 and min(hit) < 0.05, (min(hit), max(hit))
    assert sum(hit) / len(hit) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("tokens", [[], [6]])
def test_a_sentence_of_which_nothing_is_left_is_one_blank(embeddings, tokens):
    speech = pseudo_speech(drop=1.0)
    shapes = set()
    for seed in range(50):
        torch.manual_seed(seed)
        speech_SL = speech(tokens, embeddings)
        shapes.add(len(speech_SL))
        assert speech_SL.shape[1] == WIDTH and len(speech_SL) >= 1
    assert 1 in shapes


def test_random_tokens_are_ordinary_ones_and_all_of_them_occur():
    torch.manual_seed(0)
    assert set(pseudo_speech().random_tokens(2000).tolist()) == set(ORDINARY)


def test_the_seed_fixes_pseudo_speech(embeddings):
    speech, found = pseudo_speech(), []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(speech(list(range(3, 30)), embeddings))
    assert torch.equal(*found)


def test_gradients_reach_the_embeddings_of_what_is_heard(embeddings):
    pseudo_speech(**PLAIN)([5, 9], embeddings).sum().backward()
    assert embeddings.weight.grad.any(1).nonzero().flatten().tolist() == [5, 9]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"share": 1.2}, "repetition.share is 1.2"),
        ({"drop": -0.1}, "repetition.drop is -0.1"),
        ({"max_hold": 0}, r"repetition.max_hold \(0\)"),
        ({"max_blanks": -1}, r"max_blanks \(-1\)"),
        ({"span_lengths": []}, r"span_lengths is \[\]"),
        ({"span_lengths": [1, 0]}, r"span_lengths is \[1, 0\]"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, said):
    with pytest.raises(ValueError, match=said):
        RepetitionConfig(**setting)


# ---- contexts and what is unclear


def drawn(sentence: list[int], others: list[list[int]], *, has_context=True, is_unclear=True, **settings) -> Heard:
    draw = ContextDraw(RepetitionConfig(**settings), separator=[4])
    return draw(sentence, others, has_context=has_context, is_unclear=is_unclear)


def test_a_context_lists_every_unclear_span_among_spans_of_other_sentences():
    sentence, other = list(range(10, 20)), list(range(30, 38))
    places = set()
    for seed in range(100):
        torch.manual_seed(seed)
        context_ids, unclear = drawn(sentence, [other], max_distractors=3)
        assert {t for t, is_unclear in zip(sentence, unclear) if is_unclear} == {
            t for t in context_ids if t in sentence
        }
        foreign = [t for t in context_ids if t in other]
        assert foreign and set(context_ids) <= {4, *sentence, *other} and 4 not in (context_ids[0], context_ids[-1])
        places.add(context_ids.index(foreign[0]) == 0)
    assert places == {True, False}, "where the sentence's own spans stand must not give them away"


def test_spans_are_as_long_as_asked_for():
    sentence, other = list(range(10, 30)), list(range(40, 60))
    found = set()
    for seed in range(60):
        torch.manual_seed(seed)
        context_ids, _ = drawn(sentence, [other], is_unclear=False, max_distractors=1, span_lengths=[3, 5])
        found.add(len(context_ids))
    assert {3, 5} <= found <= {1, 2, 3, 4, 5}, "a span is shorter only at the end of its sentence"


def test_without_a_context_words_can_be_unclear_and_with_one_need_not_be():
    torch.manual_seed(0)
    alone = drawn([10, 11, 12], [[30]], has_context=False)
    assert alone.context_ids is None and any(alone.unclear)
    foreign = drawn([10, 11, 12], [[30, 31]], is_unclear=False)
    assert not any(foreign.unclear) and foreign.context_ids and not {10, 11, 12} & set(foreign.context_ids)


def test_unclear_tokens_are_heard_as_anything_between_themselves_and_another(embeddings):
    speech, weights = pseudo_speech(**PLAIN, max_hold=1, max_blanks=0), []
    torch.manual_seed(2)
    for _ in range(300):
        clear_L, unclear_L = speech([5, 9], embeddings, [False, True])
        assert torch.equal(clear_L, embeddings.weight[5])
        weights.append(float((unclear_L - embeddings.weight[9]).detach().norm()))
    assert min(weights) < 0.3 and max(weights) > 4.0


# ---- the LM with its loss


def clearly(sentence: list[int]) -> Heard:
    """A repetition without a context, of which every token is clear."""
    return Heard(None, [False] * len(sentence))


@pytest.fixture
def repeating(tiny_llm):
    """make(**settings) -> RepeatingLM on a tiny random LM with `1` as its end and `2` as its start."""

    def make(**settings) -> RepeatingLM:
        llm = tiny_llm()
        tokens = PromptTokens(instruction=[5, 6, 7], instruction_with_context=[8], after=[9], end=1)
        ordinary = list(range(3, llm.config.vocab_size))
        cfg = RepetitionConfig(**settings)
        return RepeatingLM(llm, prompt_tokens=tokens, start=2, ordinary=ordinary, separator=[4], cfg=cfg)

    return make


def test_a_plain_sentence_has_the_loss_of_the_llm_itself(repeating):
    model, sentence = repeating(), [20, 21, 22]
    nll_N, unclear_N = model.losses([sentence], [None])
    logits = model.llm(torch.tensor([[2, *sentence]])).logits[0]
    expected = nn.functional.cross_entropy(logits, torch.tensor([*sentence, 1]), reduction="none")
    torch.testing.assert_close(nll_N, expected)
    assert not unclear_N.any()


def test_a_repetition_has_the_loss_of_the_whole_prompt_written_out(repeating):
    model, sentence = repeating(**PLAIN, max_hold=1, max_blanks=0), [20, 21, 22]
    nll_N, unclear_N = model.losses([sentence], [clearly(sentence)])
    prompt = [5, 6, 7, *sentence, 9]
    logits = model.llm(torch.tensor([[*prompt, *sentence]])).logits[0, len(prompt) - 1 :]
    expected = nn.functional.cross_entropy(logits, torch.tensor([*sentence, 1]), reduction="none")
    torch.testing.assert_close(nll_N, expected)
    assert not unclear_N.any()


def test_a_context_stands_between_its_instruction_and_the_speech(repeating):
    model, sentence = repeating(**PLAIN, max_hold=1, max_blanks=0), [20, 21, 22]
    nll_N, _ = model.losses([sentence], [clearly(sentence)._replace(context_ids=[30, 4, 31])])
    prompt = [8, 30, 4, 31, *sentence, 9]
    logits = model.llm(torch.tensor([[*prompt, *sentence]])).logits[0, len(prompt) - 1 :]
    expected = nn.functional.cross_entropy(logits, torch.tensor([*sentence, 1]), reduction="none")
    torch.testing.assert_close(nll_N, expected)


def test_a_batch_of_both_kinds_has_the_losses_of_one_by_one(repeating):
    model = repeating(**PLAIN, max_hold=1, max_blanks=0)
    sentences = [[20, 21, 22], [30], [40, 41], []]
    heard = [clearly(sentences[0]), None, None, Heard(None, [])]
    nll_N, _ = model.losses(sentences, heard)
    singly = [model.losses([s], [how])[0] for s, how in zip(sentences, heard)]
    torch.testing.assert_close(nll_N, torch.cat(singly), rtol=1e-4, atol=1e-5)


def test_the_share_of_repetitions_and_the_count_of_losses_are_as_configured(repeating):
    sentences = [[20 + i % 7, 30] for i in range(300)]
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(4)
        with torch.no_grad():
            nll_N, heard_N = repeating(share=share)(sentences)
        assert len(nll_N) == 3 * len(sentences)
        assert heard_N.float().mean() == pytest.approx(share, abs=0.08)
