"""Signs of a language model that has stopped listening."""

import pytest

from seedling.data.scoring import ScoredUtterance, score
from seedling.data.scoring.diagnostics import looped_tokens


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", 0),
        ("no loop in this one", 0),
        ("bye bye", 0),
        ("bye bye bye", 3),
        ("so and then and then and then", 6),
        ("a b c a b c a b", 0),
        ("the cat the dog the bird the end", 0),
        ("x a b c a b c a b c a", 10),
    ],
)
def test_a_loop_is_a_phrase_said_three_times_in_a_row(text, expected):
    assert looped_tokens(text.split()) == expected
    assert looped_tokens(text.split()) == looped_tokens(tuple(text.split()))


def test_loops_refusals_and_silence_are_counted_beside_the_rate():
    records = [
        ScoredUtterance("fine", "bye bye bye", "bye bye bye"),
        ScoredUtterance("loop", "call mark now", "call mark now now now now"),
        ScoredUtterance("real-loop", "no no no no", "no no no"),
        ScoredUtterance("refusal", "play jazz", "I am an AI language model"),
        ScoredUtterance("said-so", "a language model learns", "a language model burns"),
        ScoredUtterance("silent", "good morning", ""),
        ScoredUtterance("from-nothing", "", "thank you"),
    ]
    found = score(records, normalizer="none").diagnostics
    assert found.looping == ("loop",) and found.repetition_rate == 1 / 7
    assert found.refusing == ("refusal",) and found.refusal_rate == 1 / 7
    assert found.empty_hypotheses == 1 and found.text_for_empty_references == 1
    assert found.sentence_error_rate == 6 / 7
    assert found.insertion_rate + found.deletion_rate + found.substitution_rate == pytest.approx(
        score(records, normalizer="none").headline.fraction
    )


def test_a_mandarin_refusal_is_found_between_characters():
    records = [ScoredUtterance("u", "打开空调", "我是一个语言模型")]
    assert score(records, normalizer="mandarin").diagnostics.refusing == ("u",)
    assert score(records, normalizer="code-switch").diagnostics.refusing == ("u",)
