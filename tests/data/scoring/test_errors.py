"""Alignment and counts against jiwer, against a plain dynamic program, and on the edges."""

import math
import random

import jiwer
import pytest

from seedling.data.scoring import ErrorCounts, align, count_errors, tokenize
from seedling.data.scoring.errors import ErrorRate, corpus_counts, count_corpus

WORDS = ["a", "b", "c", "d", "the", "cat", "sat", "mat"]


def random_pairs(count, *, seed, longest=12, vocabulary=WORDS):
    """Half of the hypotheses are unrelated to the reference, half are corrupted copies of it."""
    rng = random.Random(seed)
    for _ in range(count):
        reference = [rng.choice(vocabulary) for _ in range(rng.randint(1, longest))]
        if rng.random() < 0.5:
            hypothesis = [rng.choice(vocabulary) for _ in range(rng.randint(0, longest))]
        else:
            hypothesis = [rng.choice(vocabulary) if rng.random() < 0.2 else w for w in reference if rng.random() > 0.1]
        yield reference, hypothesis


def documented_alignment(reference, hypothesis):
    """The tie rule of errors.py, written out: common ends, then backwards deletion, substitution, insertion, match."""
    start, end = 0, 0
    while start < min(len(reference), len(hypothesis)) and reference[start] == hypothesis[start]:
        start += 1
    while end < min(len(reference), len(hypothesis)) - start and reference[-1 - end] == hypothesis[-1 - end]:
        end += 1
    ref, hyp = reference[start : len(reference) - end], hypothesis[start : len(hypothesis) - end]
    cost = [[i + j if i * j == 0 else 0 for j in range(len(hyp) + 1)] for i in range(len(ref) + 1)]
    for i in range(1, len(ref) + 1):
        for j in range(1, len(hyp) + 1):
            diagonal = cost[i - 1][j - 1] + (ref[i - 1] != hyp[j - 1])
            cost[i][j] = min(diagonal, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    i, j, middle = len(ref), len(hyp), []
    while i or j:
        if i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            middle.append(("del", ref[i], None))
        elif i and j and ref[i - 1] != hyp[j - 1] and cost[i][j] == cost[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            middle.append(("sub", ref[i], hyp[j]))
        elif j and cost[i][j] == cost[i][j - 1] + 1:
            j -= 1
            middle.append(("ins", None, hyp[j]))
        else:
            i, j = i - 1, j - 1
            middle.append(("hit", ref[i], hyp[j]))
    head = [("hit", token, token) for token in reference[:start]]
    tail = [("hit", token, token) for token in reference[len(reference) - end :]]
    return head + middle[::-1] + tail


def test_word_counts_agree_with_jiwer_on_ten_thousand_random_pairs():
    pairs = list(random_pairs(10_000, seed=1))
    for reference, hypothesis in pairs:
        peer = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        ours = count_errors(reference, hypothesis)
        assert ours == (peer.substitutions, peer.deletions, peer.insertions, peer.hits), (reference, hypothesis)
    texts = [[" ".join(tokens) for tokens in side] for side in zip(*pairs)]
    whole = corpus_counts(count_corpus(*texts, unit="word"))
    assert whole.fraction == pytest.approx(jiwer.wer(*texts), abs=1e-12)


def test_character_rate_agrees_with_jiwer():
    texts = [[" ".join(tokens) for tokens in side] for side in zip(*random_pairs(2_000, seed=2))]
    assert corpus_counts(count_corpus(*texts, unit="char")).fraction == pytest.approx(jiwer.cer(*texts), abs=1e-12)


def test_ties_are_broken_by_the_documented_rule():
    short = random_pairs(3_000, seed=3, vocabulary=["a", "b", "c"])
    long = random_pairs(20, seed=3, longest=200)
    for reference, hypothesis in [*short, *long]:
        assert align(reference, hypothesis) == documented_alignment(reference, hypothesis), (reference, hypothesis)


def test_an_alignment_spells_both_sides_and_has_the_counts_of_count_errors():
    for reference, hypothesis in random_pairs(1_000, seed=4):
        pairs = align(reference, hypothesis)
        assert [p.reference for p in pairs if p.kind != "ins"] == reference
        assert [p.hypothesis for p in pairs if p.kind != "del"] == hypothesis
        kinds = [p.kind for p in pairs]
        assert count_errors(reference, hypothesis) == tuple(kinds.count(k) for k in ("sub", "del", "ins", "hit"))


@pytest.mark.parametrize(
    "reference, hypothesis, counts",
    [
        ("", "", (0, 0, 0, 0)),
        ("", "two words", (0, 0, 2, 0)),
        ("two words", "", (0, 2, 0, 0)),
        ("one", "one", (0, 0, 0, 1)),
        ("one", "two", (1, 0, 0, 0)),
        ("a b c d", "a c d e", (0, 1, 1, 3)),
    ],
)
def test_small_cases_have_the_counts_one_finds_by_hand(reference, hypothesis, counts):
    assert count_errors(reference.split(), hypothesis.split()) == counts


def test_insertions_into_empty_references_count_in_the_corpus_rate():
    counts = corpus_counts(count_corpus(["", "a b c d"], ["x y", "a b c d"], unit="word"))
    assert counts.fraction == 2 / 4


def test_a_corpus_without_reference_tokens_has_rate_zero_or_infinity():
    assert ErrorCounts(0, 0, 0, 0).fraction == 0.0
    assert math.isinf(ErrorCounts(0, 0, 3, 0).fraction)


def test_the_corpus_rate_is_sum_over_sum_and_not_a_mean_of_rates():
    counts = corpus_counts(count_corpus(["a", "a b c d e f g h i"], ["b", "a b c d e f g h i"], unit="word"))
    assert counts.fraction == 1 / 10


def test_mixed_tokens_are_cjk_characters_and_words_between_them():
    assert tokenize("打开 BLUETOOTH 设备AB12", "mixed") == ["打", "开", "BLUETOOTH", "设", "备", "AB12"]
    assert tokenize("𠀀 カナ 한국어 don't", "mixed") == ["𠀀", "カ", "ナ", "한국어", "don't"]


def test_character_tokens_hold_one_space_between_words():
    assert tokenize("  ab \t c ", "char") == ["a", "b", " ", "c"]


def test_more_distinct_tokens_than_surrogates_do_not_collide():
    reference = [f"w{i}" for i in range(60_000)]
    assert count_errors(reference, reference[1:]) == (0, 1, 0, 59_999)


def test_an_unknown_unit_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'phone' is unknown: choose one of word, char, mixed"):
        tokenize("a", "phone")


def test_a_rate_prints_as_the_line_that_scripts_grep():
    assert str(ErrorRate("wer", ErrorCounts(1569, 165, 215, 50842))) == (
        "%WER 3.71 [ 1949 / 52576, 215 ins, 165 del, 1569 sub ]"
    )
