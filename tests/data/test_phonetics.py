"""Phonetics: homophones of the demo, pinyin without tones, other scripts as they are, distances by key and letters."""

import random

import numpy as np
import pytest

from seedling.data.demo_text import ENGLISH
from seedling.data.phonetics import SoundPool, plain_letters, sound_distance, sound_groups, sound_key, sounds_like

NAMES = [
    *ENGLISH.slots["distinct"],
    *ENGLISH.slots["city"],
    *ENGLISH.slots["last"],
    *(group[0] for group in ENGLISH.homophones),
]


def test_the_demos_homophones_sound_alike_with_its_groups_and_mostly_without():
    pairs = [(a, b) for group in ENGLISH.homophones for a in group for b in group]
    assert all(sounds_like(a, b, groups=ENGLISH.homophones) for a, b in pairs)
    assert sum(sounds_like(a, b) for a, b in pairs) > 0.85 * len(pairs)


def test_names_of_different_groups_do_not_sound_alike():
    groups = sound_groups(ENGLISH.homophones)
    heard = [(a, b) for a in NAMES for b in NAMES if a != b and sounds_like(a, b, groups=groups)]
    assert heard == [], "these would be taken for one another"


@pytest.mark.parametrize(
    "a, b, alike",
    [
        ("jon", "jane", False),
        ("neil", "noel", False),
        ("knight", "night", True),
        ("Straße", "strasse", True),
        ("O'Brien", "obrian", True),
        ("caitlin adams", "Kaitlyn Adams!", True),
        ("maple street", "maple road", False),
        ("张三", "章三", True),  # zhang1 san1
        ("买", "卖", True),  # tones 3 and 4
        ("张三", "李四", False),
        ("москва", "Москва", True),
        ("москва", "масква", False),
        ("一二", "12", False),
        ("", "a", False),
    ],
)
def test_what_sounds_alike(a, b, alike):
    assert sounds_like(a, b) == sounds_like(b, a) == alike


def test_han_is_not_read_as_chinese_in_other_languages():
    assert sound_key("张三", lang="zh") == "zhang'san'"
    assert sound_key("山田", lang="ja") == "山田"


def test_groups_say_what_no_key_knows_also_for_words_within_phrases_and_through_shared_words():
    assert not sounds_like("sean", "shawn")
    assert sounds_like("sean", "shawn", groups=[["Sean", "Shawn"]])
    assert sounds_like("call sean", "call shawn", groups=[["sean", "shawn"]])
    assert sounds_like("ate", "eight", groups=sound_groups([["ate", "8"], ["x", "y"], ["8", "eight"]]))
    assert sounds_like("new york", "nu jork", groups=[["new york", "nu jork"]])


def test_marks_of_other_scripts_survive_and_punctuation_does_not():
    assert plain_letters("Élan, «Über»—ｆｕｌｌ\u3000width's 5!") == "elan uber full widths 5"
    assert plain_letters("हिन्दी مُحَمَّد") == "हिन्दी مُحَمَّد"


def test_every_text_has_a_key_and_the_distance_is_one():
    rng = random.Random(3)
    letters = "abcxyzéß'’- \n\t\0张三мйहि𠀀😀1２"
    for _ in range(2000):
        a, b = ("".join(rng.choice(letters) for _ in range(rng.randint(0, 12))) for _ in range(2))
        assert plain_letters(plain_letters(a)) == plain_letters(a)
        assert bool(sound_key(a)) == bool(plain_letters(a))
        assert sounds_like(a, a) and sound_distance(a, a) == 0
        assert 0 <= sound_distance(a, b) == sound_distance(b, a) <= 1


def test_the_distances_of_a_pool_are_those_of_its_names():
    pool = SoundPool(NAMES)
    for word in ("caitlin", "marta", "dublin", "zzz"):
        assert np.allclose(pool.distances(word), [sound_distance(name, word) for name in NAMES], atol=1e-6)
    order = [pool.names[i] for i in np.argsort(pool.distances("martin"))]
    assert order[0] == "martinez" and order.index("mark" if "mark" in order else "marc") < order.index("dublin")


def test_the_nearest_of_many_are_the_nearest_of_all():
    rng = random.Random(4)
    syllables = [a + b for a in "bcdfghjklmnprst" for b in "aeiou"]
    pool = SoundPool(sorted({"".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(5000)}))
    for word in rng.sample(pool.names, 10):
        distances = pool.distances(word)
        found = pool.nearest(word, 20)
        assert pool.names[found[0]] == word and np.all(np.diff(distances[found]) >= 0)
        assert distances[found[-1]] <= np.sort(distances)[40]
