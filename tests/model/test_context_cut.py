"""Cutting a context: whole phrases go, from the end; what must stay is passed over; control characters are spaces."""

import pytest

from seedling.model.context_cut import clean_text, cut


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


def test_control_characters_become_spaces_and_other_scripts_stay():
    assert clean_text("a\x00b\x1b[31mc\x7f\x85d") == "a b [31mc  d"
    assert clean_text(" 名字\tИмя\nاسم \x07") == "名字\tИмя\nاسم"
    assert clean_text("\x00\n ") == ""


def test_what_is_no_text_is_refused_by_place():
    with pytest.raises(ValueError, match=r"no text \('\\udcff' at 4\); give it in UTF-8"):
        clean_text("name\udcff")
