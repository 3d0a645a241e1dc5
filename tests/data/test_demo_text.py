"""Both grammars are closed, their sentences are what the corpus promises, names that sound alike count as one."""

import random
import re
from itertools import islice
from typing import NamedTuple

import pytest

from seedling.data.demo_text import ENGLISH
from seedling.data.demo_text_zh import MANDARIN
from seedling.data.grammar import Grammar, Sentence


class Drawn(NamedTuple):
    grammar: Grammar
    sentences: list[Sentence]


@pytest.fixture(scope="module", params=[ENGLISH, MANDARIN], ids=["en", "zh"])
def drawn(request) -> Drawn:
    rng = random.Random(0)
    return Drawn(request.param, [request.param.draw(rng) for _ in range(6000)])


@pytest.fixture(scope="module")
def english() -> list[Sentence]:
    rng = random.Random(0)
    return [ENGLISH.draw(rng) for _ in range(6000)]


@pytest.fixture(scope="module")
def mandarin() -> list[Sentence]:
    rng = random.Random(0)
    return [MANDARIN.draw(rng) for _ in range(6000)]


def templates(grammar: Grammar) -> list[str]:
    return [text for intent in grammar.intents.values() for text in intent.templates]


def test_every_slot_exists_and_every_slot_is_used(drawn):
    texts = templates(drawn.grammar) + [text for items in drawn.grammar.slots.values() for text in items]
    used = {slot for text in texts for slot in re.findall(r"\{(\w+)\}", text)}
    assert used == set(drawn.grammar.slots)


def test_shares_of_the_intents_are_percent_and_are_met(drawn):
    shares = {name: intent.share for name, intent in drawn.grammar.intents.items()}
    assert sum(shares.values()) == 100
    for name, share in shares.items():
        found = sum(sentence.intent == name for sentence in drawn.sentences) / len(drawn.sentences)
        assert found == pytest.approx(share / 100, abs=0.02), name


def test_english_sentences_are_2_to_14_lower_case_words(english):
    for sentence in english:
        assert re.fullmatch(r"[a-z]+( [a-z]+){1,13}", sentence.text), sentence


def test_mandarin_sentences_are_4_to_14_characters_and_nothing_else(mandarin):
    for sentence in mandarin:
        assert re.fullmatch(r"[\u4e00-\u9fff]{4,14}", sentence.text), sentence


def test_vocabularies_are_several_hundred_words_and_a_hundred_characters(english, mandarin):
    assert 500 < len({word for sentence in english for word in sentence.text.split()}) < 700
    assert 100 < len({character for sentence in mandarin for character in sentence.text}) < 130


def test_a_third_of_the_english_sentences_has_a_name_and_half_of_these_one_that_sounds_like_another(english):
    first_names = {*ENGLISH.slots["alike"], *ENGLISH.slots["distinct"]}
    named = [sentence for sentence in english if first_names & set(sentence.text.split())]
    alike = [sentence for sentence in named if set(ENGLISH.sounds_like) & set(sentence.text.split())]
    assert 0.28 < len(named) / len(english) < 0.40
    assert 0.45 < len(alike) / len(named) < 0.60


def test_a_third_of_the_mandarin_sentences_has_a_name_and_half_of_these_one_that_sounds_like_another(mandarin):
    surnames = set(MANDARIN.slots["surname"])
    named = [s for s in mandarin if any(keyword[0] in surnames for keyword in s.keywords)]
    alike = [s for s in named if set(MANDARIN.sounds_like) & set(s.text)]
    assert 0.25 < len(named) / len(mandarin) < 0.45
    assert 0.45 < len(alike) / len(named) < 0.65


def test_keywords_are_phrases_of_the_sentence(drawn):
    assert sum(bool(sentence.keywords) for sentence in drawn.sentences) > len(drawn.sentences) / 3
    space = drawn.grammar.space
    for sentence in drawn.sentences:
        text = f"{space}{sentence.text}{space}"
        assert all(f"{space}{keyword}{space}" in text for keyword in sentence.keywords), sentence


def test_a_word_that_sounds_like_another_is_in_one_group_and_is_in_names_only(drawn):
    grammar = drawn.grammar
    names = [name for group in grammar.homophones for name in group]
    assert all(len(group) > 1 for group in grammar.homophones) and len(names) == len(set(names))
    others = [text for slot, items in grammar.slots.items() if slot != "alike" for text in items]
    assert not set(names) & {word for text in others + templates(grammar) for word in grammar.words(text)}


def test_spoken_form_is_the_same_for_words_that_sound_alike_and_for_these_only():
    assert ENGLISH.spoken_form("call marc about the market") == ENGLISH.spoken_form("call mark about the market")
    assert ENGLISH.spoken_form("call david") == "call david"
    assert MANDARIN.spoken_form("打电话给王方") == MANDARIN.spoken_form("打电话给王芳") == "打电话给王芳"
    assert MANDARIN.spoken_form("打电话给王芳") != MANDARIN.spoken_form("打电话给王伟")


def test_distinct_sentences_all_sound_different_and_there_are_thousands(drawn):
    sentences = islice(drawn.grammar.distinct_sentences(random.Random(1)), 5000)
    spoken = [drawn.grammar.spoken_form(sentence.text) for sentence in sentences]
    assert len(set(spoken)) == len(spoken) == 5000


def test_the_same_generator_state_draws_the_same_sentences(drawn):
    first, second, other = random.Random("a"), random.Random("a"), random.Random("b")
    found = [drawn.grammar.draw(first) for _ in range(50)]
    assert found == [drawn.grammar.draw(second) for _ in range(50)]
    assert found != [drawn.grammar.draw(other) for _ in range(50)]
