"""The grammar is closed, the sentences are what the corpus promises, and names that sound alike count as one."""

import random
import re
from itertools import islice

import pytest

from seedling.data import demo_text
from seedling.data.demo_text import HOMOPHONES, INTENTS, SLOTS, SOUNDS_LIKE, distinct_sentences, draw, spoken_form


@pytest.fixture(scope="module")
def sentences() -> list[demo_text.Sentence]:
    rng = random.Random(0)
    return [draw(rng) for _ in range(6000)]


def test_every_slot_exists_and_every_slot_is_used():
    texts = [text for intent in INTENTS.values() for text in intent.templates]
    texts += [text for items in SLOTS.values() for text in items]
    used = {slot for text in texts for slot in re.findall(r"\{(\w+)\}", text)}
    assert used == set(SLOTS)


def test_shares_of_the_intents_are_percent():
    assert sum(intent.share for intent in INTENTS.values()) == 100


def test_sentences_are_lower_case_words_of_the_promised_number(sentences):
    for sentence in sentences:
        assert re.fullmatch(r"[a-z]+( [a-z]+)*", sentence.text), sentence
        assert 2 <= len(sentence.text.split()) <= 14, sentence


def test_vocabulary_is_several_hundred_words(sentences):
    assert 500 < len({word for sentence in sentences for word in sentence.text.split()}) < 700


def test_a_third_of_the_sentences_has_a_name_and_half_of_these_one_that_sounds_like_another(sentences):
    first_names = {*SLOTS["alike"], *SLOTS["distinct"]}
    named = [sentence for sentence in sentences if first_names & set(sentence.text.split())]
    alike = [sentence for sentence in named if set(SOUNDS_LIKE) & set(sentence.text.split())]
    assert 0.28 < len(named) / len(sentences) < 0.40
    assert 0.45 < len(alike) / len(named) < 0.60


def test_keywords_are_phrases_of_the_sentence(sentences):
    assert sum(bool(sentence.keywords) for sentence in sentences) > len(sentences) / 3
    for sentence in sentences:
        assert all(f" {keyword} " in f" {sentence.text} " for keyword in sentence.keywords), sentence


def test_a_name_that_sounds_like_another_is_in_one_group_and_is_no_other_word():
    names = [name for group in HOMOPHONES for name in group]
    assert all(len(group) > 1 for group in HOMOPHONES) and len(names) == len(set(names))
    others = [text for slot, items in SLOTS.items() if slot != "alike" for text in items]
    others += [text for intent in INTENTS.values() for text in intent.templates]
    assert not set(names) & {word for text in others for word in text.split()}


def test_spoken_form_is_the_same_for_names_that_sound_alike_and_for_these_only():
    assert spoken_form("call marc about the market") == spoken_form("call mark about the market")
    assert spoken_form("call david") == "call david"


def test_distinct_sentences_all_sound_different():
    spoken = [spoken_form(sentence.text) for sentence in islice(distinct_sentences(random.Random(1)), 5000)]
    assert len(set(spoken)) == len(spoken)


def test_the_same_generator_state_draws_the_same_sentences():
    first, second, other = random.Random("a"), random.Random("a"), random.Random("b")
    drawn = [draw(first) for _ in range(50)]
    assert drawn == [draw(second) for _ in range(50)]
    assert drawn != [draw(other) for _ in range(50)]
