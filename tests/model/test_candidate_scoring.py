"""Candidates scored together have the log-probabilities and the gradient of one forward pass each."""

import itertools
import math
import random

import pytest
import torch
from random_llms import make_end_likely
from torch import Tensor, nn

from seedling.model.audio_llm import AudioLLM
from seedling.model.augment import SpecAugmentConfig
from seedling.model.candidate_scoring import PROMPT, Scored, TokenTree, score_candidates
from seedling.model.decoding import DecodeConfig, Hypothesis
from seedling.model.llm_scorer import llm_scorer
from seedling.model.prompt import PromptConfig
from seedling.model.sampling import sample

TREES = ["qwen2", "qwen3", "llama", "mixtral", "qwen3_moe"]
SECONDS = [0.9, 0.31, 1.4, 0.6]
GIVEN = {"contexts_ids": [None, [40, 41, 42], [43], []], "languages": [None, "de", "en", None]}


def cut(ids: list[int]) -> Hypothesis:
    return Hypothesis(ids, complete=False)


CANDIDATES = [
    [Hypothesis([10, 11, 12]), Hypothesis([10, 11]), cut([10, 11, 12]), Hypothesis([10, 13, 12]), cut([7, 11])],
    [],
    [Hypothesis(), cut([]), Hypothesis([14, 15, 16, 17, 18]), Hypothesis([14, 15, 9]), cut([14]), Hypothesis([14])],
    [Hypothesis([20, 21, 22]), Hypothesis([20, 21, 22])],
]
WEIGHTS = torch.linspace(-1.0, 1.4, sum(map(len, CANDIDATES)), dtype=torch.float64)


@pytest.fixture
def recogniser(tiny_audio_llm):
    """make(family, dtype) -> AudioLLM that knows languages and masks nothing"""

    def make(family: str = "llama", *, dtype: torch.dtype = torch.float32, **arguments) -> AudioLLM:
        prompts = PromptConfig(languages={"en": "English", "de": "German"}, after=" text:")
        model = tiny_audio_llm(family, prompts=prompts, specaugment=SpecAugmentConfig(0, num_freq_masks=0), **arguments)
        if dtype == torch.float64:
            model.double()
            compute_in_float64(model.llm)
        return model

    return make


def compute_in_float64(llm: nn.Module) -> None:
    """The norms of transformers round to float32 inside, and its fast experts take no float64."""
    llm.set_experts_implementation("eager")
    for name, module in list(llm.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            parent, _, attribute = name.rpartition(".")
            setattr(llm.get_submodule(parent), attribute, norm)


def one_by_one(model: AudioLLM, batch: tuple[Tensor, Tensor], candidates=CANDIDATES) -> list[list[Tensor]]:
    """The log-probabilities of each candidate's tokens, from a whole forward pass for the first of every utterance,
    one for the second, and so on."""
    found = [[] for _ in candidates]
    for nth in range(max(map(len, candidates))):
        chosen = [of_one[nth] if nth < len(of_one) else Hypothesis() for of_one in candidates]
        out = model(*batch, [h.ids for h in chosen], **GIVEN, return_logits=True)
        log_probs_NV = out.logits_NV.log_softmax(-1)
        for row, h in enumerate(chosen):
            if nth < len(candidates[row]):
                targets = [*h.ids, *[model.prompt_tokens.end] * h.complete]
                found[row].append(log_probs_NV[out.rows_N == row][range(len(targets)), targets])
    return found


def tokens_of(scored: Scored) -> list[Tensor]:
    return [log_probs_T[mask_T] for log_probs_T, mask_T in zip(scored.log_probs_MT, scored.mask_MT)]


def gradients(model: AudioLLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def scored(model: AudioLLM, batch: tuple[Tensor, Tensor], candidates=CANDIDATES, **settings) -> Scored:
    return score_candidates(model, model.encode_speech(*batch), candidates, **(GIVEN | settings))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error, size = (found[name] - gradient).norm(), gradient.norm()
        assert error <= rtol[name.split(".")[0]] * (size + 1e-6), f"{name}: {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("family", TREES)
def test_log_probs_and_gradients_are_those_of_a_forward_pass_for_each_candidate(family, trees, recogniser, noise):
    model, batch = recogniser(family, dtype=torch.float64), noise(SECONDS)
    together = scored(model, batch, trees=trees)
    expected = list(itertools.chain(*one_by_one(model, batch)))
    assert together.log_probs_MT.dtype == torch.float64
    for m, (own, alone) in enumerate(zip(tokens_of(together), expected, strict=True)):
        torch.testing.assert_close(own, alone, rtol=0, atol=1e-10, msg=lambda text, m=m: f"candidate {m}: {text}")
    found = gradients(model, together.sums_M @ WEIGHTS)
    expected = gradients(model, torch.stack([alone.sum() for alone in expected]) @ WEIGHTS)
    # The encoder's convolutions and the routers of mixtures round to float32 inside, and their gradients with it.
    after_routers = 1e-6 if family in ("mixtral", "qwen3_moe") else 1e-10
    assert_same_gradients(found, expected, rtol={"encoder": 1e-6, "converter": after_routers, "llm": after_routers})


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("family", TREES)
def test_in_float32_they_are_those_of_forward_passes_to_5_digits(family, trees, recogniser, noise):
    model, batch = recogniser(family), noise(SECONDS)
    together = scored(model, batch, trees=trees)
    expected = list(itertools.chain(*one_by_one(model, batch)))
    assert together.log_probs_MT.dtype == torch.float32
    torch.testing.assert_close(torch.cat(tokens_of(together)), torch.cat(expected), rtol=1e-5, atol=2e-5)
    found = gradients(model, together.sums_M @ WEIGHTS.float())
    expected = gradients(model, torch.stack([alone.sum() for alone in expected]) @ WEIGHTS.float())
    assert_same_gradients(found, expected, rtol={"encoder": 1e-3, "converter": 1e-3, "llm": 1e-3})


def test_minus_the_sum_is_the_loss_of_training(recogniser, noise):
    model, batch = recogniser(), noise(SECONDS)
    candidates = [[Hypothesis([10, 11])], [Hypothesis()], [Hypothesis([14, 15, 16])], [Hypothesis([20])]]
    with torch.no_grad():
        sums_M = scored(model, batch, candidates).sums_M
        loss_sum = model(*batch, [of_one[0].ids for of_one in candidates], **GIVEN).loss_sum
    torch.testing.assert_close(-sums_M.sum(), loss_sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_llms_that_take_no_trees_or_change_their_logits_after_the_head_are_scored_too(family, recogniser, noise):
    """Gemma's windows of 8 positions leave a row for each candidate; Cohere takes trees. Both do more than the head."""
    model, batch = recogniser(family), noise(SECONDS)
    together = scored(model, batch)
    expected = list(itertools.chain(*one_by_one(model, batch)))
    torch.testing.assert_close(torch.cat(tokens_of(together)), torch.cat(expected), rtol=1e-5, atol=2e-5)
    found = gradients(model, together.sums_M @ WEIGHTS.float())
    expected = gradients(model, torch.stack([alone.sum() for alone in expected]) @ WEIGHTS.float())
    assert_same_gradients(found, expected, rtol={"encoder": 1e-3, "converter": 1e-3, "llm": 1e-3})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trees_and_rows_agree_on_random_lists(attention, recogniser, noise):
    model, batch, rng = recogniser("qwen3"), noise(SECONDS), random.Random(0)
    model.llm.set_attn_implementation(attention)
    with torch.no_grad():
        speech = model.encode_speech(*batch)
        for _ in range(6):
            candidates = [
                [Hypothesis(rng.choices([5, 6], k=rng.randrange(9)), complete=rng.random() < 0.7) for _ in range(n)]
                for n in rng.choices(range(9), k=4)
            ]
            packed, apart = (
                score_candidates(model, speech, candidates, trees=trees, **GIVEN) for trees in (True, False)
            )
            torch.testing.assert_close(packed, apart, rtol=1e-5, atol=2e-5)


def test_candidates_are_in_the_order_given_and_the_mask_covers_their_tokens_and_end(recogniser, noise):
    out = scored(recogniser(), noise(SECONDS))
    assert out.owner_M.tolist() == [0] * 5 + [2] * 6 + [3] * 2
    lengths = [len(h.ids) + h.complete for h in itertools.chain(*CANDIDATES)]
    assert out.mask_MT.shape == (13, 6)
    assert out.mask_MT.tolist() == [[column < length for column in range(6)] for length in lengths]
    assert not out.log_probs_MT[~out.mask_MT].any() and (out.log_probs_MT[out.mask_MT] < 0).all()
    assert torch.equal(out.sums_M[11], out.sums_M[12]), "the same transcript twice"
    assert out.sums_M[6] == 0, "nothing was said, and it did not end"


def test_the_scores_of_an_utterance_do_not_depend_on_its_batch(recogniser, noise):
    model, (waveforms, lengths) = recogniser("qwen2"), noise(SECONDS)
    with torch.no_grad():
        together = scored(model, (waveforms, lengths))
        for row, of_one in enumerate(CANDIDATES):
            one = waveforms[row : row + 1, : lengths[row]], lengths[row : row + 1]
            alone = scored(model, one, [of_one], **{name: [values[row]] for name, values in GIVEN.items()})
            torch.testing.assert_close(alone.sums_M, together.sums_M[together.owner_M == row], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("trees", [True, False])
def test_what_stands_in_the_padding_changes_nothing(trees, recogniser, noise):
    model, batch = recogniser(), noise(SECONDS)
    speech = model.encode_speech(*batch)
    dirty_BSL = speech.speech_BSL.detach().clone()
    for row, length in enumerate(speech.lengths_B.tolist()):
        dirty_BSL[row, length:] = float("nan")
    clean, dirty = (
        score_candidates(model, speech._replace(speech_BSL=speech_BSL), CANDIDATES, trees=trees, **GIVEN)
        for speech_BSL in (speech.speech_BSL, dirty_BSL)
    )
    assert torch.equal(clean.log_probs_MT, dirty.log_probs_MT)


def test_a_candidate_changes_nothing_for_the_others(recogniser, noise):
    model, batch = recogniser(), noise(SECONDS[:1])
    few = [Hypothesis([5, 6, 7]), Hypothesis([5, 8])]
    more = [Hypothesis([5, 9]), Hypothesis([5, 6, 7, 8, 9]), *few, Hypothesis([6, 8])]
    with torch.no_grad():
        speech = model.encode_speech(*batch)
        alone, among = (score_candidates(model, speech, [candidates]).sums_M for candidates in (few, more))
    torch.testing.assert_close(among[2:4], alone, rtol=1e-5, atol=1e-5)


def test_no_candidates_at_all_are_no_accident(recogniser, noise):
    """The LLM runs all the same: where its weights are spread over ranks, the others wait for each layer."""
    model, batch, calls = recogniser(), noise(SECONDS), []
    model.llm.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    for trees in (True, False):
        out = scored(model, batch, [[], [], [], []], trees=trees)
        assert out.log_probs_MT.shape == out.mask_MT.shape == (0, 0) and out.owner_M.shape == (0,)
        found = gradients(model, out.sums_M.sum())
        assert found and not any(gradient.any() for gradient in found.values())
    assert len(calls) == 2


def test_encoder_and_prompt_run_once_and_the_head_where_something_is_predicted(recogniser, noise):
    model, batch = recogniser(), noise(SECONDS)
    seen = {"encoder": [], "llm": [], "head": []}
    model.encoder.register_forward_hook(lambda m, args, out: seen["encoder"].append(len(out[0])))
    model.llm.get_decoder().layers[0].register_forward_hook(lambda m, args, out: seen["llm"].append(out.shape[:2]))
    model.llm.get_output_embeddings().register_forward_hook(lambda m, args, out: seen["head"].append(len(out)))
    speech = model.encode_speech(*batch)
    _, prompts = model.embed(speech, **GIVEN, transcripts_ids=[[]] * 4)
    score_candidates(model, speech, CANDIDATES, **GIVEN)
    # Tokens that something follows: 10 11 12, 13 12 behind 10, 7; 14 to 18, 9 behind 15; 20 21 22.
    nodes = {0: 6, 2: 6, 3: 3}
    assert seen["encoder"] == [4]
    assert seen["llm"] == [(3, max(prompts[row] + count for row, count in nodes.items()))]
    # Once for each token that follows something: of 0 two behind the prompt, two behind 10, 12 or the end behind 10 11,
    # one each behind 10 11 12, 10 13, 10 13 12 and 7; a node with two followers counts twice.
    assert seen["head"] == [sum({0: 10, 2: 10, 3: 4}.values())]


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_spells_every_sequence_and_has_no_prefix_twice(seed):
    rng = random.Random(seed)
    sequences = [rng.choices(range(3), k=rng.randrange(7)) for _ in range(12)]
    tree = TokenTree(sequences)
    branches, seen = list(tree.branches), tree.seen()
    for sequence, taken in zip(sequences, tree.taken):
        assert [branches[branch][1] for branch in taken] == sequence
        for length, branch in enumerate(taken):
            node = branches[branch][0]
            path = seen[node].nonzero()[:, 0].tolist() if node != PROMPT else []
            assert [tree.tokens[n] for n in path] == sequence[:length], "a node sees its own beginning"
            assert [tree.depths[n] for n in path] == [*range(length)]
    prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(tree.branches) == len(prefixes)
    assert len(tree.tokens) == len({prefix for prefix in prefixes if any(p[:-1] == prefix for p in prefixes)})
    assert not tree.is_chain and TokenTree([[4, 5, 6], [4, 5]]).is_chain


def test_beam_search_scores_what_it_finds_alike(recogniser, noise):
    model, batch = recogniser("qwen3"), noise(SECONDS)
    make_end_likely(model.llm, by=3.0)
    config = DecodeConfig(beam_size=6, nbest=6, max_new_tokens=7, context_search="plain")
    nbests = model.transcribe_ids(*batch, config=config, **GIVEN)
    with torch.no_grad():
        sums_M = scored(model, batch, nbests).sums_M
    found = list(itertools.chain(*nbests))
    assert len(found) == 24 and {h.complete for h in found} == {True, False}
    for h, score in zip(found, sums_M.tolist()):
        assert math.isclose(h.score, score, abs_tol=1e-3), h


def test_samples_are_scored_as_they_were_drawn(recogniser, noise):
    model, batch = recogniser("qwen2"), noise(SECONDS)
    make_end_likely(model.llm, by=4.0)
    with torch.no_grad():
        speech = model.encode_speech(*batch)
        settings = {
            "limits": [9, 4, 12, 6],
            "end": model.prompt_tokens.end,
            "num": 5,
            "temperature": 1.3,
            "top_p": 0.95,
        }
        generator = torch.Generator().manual_seed(0)
        drawn = sample(llm_scorer(model.llm), model.build_prompt(speech, **GIVEN), generator=generator, **settings)
        sums_M = score_candidates(model, speech, drawn, **GIVEN).sums_M
    found = list(itertools.chain(*drawn))
    assert len(found) == 20 and {h.complete for h in found} == {True, False}
    torch.testing.assert_close(sums_M, torch.tensor([h.score for h in found]), rtol=0, atol=1e-3)


def test_training_mode_without_dropout_scores_as_evaluation_mode_does(recogniser, noise):
    model, batch = recogniser(), noise(SECONDS)
    with torch.no_grad():
        expected = scored(model, batch).log_probs_MT
        model.train()
        assert torch.equal(scored(model, batch).log_probs_MT, expected)


@pytest.mark.parametrize("trees", [True, False])
def test_the_gradient_reaches_the_encoder_through_a_frozen_llm(trees, recogniser, noise):
    model, batch = recogniser("llama"), noise(SECONDS)
    free = gradients(model, scored(model, batch, trees=trees).sums_M @ WEIGHTS.float())
    model.train()
    model.llm.requires_grad_(False)
    model.llm.config.attention_dropout = 0.5
    for layer in model.llm.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5  # must stay off: what is frozen is in evaluation mode
    frozen = gradients(model, scored(model, batch, trees=trees).sums_M @ WEIGHTS.float())
    assert {name.split(".")[0] for name in frozen} == {"encoder", "converter"}
    assert_same_gradients(frozen, {n: free[n] for n in frozen}, rtol={"encoder": 1e-4, "converter": 1e-4})
    assert all(gradient.any() for name, gradient in frozen.items() if name.startswith("converter."))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("trees", [True, False])
def test_recomputing_activations_of_the_llm_changes_no_gradient(trees, recogniser, noise):
    model, batch = recogniser("qwen2").train(), noise(SECONDS)
    stored = gradients(model, scored(model, batch, trees=trees).sums_M @ WEIGHTS.float())
    model.llm.gradient_checkpointing_enable()
    runs = []
    model.llm.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    recomputed = gradients(model, scored(model, batch, trees=trees).sums_M @ WEIGHTS.float())
    assert len(runs) == 2, "nothing was recomputed"
    assert_same_gradients(recomputed, stored, rtol=dict.fromkeys(("encoder", "converter", "llm"), 1e-5))


@pytest.mark.parametrize("whole", [False, True])
def test_bfloat16_scores_are_near_and_their_gradients_finite(whole, recogniser, noise):
    model, batch = recogniser("qwen3"), noise(SECONDS)
    exact = scored(model, batch).sums_M.detach()
    (model if whole else model.llm).bfloat16()
    for trees in (True, False):
        out = scored(model, batch, trees=trees)
        assert out.log_probs_MT.dtype == torch.float32
        torch.testing.assert_close(out.sums_M, exact, rtol=0.1, atol=0.5)
        found = gradients(model, out.sums_M @ WEIGHTS.float())
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert all(found[name].any() for name, _ in model.named_parameters() if name.startswith("converter."))


def test_a_wrong_number_of_lists_contexts_or_languages_is_named(recogniser, noise):
    model, batch = recogniser(), noise(SECONDS)
    with pytest.raises(ValueError, match="4 utterances need as many lists of candidates, found 3"):
        scored(model, batch, CANDIDATES[:3])
    with pytest.raises(ValueError, match="4 utterances need as many contexts, found 2"):
        scored(model, batch, contexts_ids=[None, [4]])
    with pytest.raises(ValueError, match="4 utterances need as many languages, found 1"):
        scored(model, batch, languages=["en"])
