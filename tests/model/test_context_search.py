"""Joint context search against enumeration, teacher forcing, plain search, and itself in other batches."""

import itertools
import math
import random
from functools import partial

import pytest
import torch
from random_llms import END, make_end_likely, prompts_of
from table_scorer import TableScorer

from seedling.model.context_search import ContextPrompt, ContextScorer
from seedling.model.ctc_prefix import CTCPrefixes, TokenBytes, token_bytes
from seedling.model.ctc_scorer import CTCGains
from seedling.model.decoding import DecodeConfig, Hypothesis, decode
from seedling.model.llm_scorer import llm_scorer

INF = math.inf
OFF = {"context_prune": INF, "context_top_k": 0}


Table = partial(TableScorer, spread=1.5)


def joint_step(p0: list[float], pc: list[float], config: DecodeConfig) -> dict[int, float]:
    """The survivors and their scores, by the letter of the definition."""
    order = sorted(range(len(p0)), key=lambda v: -p0[v])
    kept = [v for v in order if p0[v] >= p0[order[0]] - config.context_prune][: config.context_top_k or None]
    alpha = config.context_alpha
    weight = 1.0 if alpha == INF else alpha / (1 + alpha)
    if config.context_form == "log":
        return {v: weight * pc[v] + (1 - weight) * p0[v] for v in kept}
    return {v: math.log(weight * math.exp(pc[v]) + (1 - weight) * math.exp(p0[v])) for v in kept}


def search_tables(prompts, *, limit: int, vocabulary: int, **settings) -> list[list[Hypothesis]]:
    config = DecodeConfig(**settings)
    scorer = ContextScorer(Table(vocabulary), config=config)
    return decode(scorer, prompts, limits=[limit] * len(prompts), end=END, config=config)


@pytest.mark.parametrize("form", ["log", "prob"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 3.0, INF])
@pytest.mark.parametrize("prune, top_k", [(INF, 0), (1.5, 0), (INF, 2), (2.0, 3)])
def test_a_wide_beam_finds_what_enumeration_finds(form, alpha, prune, top_k):
    V, limit, table = 4, 4, Table(4)
    config = DecodeConfig(context_alpha=alpha, context_form=form, context_prune=prune, context_top_k=top_k)
    for seed in range(3):
        everything: list[tuple[float, list[int]]] = []

        def extend(tokens: tuple, score: float, *, seed=seed, everything=everything) -> None:
            p0, pc = (table.next_of((prompt, *tokens)).tolist() for prompt in (("plain", seed), ("context", seed)))
            for token, gain in joint_step(p0, pc, config).items():
                longer = (*tokens, token)
                if token == END or len(longer) == limit:
                    everything.append((score + gain, [t for t in longer if t != END]))
                else:
                    extend(longer, score + gain)

        extend((), 0.0)
        everything.sort(reverse=True)
        settings = {"context_alpha": alpha, "context_form": form, "context_prune": prune}
        # The scorer's beam is 1, so that its top_k stays below the width of the search.
        wide = DecodeConfig(beam_size=81, nbest=81, length_penalty=0.0, stop="never", context_top_k=0, **settings)
        scorer = ContextScorer(Table(V), config=config)
        prompt = ContextPrompt(("plain", seed), ("context", seed))
        (nbest,) = decode(scorer, [prompt], limits=[limit], end=END, config=wide)
        assert [h.ids for h in nbest] == [ids for _, ids in everything[:81]]
        assert all(math.isclose(h.score, score, abs_tol=1e-5) for h, (score, _) in zip(nbest, everything))


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("form", ["log", "prob"])
def test_an_endless_alpha_ranks_by_the_context_and_never_emits_what_is_pruned(beam_size, form):
    settings = {"context_alpha": INF, "context_form": form, "context_prune": 1.0, "context_top_k": 5}
    prompts = [ContextPrompt(("plain", seed), ("context", seed)) for seed in range(20)]
    found = search_tables(prompts, limit=8, vocabulary=20, beam_size=beam_size, nbest=beam_size, **settings)
    table, strange = Table(20), 0
    for seed, nbest in enumerate(found):
        for h in nbest:
            score, tokens = 0.0, h.ids + [END] * h.complete
            for i, token in enumerate(tokens):
                p0, pc = (table.next_of((prompt, *tokens[:i])) for prompt in (("plain", seed), ("context", seed)))
                kept = [v for v in p0.topk(5).indices.tolist() if p0[v] >= p0.max() - 1.0]
                assert token in kept
                if beam_size == 1:
                    assert token == max(kept, key=lambda v: pc[v])
                score += pc[token].item()
                strange += int(token != pc.argmax())
            assert math.isclose(h.score, score, abs_tol=1e-4)
    assert strange > 20, "the context must have wanted tokens that were pruned"


@pytest.mark.parametrize("beam_size", [1, 3])
def test_the_repetition_guard_leaves_a_survivor_where_one_token_leads_by_far(beam_size):
    """With equal opinions greedy joint search is greedy plain search, whatever it prunes; beams may be pruned."""
    table = Table(6)
    table.next_of = lambda history: torch.eye(6)[3].mul(9.0).add(torch.arange(6) / 10).log_softmax(-1)
    config = DecodeConfig(beam_size=beam_size, max_repeats=2, context_prune=2.0)
    prompts = [ContextPrompt(0, 0), ContextPrompt(1, None)]
    joint = decode(ContextScorer(table, config=config), prompts, limits=[9, 9], end=END, config=config)
    plain = decode(table, [0, 1], limits=[9, 9], end=END, config=config)
    assert [len(nbest[0].ids) for nbest in plain] == [len(nbest[0].ids) for nbest in joint] == [9, 9]
    if beam_size == 1:
        assert_equal(joint, plain)


def test_as_many_tokens_survive_as_there_are_beams():
    few, enough = (
        search_tables(
            [ContextPrompt(0, (0, "context"))], limit=4, vocabulary=30, beam_size=8, nbest=8, context_top_k=top_k
        )
        for top_k in (2, 8)
    )
    assert_equal(few, enough)


def test_an_utterance_without_context_costs_no_second_row():
    table = Table(12)
    config = DecodeConfig(beam_size=3)
    prompts = [ContextPrompt(0, None), ContextPrompt(1, (1, "context")), ContextPrompt(2, None)]
    decode(ContextScorer(table, config=config), prompts, limits=[1, 5, 5], end=END, config=config)
    assert table.rows_seen[0] == 3 + 1
    assert table.rows_seen[1] <= 2 * 3 + 3


def search(llm, prompts, *, limits: list[int] | None = None, **settings) -> list[list[Hypothesis]]:
    config = DecodeConfig(**{"max_new_tokens": 12} | settings)
    joint = isinstance(prompts[0], ContextPrompt)
    scorer = ContextScorer(llm_scorer(llm), config=config) if joint else llm_scorer(llm)
    limits = limits or [config.max_new_tokens or 12] * len(prompts)
    return decode(scorer, prompts, limits=limits, end=END, config=config)


@torch.no_grad()
def forced(llm, prefix: torch.Tensor, targets: list[int]) -> torch.Tensor:
    """Log-probabilities at each position of a hypothesis, from one pass without a cache."""
    embeddings = torch.cat([prefix, llm.get_input_embeddings()(torch.tensor(targets[:-1], dtype=torch.long))])
    return llm(inputs_embeds=embeddings[None]).logits[0, len(prefix) - 1 :].float().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "gemma2"])
@pytest.mark.parametrize("form", ["log", "prob"])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_scores_are_those_of_two_forward_passes_without_a_cache(family, form, beam_size, tiny_llm):
    llm = tiny_llm(family)
    make_end_likely(llm, by=4.0 if family != "gemma2" else 8.0)
    prompts = [ContextPrompt(p, c) for p, c in zip(prompts_of(llm, [9, 4, 14]), prompts_of(llm, [12, 20, 3], seed=1))]
    config = DecodeConfig(context_alpha=0.6, context_form=form, context_prune=4.0, context_top_k=8)
    settings = {"context_alpha": 0.6, "context_form": form, "context_prune": 4.0, "context_top_k": 8}
    for prompt, nbest in zip(prompts, search(llm, prompts, beam_size=beam_size, nbest=beam_size, **settings)):
        assert nbest
        for h in nbest:
            tokens = h.ids + [END] * h.complete
            plain, context = (forced(llm, prefix, tokens).tolist() for prefix in prompt)
            steps = [joint_step(p0, pc, config) for p0, pc in zip(plain, context)]
            assert math.isclose(h.score, sum(s[t] for s, t in zip(steps, tokens)), abs_tol=2e-3), h


@pytest.mark.parametrize("beam_size", [1, 4])
def test_without_alpha_and_pruning_the_context_changes_nothing(beam_size, tiny_llm):
    for seed in range(3):
        llm = tiny_llm("llama", seed=seed)
        make_end_likely(llm, by=3.0)
        plain, context = prompts_of(llm, [9, 4, 14], seed=seed), prompts_of(llm, [19, 30, 17], seed=seed + 9)
        expected = search(llm, plain, beam_size=beam_size, nbest=beam_size)
        for form in ("log", "prob"):
            settings = {"beam_size": beam_size, "nbest": beam_size, "context_alpha": 0.0, "context_form": form, **OFF}
            found = search(llm, [ContextPrompt(p, c) for p, c in zip(plain, context)], **settings)
            assert_equal(found, expected)


def assert_equal(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    assert [[h.ids for h in nbest] for nbest in found] == [[h.ids for h in nbest] for nbest in expected]
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected)):
        assert math.isclose(a.score, b.score, abs_tol=1e-3) and a.complete == b.complete


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 5.0, INF])
@pytest.mark.parametrize("form", ["log", "prob"])
def test_a_context_that_says_nothing_gives_the_plain_result(alpha, form, tiny_llm):
    llm = tiny_llm("qwen2")
    make_end_likely(llm, by=3.0)
    prompts = prompts_of(llm, [9, 4, 14])
    for beam_size in (1, 4):
        settings = {"beam_size": beam_size, "nbest": beam_size, "context_alpha": alpha, "context_form": form, **OFF}
        found = search(llm, [ContextPrompt(p, p) for p in prompts], **settings)
        assert_equal(found, search(llm, prompts, beam_size=beam_size, nbest=beam_size))


@pytest.mark.parametrize("beam_size", [1, 4])
def test_the_text_of_an_utterance_does_not_depend_on_its_batch(beam_size, tiny_llm):
    llm = tiny_llm("qwen3")
    make_end_likely(llm, by=3.0)
    plain, context = prompts_of(llm, [3, 17, 9, 9, 1, 12]), prompts_of(llm, [33, 27, 1, 19, 8, 60], seed=1)
    prompts = [ContextPrompt(p, c if i % 3 else None) for i, (p, c) in enumerate(zip(plain, context))]
    limits, settings = [12, 4, 9, 12, 12, 7], {"beam_size": beam_size, "nbest": beam_size}
    alone = [search(llm, [p], limits=[n], **settings)[0] for p, n in zip(prompts, limits)]
    assert_equal([alone[0]], search(llm, plain[:1], limits=limits[:1], **settings))  # no context: decoded plainly
    rng = random.Random(0)
    for _ in range(5):
        mix = rng.sample(range(6), k=rng.randint(2, 6))
        found = search(llm, [prompts[i] for i in mix], limits=[limits[i] for i in mix], **settings)
        assert_equal(found, [alone[i] for i in mix])


# --- speech, and the CTC head with it --------------------------------------------------------------------------------

CONTEXTS = [None, [40, 41, 70], [], [42, 43, 44, 45]]


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_the_text_of_speech_does_not_depend_on_its_batch(ctc_weight, beam_size, tiny_audio_llm, noise):
    model, (waveforms, lengths) = tiny_audio_llm("llama", ctc=True), noise([0.9, 0.3, 1.2, 0.5])
    make_end_likely(model.llm, by=3.0)
    config = DecodeConfig(beam_size=beam_size, nbest=beam_size, ctc_weight=ctc_weight)
    together = model.transcribe_ids(waveforms, lengths, contexts_ids=CONTEXTS, config=config)
    plain = model.transcribe_ids(waveforms, lengths, config=config)
    assert_equal([together[0], together[2]], [plain[0], plain[2]])
    for row, n in enumerate(lengths.tolist()):
        one = waveforms[row : row + 1, :n], lengths[row : row + 1]
        alone = model.transcribe_ids(*one, contexts_ids=[CONTEXTS[row]], config=config)
        assert_equal(alone, [together[row]])


def test_plain_context_search_reads_the_prompt_with_context_alone(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm("llama"), noise([0.9, 0.3, 1.2, 0.5])
    make_end_likely(model.llm, by=3.0)
    prompts = model.build_prompt(model.encode_speech(*batch), CONTEXTS)
    config = DecodeConfig(beam_size=3, context_search="plain", max_new_tokens=9)
    limits = [config.limit(seconds=n / 16000) for n in batch[1].tolist()]
    expected = decode(llm_scorer(model.llm), prompts, limits=limits, end=model.prompt_tokens.end, config=config)
    assert_equal(model.transcribe_ids(*batch, contexts_ids=CONTEXTS, config=config), expected)


@pytest.mark.parametrize("form", ["log", "prob"])
def test_a_score_is_both_halves_and_torchs_ctc_loss_by_their_weights(form, tiny_audio_llm, noise):
    model, batch = tiny_audio_llm("llama", ctc=True), noise([0.9, 0.4, 1.2, 0.7])
    make_end_likely(model.llm, by=3.0)
    config = DecodeConfig(beam_size=4, max_new_tokens=60, ctc_weight=0.3, context_alpha=2.0, context_form=form)
    found = [nbest[0] for nbest in model.transcribe_ids(*batch, contexts_ids=CONTEXTS, config=config)]
    assert all(h.ids and h.complete for h in found)
    spelled = token_bytes(model.processor.tokenizer)
    speech = model.encode_speech(*batch)
    plain, context = model.build_prompt(speech), model.build_prompt(speech, CONTEXTS)
    log_probs_BTW = model.ctc_head(speech.encoder_BTD)
    for row, h in enumerate(found):
        tokens = [*h.ids, END]
        p0, pc = (forced(model.llm, prompts[row], tokens).tolist() for prompts in (plain, context))
        free = DecodeConfig(context_alpha=2.0 if CONTEXTS[row] else 0.0, context_form=form, **OFF)
        said = sum(joint_step(a, b, free)[t] for a, b, t in zip(p0, pc, tokens))
        text = b"".join(spelled[i] for i in h.ids)
        frames = int(speech.encoder_lengths_B[row])
        ctc = torch.nn.functional.ctc_loss(
            log_probs_BTW[row, :frames, None],
            torch.tensor([list(text.removeprefix(b" "))], dtype=torch.long),
            torch.tensor([frames]),
            torch.tensor([len(text.removeprefix(b" "))]),
            blank=256,
            reduction="sum",
        )
        assert math.isclose(h.score, 0.7 * said - 0.3 * ctc.item(), abs_tol=2e-3)


def test_a_word_that_only_the_context_proposes_wins_when_it_was_said_and_only_then():
    """Without context the LLM has three other words before it, and CTC scores just two tokens."""
    tokens = TokenBytes.__new__(TokenBytes)  # 0 ends, 1 is special, 2 to 4 are the bytes 0 to 2, 5 is 0 1, 6 is 2 2
    tokens.bytes_VY = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [2, 0], [0, 1], [2, 2]])
    tokens.lengths_V = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    tokens.starts_with_space_V = torch.zeros(7, dtype=torch.bool)
    likely = {
        "plain": [-9.0, -9.0, -1.0, -1.2, -1.1, -9.0, -4.0],
        "context": [-9.0, -9.0, -9.0, -9.0, -9.0, -9.0, -0.1],
    }

    class Opinions(TableScorer):
        def next_of(self, history):
            ended = torch.full((7,), -9.0).scatter(0, torch.tensor([0]), -0.1)
            return torch.tensor(likely[history[0]]) if len(history) == 1 else ended

    def transcript(said: list[int]) -> list[int]:
        log_probs = torch.full((1, len(said), 4), -12.0)
        for frame, byte in enumerate(said):
            log_probs[0, frame, byte] = -0.01
        ctc = CTCPrefixes(log_probs, torch.tensor([len(said)]))
        gains = CTCGains(ctc, tokens=tokens, end=0, weight=0.5, candidates=2)
        config = DecodeConfig(context_prune=5.0)
        scorer = ContextScorer(Opinions(7), config=config, ctc=gains)
        ((h,),) = decode(scorer, [ContextPrompt("plain", "context")], limits=[4], end=0, config=config)
        return h.ids

    assert transcript([2, 3, 2, 3]) == [6]
    assert transcript([0, 3, 3, 3]) == [2]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"context_search": "both"}, r"decode\.context_search \('both'\) must be one of joint, plain"),
        ({"context_form": "sum"}, r"decode\.context_form \('sum'\) must be one of log, prob"),
        ({"context_alpha": -1.0}, r"decode\.context_alpha \(-1.0\)"),
        ({"context_alpha": math.nan}, r"decode\.context_alpha \(nan\)"),
        ({"context_prune": -3.0}, r"decode\.context_prune \(-3.0\)"),
        ({"context_top_k": -1}, r"decode\.context_top_k \(-1\)"),
    ],
)
def test_settings_that_cannot_be_met_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**settings)


def test_endless_settings_survive_a_saved_model(tiny_audio_llm, tmp_path):
    from dataclasses import asdict

    from seedling.model.audio_llm import AudioLLM

    model, config = tiny_audio_llm(), DecodeConfig(context_alpha=INF, context_prune=INF)
    model.config.decode = asdict(config)
    model.save_pretrained(tmp_path)
    assert AudioLLM.from_pretrained(tmp_path).decode_config == config
