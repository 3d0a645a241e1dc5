"""Names: near ones are near, none is where it must not be, irrelevant is irrelevant by any ear."""

import random

import pytest

from seedling.data.contexts.names import NamePool
from seedling.data.demo_text import ENGLISH
from seedling.data.phonetics import plain_letters, sound_distance, sounds_like

FIRST, LAST, CITIES = (
    [*ENGLISH.slots["alike"], *ENGLISH.slots["distinct"]],
    ENGLISH.slots["last"],
    ENGLISH.slots["city"],
)
NAMES = [*FIRST, *(f"{first} {last}" for first in FIRST for last in LAST), *CITIES, *ENGLISH.slots["street"]]


@pytest.fixture(scope="module")
def pool():
    return NamePool(NAMES, groups=ENGLISH.homophones)


def test_sound_alikes_are_the_other_spellings_also_within_a_phrase(pool):
    assert set(pool.sound_alikes("caitlin")) == {"kaitlyn", "katelyn"}
    assert {"kaitlyn adams", "katelyn adams"} <= set(pool.sound_alikes("Caitlin Adams"))
    assert pool.sound_alikes("dublin") == []
    bare = NamePool(["night", "dublin"])
    assert bare.sound_alikes("knight") == ["night"]


def test_distractors_are_distinct_allowed_and_partly_close(pool):
    rng = random.Random(1)
    for keyword in ["caitlin", "mark turner", "oak street", "unheard of"]:
        without = pool.confusable([keyword])
        chosen = pool.choose(rng, 40, near=[keyword], close_share=0.25, without=without)
        assert len(chosen) == len(set(chosen)) == 40 and keyword not in chosen
        assert not any(pool.names.index(name) in without for name in chosen)
        distances = sorted(sound_distance(keyword, name) for name in chosen)
        everyone = sorted(sound_distance(keyword, name) for n, name in enumerate(pool.names) if n not in without)
        assert distances[9] <= everyone[80], "ten of forty are among the nearest"


def test_a_right_list_never_offers_another_spelling_of_a_keyword(pool):
    rng = random.Random(2)
    for keyword in rng.sample(NAMES, 60):
        for name in pool.choose(rng, 30, near=[keyword], close_share=0.5, without=pool.confusable([keyword])):
            for word in plain_letters(keyword).split():
                others = [other for other in plain_letters(name).split() if other != word]
                assert not any(sounds_like(word, other, groups=ENGLISH.homophones) for other in others), (keyword, name)


def test_an_irrelevant_name_has_no_word_and_no_sound_of_what_is_said(pool):
    rng = random.Random(3)
    for _ in range(200):
        sentence = ENGLISH.draw(rng)
        without = pool.said_in(sentence.text, sentence.keywords)
        for name in pool.decoys(rng, 10, without=without):
            heard = [
                (a, b)
                for a in name.split()
                for b in sentence.text.split()
                if sounds_like(a, b, groups=ENGLISH.homophones)
            ]
            assert not heard, (sentence.text, name)


def test_a_pool_that_runs_out_gives_what_it_has():
    pool = NamePool(["anna", "bert", "carl"], weights=[1000, 1, 1])
    assert sorted(pool.choose(random.Random(1), 9, near=["carl"], close_share=0.5, without={0})) == ["bert"]
    assert pool.decoys(random.Random(1), 2, without={0, 1, 2}) == []


def test_names_are_drawn_as_often_as_they_are_said():
    pool = NamePool(["anna", "bert", "carl"], weights=[6, 3, 1])
    rng = random.Random(4)
    drawn = [pool.decoys(rng, 1, without=())[0] for _ in range(3000)]
    assert [round(drawn.count(name) / 3000, 1) for name in pool.names] == [0.6, 0.3, 0.1]


@pytest.mark.parametrize("name", ["newark", "new ark", "nu ark"])
def test_words_may_be_divided_otherwise(name):
    pool = NamePool([name])
    assert pool.said_in("take me to new ark", ["new ark"]) == {0}


def test_names_are_found_word_for_word(pool):
    found = pool.found_in("send it to Caitlin Adams and to marks, near oak street")
    assert set(found) == {"caitlin adams", "caitlin", "oak street"}


def test_500_of_20_000_names_are_chosen():
    rng = random.Random(5)
    syllables = [a + b for a in "bcdfghjklmnprstvz" for b in "aeiou"]
    names = sorted({"".join(rng.choices(syllables, k=rng.randint(2, 5))) for _ in range(20_000)})
    pool = NamePool(names)
    for keyword in rng.sample(names, 20):
        chosen = pool.choose(rng, 500, near=[keyword], close_share=0.3, without=pool.confusable([keyword]))
        assert len(set(chosen)) == 500
