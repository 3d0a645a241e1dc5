"""Decoding against a forward pass, against transformers, and against itself in other batches."""

import itertools
import math
import random

import pytest
import torch
from random_llms import END, make_end_likely, prompts_of
from table_scorer import TableScorer, forbidding
from transformers import GenerationConfig

from seedling.model.ctc_prefix import token_bytes
from seedling.model.decoding import DecodeConfig, Hypothesis, decode
from seedling.model.llm_scorer import llm_scorer

FAMILIES = ["qwen2", "qwen3", "llama", "mixtral", "qwen3_moe", "gemma2"]


def search(llm, prefixes, *, limits: list[int] | None = None, **config) -> list[list[Hypothesis]]:
    config = DecodeConfig(**config)
    limits = limits or [config.max_new_tokens or 448] * len(prefixes)
    return decode(llm_scorer(llm), prefixes, limits=limits, end=END, config=config)


@torch.no_grad()
def forced_score(llm, prefix: torch.Tensor, hypothesis: Hypothesis) -> float:
    """The log-probability of a hypothesis from one forward pass without a cache."""
    targets = hypothesis.ids + [END] * hypothesis.complete
    embeddings = torch.cat([prefix, llm.get_input_embeddings()(torch.tensor(targets[:-1], dtype=torch.long))])
    log_probs = llm(inputs_embeds=embeddings[None]).logits[0].float().log_softmax(-1)
    return sum(log_probs[len(prefix) - 1 + i, token].item() for i, token in enumerate(targets))


@torch.no_grad()
def transformers_beams(llm, prefix: torch.Tensor, **settings) -> list[tuple[list[int], float]]:
    out = llm.generate(
        inputs_embeds=prefix[None],
        attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
        generation_config=GenerationConfig(
            eos_token_id=END,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        ),
    )
    rows = []
    for ids in out.sequences.tolist():
        ended = END in ids
        rows.append(ids[: ids.index(END)] if ended else ids)
    return list(zip(rows, out.sequences_scores.tolist()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_scores_are_those_of_a_forward_pass(family, beam_size, tiny_llm):
    llm = tiny_llm(family)
    make_end_likely(llm, by=3.0 if family != "gemma2" else 8.0)
    prefixes = prompts_of(llm, [9, 4, 14])
    for prefix, nbest in zip(prefixes, search(llm, prefixes, beam_size=beam_size, nbest=beam_size, max_new_tokens=12)):
        assert len(nbest) == beam_size
        for h in nbest:
            assert math.isclose(h.score, forced_score(llm, prefix, h), abs_tol=2e-3), h
            assert math.isclose(h.rank_score, h.score / (len(h.ids) + h.complete), rel_tol=1e-6)
        assert [h.rank_score for h in nbest] == sorted((h.rank_score for h in nbest), reverse=True)


STOPS = {"likely": False, "first": True, "never": "never"}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
def test_beam_search_equals_that_of_transformers(family, stop, length_penalty, tiny_llm):
    ended = 0
    for seed, (beam_size, max_new_tokens) in enumerate(itertools.product([2, 5], [1, 6, 20])):
        llm = tiny_llm(family, seed=seed)
        make_end_likely(llm, by=2.0 + seed)
        prefixes = prompts_of(llm, [5, 12, 8], seed=seed)
        settings = {"max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
        ours = search(llm, prefixes, beam_size=beam_size, nbest=beam_size, stop=stop, **settings)
        for prefix, nbest in zip(prefixes, ours):
            theirs = transformers_beams(
                llm, prefix, num_beams=beam_size, num_return_sequences=beam_size, early_stopping=STOPS[stop], **settings
            )
            theirs = [(ids, score) for ids, score in theirs if score > -1e8]  # places that were never taken
            assert [h.ids for h in nbest] == [ids for ids, _ in theirs], f"seed {seed}"
            for h, (_, score) in zip(nbest, theirs):
                assert math.isclose(h.rank_score, score, abs_tol=1e-3)
            ended += sum(h.complete for h in nbest)
    assert ended > 20, "the comparison must see finished hypotheses"


def test_greedy_equals_that_of_transformers(tiny_llm):
    for seed in range(4):
        llm = tiny_llm("qwen2", seed=seed)
        make_end_likely(llm, by=3.0)
        prefixes = prompts_of(llm, [5, 12, 8, 20], seed=seed)
        for prefix, (h,) in zip(prefixes, search(llm, prefixes, max_new_tokens=15)):
            ids = llm.generate(
                inputs_embeds=prefix[None],
                attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
                generation_config=GenerationConfig(eos_token_id=END, pad_token_id=0, max_new_tokens=15),
            )[0].tolist()
            assert h.ids + [END] * h.complete == ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beam_size", [1, 4])
def test_the_text_of_an_utterance_does_not_depend_on_its_batch(family, beam_size, tiny_llm):
    llm = tiny_llm(family)
    make_end_likely(llm, by=3.0 if family != "gemma2" else 8.0)
    prefixes = prompts_of(llm, [3, 17, 9, 9, 1, 30, 12, 5])
    limits = [12, 4, 9, 12, 12, 7, 1, 12]
    config = {"beam_size": beam_size, "nbest": beam_size}
    alone = [search(llm, [p], limits=[n], **config)[0] for p, n in zip(prefixes, limits)]
    rng = random.Random(0)
    for _ in range(6):
        mix = rng.sample(range(8), k=rng.randint(2, 8))
        together = search(llm, [prefixes[i] for i in mix], limits=[limits[i] for i in mix], **config)
        assert [[h.ids for h in nbest] for nbest in together] == [[h.ids for h in alone[i]] for i in mix], mix


def test_the_text_of_speech_does_not_depend_on_its_batch(tiny_audio_llm, noise):
    model, (waveforms, lengths) = tiny_audio_llm("qwen3", ctc=True), noise([0.9, 0.3, 1.6, 0.5])
    make_end_likely(model.llm, by=3.0)
    contexts = [None, [40, 41], None, [42]]
    for config in (
        DecodeConfig(),
        DecodeConfig(beam_size=3, nbest=3),
        DecodeConfig(beam_size=3, nbest=3, ctc_weight=0.4),
        DecodeConfig(ctc_weight=0.4),
    ):
        together = model.transcribe_ids(waveforms, lengths, contexts_ids=contexts, config=config)
        for row, n in enumerate(lengths.tolist()):
            (alone,) = model.transcribe_ids(
                waveforms[row : row + 1, :n], lengths[row : row + 1], contexts_ids=[contexts[row]], config=config
            )
            assert [h.ids for h in alone] == [h.ids for h in together[row]]


def test_a_joint_score_is_the_llms_and_torchs_ctc_loss_by_their_weights(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm("llama", ctc=True), noise([0.9, 0.4, 1.2])
    make_end_likely(model.llm, by=3.0)
    config = DecodeConfig(beam_size=4, max_new_tokens=60, ctc_weight=0.3)
    found = [nbest[0] for nbest in model.transcribe_ids(*batch, config=config)]
    assert all(h.ids and h.complete for h in found)
    spelled = token_bytes(model.processor.tokenizer)
    with torch.no_grad():
        out = model(*batch, [h.ids for h in found])
        speech = model.encode_speech(*batch)
        log_probs_BTW = model.ctc_head(speech.encoder_BTD)
    for row, h in enumerate(found):
        text = b"".join(spelled[i] for i in h.ids)
        text = text[1:] if text[:1] == b" " else text
        frames = int(speech.encoder_lengths_B[row])
        ctc = torch.nn.functional.ctc_loss(
            log_probs_BTW[row, :frames, None],
            torch.tensor([list(text)], dtype=torch.long),
            torch.tensor([frames]),
            torch.tensor([len(text)]),
            blank=256,
            reduction="sum",
        )
        expected = -0.7 * out.nll_N[out.rows_N == row].sum().item() - 0.3 * ctc.item()
        assert math.isclose(h.score, expected, abs_tol=2e-3)


def test_the_score_of_decoding_is_minus_the_loss_of_training(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm("mixtral"), noise([0.9, 0.4, 1.2])
    make_end_likely(model.llm, by=6.0)
    best = [nbest[0] for nbest in model.transcribe_ids(*batch, config=DecodeConfig(beam_size=4, max_new_tokens=30))]
    assert all(h.complete for h in best)
    with torch.no_grad():
        out = model(*batch, [h.ids for h in best])
    for row, h in enumerate(best):
        assert math.isclose(h.score, -out.nll_N[out.rows_N == row].sum().item(), abs_tol=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_as_wide_as_the_search_space_finds_what_enumeration_finds(seed):
    """4 tokens, at most 4 of them: 3 + 9 + 27 beams at most, so a beam of 81 leaves nothing out."""
    limit, scorer = 4, TableScorer(4)
    everything = []
    for length in range(1, limit + 1):
        for tokens in itertools.product(range(4), repeat=length):
            if END in tokens[:-1] or (tokens[-1] != END and length < limit):
                continue
            score = sum(scorer.next_of((seed, *tokens[:i]))[token].item() for i, token in enumerate(tokens))
            everything.append((score, [t for t in tokens if t != END]))
    everything.sort(reverse=True)
    config = DecodeConfig(beam_size=81, nbest=81, context_top_k=0, length_penalty=0.0, stop="never")
    (nbest,) = decode(scorer, [seed], limits=[limit], end=END, config=config)
    assert [h.ids for h in nbest] == [ids for _, ids in everything[:81]]
    assert all(math.isclose(h.score, score, abs_tol=1e-5) for h, (score, _) in zip(nbest, everything))


def test_finished_utterances_leave_the_batch():
    for beam_size, width in ((1, 1), (3, 3)):
        scorer = TableScorer(50)
        scorer.next_of = lambda history: (
            torch.full((50,), 0.01)
            .scatter(0, torch.tensor([END if len(history) > history[0] else 2 + len(history)]), 9.0)
            .log_softmax(-1)
        )
        out = decode(scorer, [1, 4, 2], limits=[9] * 3, end=END, config=DecodeConfig(beam_size=beam_size, stop="first"))
        assert [len(nbest[0].ids) for nbest in out] == [1, 4, 2]
        assert scorer.rows_seen[0] == 3, "one row an utterance for the prefix"
        assert scorer.rows_seen[-1] == width, "the longest utterance is alone in the end"
        assert scorer.rows_seen[1:] == sorted(scorer.rows_seen[1:], reverse=True)


def test_limits_hold_per_utterance_and_mark_what_was_cut(tiny_llm):
    llm = tiny_llm()
    make_end_likely(llm, by=-1e4)
    for beam_size in (1, 3):
        out = search(llm, prompts_of(llm, [4, 6, 5]), limits=[3, 11, 1], beam_size=beam_size)
        assert [len(nbest[0].ids) for nbest in out] == [3, 11, 1]
        assert not any(nbest[0].complete for nbest in out)


def test_the_limit_grows_with_the_seconds_up_to_the_maximum():
    config = DecodeConfig(max_new_tokens=100, max_tokens_per_second=8.0, extra_tokens=5)
    assert [config.limit(seconds=s) for s in (0.0, 1.01, 5.0, 60.0)] == [5, 14, 45, 100]
    assert DecodeConfig(max_tokens_per_second=8.0, extra_tokens=5).limit(seconds=300.0) == 2405


def test_more_than_448_tokens_come_out_of_long_audio(tiny_audio_llm):
    model = tiny_audio_llm()
    make_end_likely(model.llm, by=-1e4)
    ((h,),) = model.transcribe_ids(0.1 * torch.ones(1, 320000), torch.tensor([320000]))
    assert len(h.ids) == 20 * 25 + 10 and not h.complete


def test_silence_cannot_ramble(tiny_audio_llm):
    model = tiny_audio_llm()
    make_end_likely(model.llm, by=-1e4)
    config = DecodeConfig(max_tokens_per_second=4.0, extra_tokens=2)
    ((h,),) = model.transcribe_ids(torch.zeros(1, 32000), torch.tensor([32000]), config=config)
    assert len(h.ids) == 10


def test_the_repetition_guard_is_off_by_default_and_stops_phrases_when_on():
    def likes(*phrase):
        scorer = TableScorer(20)
        scorer.next_of = lambda history: (
            torch.full((20,), 0.0)
            .scatter(0, torch.tensor([phrase[(len(history) - 1) % len(phrase)]]), 9.0)
            .log_softmax(-1)
        )
        return scorer

    for beam_size in (1, 2):
        free, guarded = (DecodeConfig(beam_size=beam_size, max_repeats=n) for n in (0, 2))
        assert decode(likes(5, 6), [0], limits=[12], end=END, config=free)[0][0].ids == [5, 6] * 6
        ids = decode(likes(5, 6), [0], limits=[12], end=END, config=guarded)[0][0].ids
        assert ids[:5] == [5, 6, 5, 6, 5] and ids[5:6] != [6]
        assert decode(likes(5), [0], limits=[12], end=END, config=guarded)[0][0].ids[:3] != [5, 5, 5]


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_forbidden_tokens_are_never_emitted_and_no_hypothesis_is_impossible(beam_size):
    def forbidden(history):
        return random.Random(repr(history)).sample(range(6), k=5)  # one token is left: one path through the tree

    scorer = forbidding(TableScorer(6), forbidden)
    config = DecodeConfig(beam_size=beam_size, nbest=beam_size)
    for nbest in decode(scorer, list(range(12)), limits=[9] * 12, end=END, config=config):
        ((ids, score, complete),) = [(h.ids, h.score, h.complete) for h in nbest]
        assert math.isfinite(score)
        assert complete or len(ids) == 9


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_utterance_that_nothing_may_follow_is_over_at_once_with_what_it_has(beam_size, steps):
    def forbidden(history):
        return range(30) if history[0] == "stuck" and len(history) > steps else [END]

    scorer = forbidding(TableScorer(30), forbidden)
    config = DecodeConfig(beam_size=beam_size, nbest=beam_size)
    stuck, free = decode(scorer, ["stuck", "free"], limits=[8, 8], end=END, config=config)
    assert len(stuck) == (beam_size if steps else 1)
    assert all(len(h.ids) == steps and not h.complete and math.isfinite(h.score) for h in stuck)
    assert [h.score for h in stuck] == sorted((h.score for h in stuck), reverse=True)
    assert len(free[0].ids) == 8
    assert scorer.rows_seen[steps + 1] == beam_size, "the stuck utterance has left the batch"


def test_what_has_finished_stands_when_nothing_may_follow_the_other_beams():
    def forbidden(history):
        return range(30) if len(history) == 3 else [i for i in range(30) if i not in (END, 5, 6)]

    config = DecodeConfig(beam_size=3, nbest=3)
    (nbest,) = decode(forbidding(TableScorer(30), forbidden), [0], limits=[8], end=END, config=config)
    assert nbest and all(h.complete and len(h.ids) <= 1 for h in nbest)


def test_more_beams_than_tokens_is_no_accident():
    config = DecodeConfig(beam_size=10, nbest=10)
    (nbest,) = decode(TableScorer(3), [7], limits=[2], end=END, config=config)
    assert len(nbest) == 1 + 2 * 3  # the end at once, or one of two others and then anything
    assert len({tuple(h.ids + [END] * h.complete) for h in nbest}) == 7


def test_generate_gives_rows_of_ids_for_batch_decode(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(), noise([0.9, 0.4])
    make_end_likely(model.llm, by=4.0)
    settings = {"max_new_tokens": 12, "length_penalty": 0.0}
    ids = model.generate(*batch, num_beams=3, num_return_sequences=2, **settings)
    nbest = model.transcribe_ids(*batch, config=DecodeConfig(beam_size=3, nbest=2, **settings))
    flat = [h for hypotheses in nbest for h in hypotheses]
    assert ids.shape[0] == 4
    assert model.processor.batch_decode(ids) == model.processor.batch_decode([h.ids for h in flat])


def test_decoding_in_training_mode_is_refused(tiny_audio_llm, noise):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        tiny_audio_llm().train().transcribe_ids(*noise([0.5]))


def test_settings_that_cannot_be_met_are_named():
    with pytest.raises(ValueError, match=r"decode\.nbest \(3\).*beam_size \(2\)"):
        DecodeConfig(beam_size=2, nbest=3)
    with pytest.raises(ValueError, match=r"decode\.max_new_tokens \(-1\)"):
        DecodeConfig(max_new_tokens=-1)
    with pytest.raises(ValueError, match=r"decode\.stop \('soon'\)"):
        DecodeConfig(stop="soon")
