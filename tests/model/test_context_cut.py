"""Cutting a context: whole phrases go, from the end; what must stay is passed over; control characters are dropped."""

import pytest

from seedling.data.contexts.text import clean_context
from seedling.model.context_cut import clean_text, cut

NASTY = [
    "Kait\u200blyn\u202e\x00Bob",
    "a\x00b\x1b[31mc\x7f\x85d\x9be",
    "\ufeffname\u2060s \u00adand\u2028lines\u2029here\r\nthere\x0bup\x0cdown\x1cfile",
    "\u2066left\u2069 \u061cright\u200e\u200f",
    "\u00a0wide\u3000\u2003spaces\u202f",
    "👩\u200d🚀 می\u200cخواهم क्\u200dष",
    "\ue000private \U000e0041tag \uffff\U0010ffff",
    "".join(map(chr, [*range(0x300), *range(0x2000, 0x2070), *range(0xFFF0, 0x10000)])),
]


def words(limit: int):
    """At most so many words."""
    return lambda text: len(text.split()) <= limit


def characters(limit: int):
    return lambda text: len(text) <= limit


def test_a_list_keeps_as_many_whole_entries_as_fit():
    names = "Ann Smith, Bob Jones, Cy Young; Di Moss\nEd Cole"
    assert cut(names, fits=words(5)) == "Ann Smith, Bob Jones"
    assert cut(names, fits=words(6)) == "Ann Smith, Bob Jones, Cy Young"
    assert cut(names, fits=words(9)) == "Ann Smith, Bob Jones, Cy Young; Di Moss"
    assert cut(names, fits=words(10)) == names


def test_prose_keeps_whole_words_where_its_phrases_are_long():
    prose = "the quick brown fox " * 20
    for limit in (1, 7, 79):
        assert cut(prose, fits=words(limit)).split() == prose.split()[:limit]


def test_scripts_without_spaces_are_cut_between_entries_or_characters():
    assert cut("张伟，王芳，李娜", fits=characters(7)) == "张伟，王芳"
    assert cut("张" * 300, fits=characters(70)) == "张" * 70


def test_a_word_that_alone_does_not_fit_is_cut_and_nothing_is_left_of_what_never_fits():
    assert cut("x" * 500 + ", Ann", fits=characters(40)) == "x" * 40
    assert cut("Ann, Bob", fits=lambda text: False) == ""


def test_phrases_to_keep_are_cut_last_wherever_they_stand():
    names = ", ".join(f"Name{i:02d} Surname" for i in range(50))
    kept = cut(names, fits=words(10), keep=["Name33 Surname", "Name47 Surname"])
    assert kept.split(", ") == [f"Name{i:02d} Surname" for i in (0, 1, 2, 33, 47)]
    assert cut(names, fits=words(10), keep=["Name01 Surname"]) == cut(names, fits=words(10))


def test_a_phrase_to_keep_may_lie_across_words_of_long_prose():
    prose = "word " * 100 + "Mary Ann Miller " + "word " * 100
    kept = cut(prose, fits=words(10), keep=["Mary Ann Miller"])
    assert kept.split() == ["word"] * 7 + ["Mary", "Ann", "Miller"]


def test_where_the_phrases_to_keep_do_not_fit_the_start_is_kept():
    assert cut("Ann, Bob, Cy", fits=characters(4), keep=["Ann", "Bob", "Cy"]) == "Ann"


@pytest.mark.parametrize("limit", range(1, 60))
def test_what_is_left_fits_and_is_the_most_that_does(limit):
    names = "Ann Smith, Bob; Cy\nDi Moss, Ed"
    kept = cut(names, fits=characters(limit))
    assert len(kept) <= limit and names.startswith(kept)
    longer = [names[:end] for end in (9, 14, 18, 26, len(names)) if len(kept) < end <= limit]
    assert not longer


def test_control_characters_are_dropped_and_other_scripts_stay():
    assert clean_text("a\x00b\x1b[31mc\x7f\x85d") == "ab[31mc d"
    assert clean_text(" 名字\tИмя\nاسم \x07") == "名字\tИмя\nاسم"
    assert clean_text("\x00\n ") == ""


@pytest.mark.parametrize("text", NASTY)
def test_a_context_reads_alike_in_training_and_in_a_prompt(text):
    assert " ".join(clean_text(text).split()) == clean_context(text)


def test_what_is_no_text_is_refused_by_place():
    with pytest.raises(ValueError, match=r"no text \('\\udcff' at 4\); give it in UTF-8"):
        clean_text("name\udcff")
