"""Weighted errors against plain ones, against a plain dynamic program, and what must hold of any weights."""

import random
from functools import cache

import pytest

from seedling.data.scoring import count_errors, tokenize
from seedling.data.scoring.phrases import phrase_of
from seedling.data.scoring.weighted import Keywords, WeightedErrors, compare_weighted, keyword_errors, weighted_errors

WORDS = ("the", "of", "cat", "sat", "ann", "lee", "marc", "rings")
WEIGHTS = (1.0, 1.1, 2.5, 5.0)


def spoilt(tokens, draws, words=WORDS):
    """Half of the time a copy with some errors, else something unrelated."""
    if draws.random() < 0.5:
        return draws.choices(words, k=draws.randint(0, len(tokens) + 2))
    return [draws.choice(words) if draws.random() < 0.2 else token for token in tokens if draws.random() > 0.1]


def pairs(count, *, seed, longest=12, words=WORDS):
    draws = random.Random(seed)
    for _ in range(count):
        reference = draws.choices(words, k=draws.randint(0, longest))
        yield reference, spoilt(reference, draws, words)


def weigh(tokens, *, seed):
    return random.Random(seed).choices(WEIGHTS, k=len(tokens))


def written_out(reference, hypothesis, deleted, inserted):
    """The definition, as a recursion from the end over delete, insert, and match or substitute."""

    @cache
    def cost(i, j):
        options = [0.0] if i == j == 0 else []
        if i:
            options.append(cost(i - 1, j) + deleted[i - 1])
        if j:
            options.append(cost(i, j - 1) + inserted[j - 1])
        if i and j:
            same = reference[i - 1] == hypothesis[j - 1]
            options.append(cost(i - 1, j - 1) + (0.0 if same else deleted[i - 1]))
        return min(options)

    return cost(len(reference), len(hypothesis))


def judge(reference, hypothesis, *keywords, unit="word", weight=5.0) -> WeightedErrors:
    (found,) = keyword_errors(
        reference, [hypothesis], keywords=Keywords(map(phrase_of, keywords)), unit=unit, weight=weight
    )
    return found


# ---- the cost


def test_weight_one_is_the_number_of_errors_on_ten_thousand_random_pairs():
    keywords = Keywords(map(phrase_of, ["ann lee", "marc", "the rings"]))
    for reference, hypothesis in pairs(10_000, seed=1):
        texts = " ".join(reference), [" ".join(hypothesis)]
        (found,) = keyword_errors(*texts, keywords=keywords, unit="word", weight=1.0)
        errors = count_errors(reference, hypothesis).errors
        assert found == (errors, errors, len(reference)), texts


def test_all_weights_two_cost_twice_the_errors_on_ten_thousand_random_pairs():
    """Unlike a weight of one, this goes through the dynamic program."""
    draws = random.Random(2)
    for reference, _ in pairs(1_000, seed=2):
        hypotheses = [spoilt(reference, draws) for _ in range(10)]
        inserted = [[2.0] * len(hypothesis) for hypothesis in hypotheses]
        deleted = [2.0] * len(reference)
        found = compare_weighted(reference, hypotheses, reference_weights=deleted, insertion_weights=inserted)
        assert [one.cost for one in found] == [2 * count_errors(reference, h).errors for h in hypotheses]


def test_the_cost_is_the_cheapest_of_all_alignments():
    for seed, (reference, hypothesis) in enumerate(pairs(3_000, seed=3, longest=9, words=WORDS[:3])):
        deleted, inserted = weigh(reference, seed=seed), weigh(hypothesis, seed=-seed)
        found = weighted_errors(reference, hypothesis, reference_weights=deleted, insertion_weights=inserted)
        assert found == pytest.approx(written_out(reference, hypothesis, deleted, inserted), abs=1e-9)


def test_hypotheses_compared_together_cost_what_each_costs_alone():
    draws = random.Random(4)
    for seed in range(300):
        reference = draws.choices(WORDS[:4], k=draws.randint(0, 10))
        hypotheses = [draws.choices(WORDS[:4], k=draws.randint(0, 14)) for _ in range(5)] + [reference]
        deleted = weigh(reference, seed=seed)
        inserted = [weigh(hypothesis, seed=seed + n) for n, hypothesis in enumerate(hypotheses)]
        together = compare_weighted(reference, hypotheses, reference_weights=deleted, insertion_weights=inserted)
        for found, hypothesis, weights in zip(together, hypotheses, inserted):
            alone = weighted_errors(reference, hypothesis, reference_weights=deleted, insertion_weights=weights)
            assert found.cost == alone == pytest.approx(written_out(reference, hypothesis, deleted, weights), abs=1e-9)
            assert found.errors == count_errors(reference, hypothesis).errors
            assert found.of == pytest.approx(sum(deleted))


@pytest.mark.parametrize("moved", [0, 15, 60])
def test_long_texts_are_compared_exactly_near_the_diagonal_and_far_from_it(moved):
    """A block of the reference stands `moved` tokens later in the hypothesis, among a few other errors."""
    draws = random.Random(moved)
    reference = [f"w{draws.randint(0, 90)}" for _ in range(160)]
    block, rest = reference[20:50], reference[:20] + reference[50:]
    hypothesis = [w for w in rest[: 20 + moved] + block + rest[20 + moved :] if draws.random() > 0.03]
    deleted = [draws.choice((1.0, 1.0, 5.0)) for _ in reference]
    inserted = [draws.choice((1.0, 1.0, 5.0)) for _ in hypothesis]
    found = weighted_errors(reference, hypothesis, reference_weights=deleted, insertion_weights=inserted)
    assert found == written_out(reference, hypothesis, deleted, inserted)


def test_the_cheapest_alignment_need_not_be_the_plain_one():
    # By errors it is the same whether "x" and "ann" are replaced, or "ann" stays and others come and go.
    assert weighted_errors(["x", "ann"], ["ann", "y"], reference_weights=[1, 5], insertion_weights=[1, 1]) == 2
    # Here it has more errors: four against three.
    reference, hypothesis = ["ann", "b", "c"], ["x", "y", "ann"]
    assert count_errors(reference, hypothesis).errors == 3
    assert weighted_errors(reference, hypothesis, reference_weights=[5, 1, 1], insertion_weights=[1, 1, 1]) == 4


def test_where_a_word_occurs_twice_the_cheaper_one_is_the_insertion():
    found = {
        place: weighted_errors(["the"], ["the", "the"], reference_weights=[1.0], insertion_weights=weights)
        for place, weights in {"first": [5.0, 1.0], "second": [1.0, 5.0]}.items()
    }
    assert found == {"first": 1, "second": 1}


# ---- what must hold of any weights


def test_raising_the_weight_never_lowers_the_cost_and_equals_only_where_no_keyword_is_touched():
    keywords = Keywords(map(phrase_of, ["ann lee", "marc", "rings"]))
    missed = 0
    for reference, hypothesis in pairs(1_000, seed=5):
        texts = " ".join(reference), [" ".join(hypothesis)]
        costs = []
        for weight in (1.0, 1.5, 3.0, 5.0, 50.0):
            (found,) = keyword_errors(*texts, keywords=keywords, unit="word", weight=weight)
            assert found.errors <= found.cost <= weight * found.errors
            costs.append(found.cost)
        assert costs == sorted(costs), texts
        for keyword in ("marc", "rings"):
            if reference.count(keyword) > hypothesis.count(keyword):
                missed += 1
                assert costs[-1] >= 50 * (reference.count(keyword) - hypothesis.count(keyword))
                assert len(set(costs)) == len(costs), texts
    assert missed > 300


def test_nothing_costs_nothing_and_only_that():
    for seed, (reference, hypothesis) in enumerate(pairs(1_000, seed=6, longest=4, words=WORDS[:2])):
        deleted, inserted = weigh(reference, seed=seed), weigh(hypothesis, seed=-seed)
        cost = weighted_errors(reference, hypothesis, reference_weights=deleted, insertion_weights=inserted)
        assert (cost == 0) == (reference == hypothesis)
        assert cost <= sum(deleted) + sum(inserted) + 1e-9


def test_an_empty_side_costs_the_other_sides_weights():
    assert weighted_errors([], [], reference_weights=[], insertion_weights=[]) == 0
    assert weighted_errors(["a", "b"], [], reference_weights=[5.0, 1.0], insertion_weights=[]) == 6
    assert weighted_errors([], ["a", "b"], reference_weights=[], insertion_weights=[5.0, 1.0]) == 6
    assert compare_weighted(["a"], [], reference_weights=[1.0], insertion_weights=[]) == []


def test_with_one_weight_for_all_the_cost_is_a_metric():
    draws = random.Random(7)

    def cost(a, b):
        return weighted_errors(a, b, reference_weights=[3.0] * len(a), insertion_weights=[3.0] * len(b))

    for _ in range(500):
        a, b, c = (draws.choices(WORDS[:3], k=draws.randint(0, 6)) for _ in range(3))
        assert cost(a, b) == cost(b, a)
        assert cost(a, c) <= cost(a, b) + cost(b, c)


def test_equal_costs_are_equal_numbers_however_they_were_added_up():
    weights = {"reference_weights": [1.1] * 7, "insertion_weights": [[1.1] * n for n in (0, 7, 14)]}
    reference = list("abcdefg")
    hypotheses = [[], list("xxxxxxx"), list("xxxxxxxabcdefg")]
    assert [found.cost for found in compare_weighted(reference, hypotheses, **weights)] == [7.7, 7.7, 7.7]


@pytest.mark.parametrize("weight", [0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_below_one_or_without_end_is_refused(weight):
    with pytest.raises(ValueError, match=r"a token's weight is .*; it must be at least 1 and finite"):
        weighted_errors(["a"], ["b"], reference_weights=[weight], insertion_weights=[1.0])
    with pytest.raises(ValueError, match="a token's weight is"):
        weighted_errors(["a"], ["b"], reference_weights=[1.0], insertion_weights=[weight])


def test_a_weight_is_wanted_for_each_token():
    with pytest.raises(ValueError, match="1 weights for 2 tokens"):
        weighted_errors(["a", "b"], ["b"], reference_weights=[1.0], insertion_weights=[1.0])


# ---- which tokens are a keyword's


@pytest.mark.parametrize(
    "hypothesis, cost",
    [
        ("call ann lee now", 0),
        ("call anne lee now", 5),
        ("call lee now", 5),
        ("call now", 10),
        ("tell ann lee now", 1),
        ("call ann lee", 1),
        ("call ann and lee now", 1),
        ("", 12),
    ],
)
def test_errors_on_any_word_of_a_keyword_cost_its_weight(hypothesis, cost):
    assert judge("call ann lee now", hypothesis, "ann lee").cost == cost
    assert judge("call ann lee now", hypothesis, "ann lee").of == 12


def test_a_keyword_that_does_not_stand_whole_in_the_reference_has_no_weight_there():
    assert judge("call ann now", "call now", "ann lee").cost == 1
    assert judge("call hannah", "call", "ann").cost == 1


@pytest.mark.parametrize(
    "hypothesis, cost", [("lord", 5), ("of", 1), ("rings of", 6), ("lord of rings", 15), ("lords", 1)]
)
def test_an_inserted_word_costs_the_weight_if_it_is_of_a_keyword_or_its_piece(hypothesis, cost):
    assert judge("", hypothesis, "lord of rings").cost == cost


def test_beside_a_word_without_weight_an_inserted_keyword_costs_two():
    assert judge("we saw", "we saw ann", "ann").cost == 2  # "saw" put in, and the "saw" that was said replaced
    assert judge("we saw marc", "we saw ann marc", "ann", "marc").cost == 2
    assert judge("marc", "marc ann", "ann", "marc").cost == 5


def test_a_keyword_in_the_place_of_another_word_costs_what_that_word_does():
    assert judge("call him now", "call ann now", "ann").cost == 1
    assert judge("call marc now", "call ann now", "ann", "marc").cost == 5


def test_overlapping_keywords_count_all():
    assert judge("call ann lee now", "call ann lee", "ann lee", "lee now").cost == 5


@pytest.mark.parametrize("unit", ["char", "mixed"])
def test_characters_of_scripts_without_spaces_are_weighted_one_by_one(unit):
    assert judge("请打给张伟", "请打给章伟", "张伟", unit=unit).cost == 5
    assert judge("请打给张伟", "请打给", "张伟", unit=unit).cost == 10
    assert judge("请打给张伟", "请达给张伟", "张伟", unit=unit).cost == 1
    assert judge("", "张伟", "张伟", unit=unit).cost == 10
    assert judge("", "张", "张伟", unit=unit).cost == 1  # one character alone is no piece


def test_by_character_the_space_within_a_keyword_is_of_it():
    assert judge("to ann lee", "to annlee", "ann lee", unit="char").cost == 5
    assert judge("to ann lee", "toann lee", "ann lee", unit="char").cost == 1
    assert judge("to ann lee", "to ann lee", "ann lee", unit="char").of == 3 + 7 * 5


def test_by_character_a_keyword_spoilt_by_one_letter_more_costs_one():
    assert judge("to ann", "to anne", "ann", unit="char").cost == 1
    assert judge("to ann", "to an", "ann", unit="char").cost == 5


@pytest.mark.parametrize("unit", ["word", "char", "mixed"])
def test_white_space_of_any_kind_is_one_space(unit):
    found = judge("  call\tann  lee ", "call anne lee\n", "ann lee", unit=unit)
    assert found == judge("call ann lee", "call anne lee", "ann lee", unit=unit)
    assert found.errors == count_errors(tokenize("call ann lee", unit), tokenize("call anne lee", unit)).errors


def test_keywords_on_top_of_others_have_the_weight_of_both():
    everywhere = Keywords([phrase_of("marc")])
    keywords = Keywords([phrase_of("ann lee")], base=everywhere)
    (found,) = keyword_errors("marc saw ann lee", ["saw ann"], keywords=keywords, unit="word", weight=5)
    assert found.cost == 10
    (found,) = keyword_errors("marc saw ann lee", ["saw ann"], keywords=everywhere, unit="word", weight=5)
    assert found.cost == 6
    (found,) = keyword_errors("", ["marc lee saw"], keywords=keywords, unit="word", weight=5)
    assert found.cost == 11


def test_the_rate_is_the_cost_over_the_weights_of_the_reference():
    assert judge("call ann", "call", "ann").rate == pytest.approx(5 / 6)
    assert judge("call ann", "", "ann").rate == 1
    assert judge("call ann", "", weight=1.0).rate == 1
    assert judge("", "call ann", "ann").rate == 6
    assert judge("", "", "ann").rate == 0
