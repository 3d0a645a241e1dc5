"""The sentence machinery on grammars small enough to list."""

import random
from collections import Counter

import pytest

from seedling.data import grammar as grammar_module
from seedling.data.grammar import Grammar, Intent, Sentence, listed

GREETINGS = Grammar(
    slots={"name": listed("ann, anne, bob"), "pair": listed("{name} and {name}")},
    intents={"greet": Intent(75, ("hello {name}", "hello {pair}")), "leave": Intent(25, ("bye",))},
    keyword_slots=("name",),
    homophones=(("ann", "anne"),),
    lengths=range(1, 4),
)


def test_sentences_are_fillings_within_the_lengths_with_each_keyword_once():
    rng = random.Random(0)
    drawn = Counter(GREETINGS.draw(rng) for _ in range(2000))
    assert {sentence.text for sentence in drawn} == {"hello ann", "hello anne", "hello bob", "bye"}
    assert Sentence("hello anne", "greet", ("anne",)) in drawn and Sentence("bye", "leave", ()) in drawn
    # A pair makes four words, which is too long: half of the greetings are drawn again.
    assert drawn[Sentence("bye", "leave", ())] / 2000 == pytest.approx(0.25 / (0.25 + 0.375), abs=0.04)


def test_a_grammar_that_has_no_more_sentences_says_so_and_how_many_it_had(monkeypatch):
    monkeypatch.setattr(grammar_module, "EXHAUSTED", 500)
    found = []
    with pytest.raises(ValueError, match="hardly more than 3 sentences"):
        for sentence in GREETINGS.distinct_sentences(random.Random(0)):
            found.append(GREETINGS.spoken_form(sentence.text))
    assert sorted(found) == ["bye", "hello ann", "hello bob"]


def test_without_spaces_every_character_is_a_word():
    grammar = Grammar(slots={}, intents={}, keyword_slots=(), homophones=(("芳", "方"),), lengths=range(1, 9), space="")
    assert grammar.words("王方好") == ["王", "方", "好"] and grammar.spoken_form("王方好") == "王芳好"
