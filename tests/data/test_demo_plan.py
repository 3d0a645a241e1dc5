"""Held-out sentences and voices stay as they are, whatever else the corpus holds."""

import hashlib

import pytest

from seedling.data.demo_plan import HELD_OUT_VARIANTS, LANGUAGES, PARTS, Split, plan, voices
from seedling.data.synthesis import VARIANTS

EN = {part: Split(part, "en") for part in PARTS}
ZH = {part: Split(part, "zh") for part in PARTS}


def test_held_out_sentences_depend_on_no_hours():
    short, long = (
        plan(hours=hours, mandarin_hours=mandarin, heldout_utterances=40, seed=0)
        for hours, mandarin in ((0.01, 0.2), (0.5, 0.01))
    )
    for splits, shorter, longer in ((EN, short, long), (ZH, long, short)):
        assert shorter[splits["test"]] == longer[splits["test"]] and shorter[splits["dev"]] == longer[splits["dev"]]
        train = shorter[splits["train"]]
        assert 0 < len(train) < len(longer[splits["train"]]) and train == longer[splits["train"]][: len(train)]


def test_mandarin_changes_nothing_about_english():
    both, english = (plan(hours=0.1, mandarin_hours=hours, heldout_utterances=9, seed=1) for hours in (0.1, 0))
    assert set(english) == set(EN.values()) and set(both) == {*EN.values(), *ZH.values()}
    assert {split: both[split] for split in english} == english
    assert [len(both[ZH[part]]) for part in ("dev", "test")] == [3, 3]


def test_what_is_kept_for_reinforcement_learning_changes_nothing_and_repeats_nothing():
    settings = {"hours": 0.1, "mandarin_hours": 0.02, "heldout_utterances": 9, "seed": 1}
    without, planned = plan(**settings), plan(**settings, rl_hours=0.05)
    apart = {lang: planned.pop(Split("rl", lang)) for lang in ("en", "zh")}
    assert planned == without
    for lang, kept in apart.items():
        assert {row.voice for row in kept} <= set(voices(Split("train", lang)))
        said = [LANGUAGES[lang].grammar.spoken_form(row.text) for split in without for row in without[split]]
        assert kept and not {LANGUAGES[lang].grammar.spoken_form(row.text) for row in kept} & set(said)


def test_the_english_test_set_is_the_one_that_published_figures_are_of():
    test = plan(hours=0.01, mandarin_hours=0, heldout_utterances=300, seed=0)[EN["test"]]
    said = "".join(f"{row.key}\t{row.voice}\t{row.words_per_minute}\t{row.pitch}\t{row.text}\n" for row in test)
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "143e32cb104d51f4"


def test_every_variant_belongs_to_one_part_in_both_languages():
    variants = {
        part: {voice.partition("+")[2] for lang in LANGUAGES for voice in voices(Split(part, lang))} for part in PARTS
    }
    assert sorted(variant for found in variants.values() for variant in found) == sorted(VARIANTS)
    assert {part: variants[part] for part in HELD_OUT_VARIANTS} == {p: set(v) for p, v in HELD_OUT_VARIANTS.items()}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_voices_are_every_accent_with_every_variant_but_those_left_out(lang):
    language = LANGUAGES[lang]
    wanted = [f"{a}+{v}" for a in language.accents for v in VARIANTS if v not in language.left_out]
    assert sorted(voice for part in PARTS for voice in voices(Split(part, lang))) == sorted(wanted)


@pytest.mark.parametrize(("splits", "heldout"), [(EN, 64), (ZH, 64 * 3)])
def test_every_voice_speaks_equally_often(splits, heldout):
    planned = plan(hours=0.01, mandarin_hours=0.01, heldout_utterances=heldout, seed=0)[splits["test"]]
    said = [utterance.voice for utterance in planned]
    assert {said.count(voice) for voice in voices(splits["test"])} == {64 // len(voices(splits["test"]))}
