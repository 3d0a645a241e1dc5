"""Where phrases stand in a text, and what of a phrase says something alone."""

import random

import pytest

from seedling.data.scoring import get_normalizer, keywords_of, tokenize
from seedling.data.scoring.phrases import Inventory, Tokens, phrase_of, pieces_of, shown

normalize = get_normalizer("multilingual")


def stand(text: str, *phrases: str) -> list[str]:
    tokens = Tokens(text)
    return [shown(tokens[start:end]) for start, end in tokens.scan(Inventory(map(phrase_of, phrases)))]


def test_phrases_stand_by_words_and_not_by_letters():
    assert stand("hannah called ann", "ann") == ["ann"]
    assert stand("call caitlin adams now", "caitlin adams", "adams now") == ["caitlin adams"]
    assert stand("caitlin and adams", "caitlin adams") == []


def test_places_are_all_where_a_phrase_stands_also_within_another():
    tokens = Tokens("call caitlin adams and adams now")
    inventory = Inventory(map(phrase_of, ["caitlin adams", "adams", "adams now", "marc"]))
    found = sorted(shown(tokens[start:end]) for start, end in tokens.places(inventory))
    assert found == ["adams", "adams", "adams now", "caitlin adams"]
    assert Tokens("").places(inventory) == Tokens("adams").places(Inventory([])) == []


def test_the_longest_phrase_wins_and_none_stands_within_another():
    assert stand("caitlin adams and caitlin", "caitlin", "caitlin adams", "adams") == ["caitlin adams", "caitlin"]


def test_characters_of_scripts_without_spaces_stand_alone():
    assert stand("请打给张伟和wifi", "张伟", "wifi") == ["张伟", "wifi"]
    assert stand("โทรหาสมชายตอนนี้", "สมชาย") == ["สมชาย"]


@pytest.mark.parametrize(
    ("phrase", "pieces"),
    [
        ("caitlin adams", {"caitlin", "adams"}),
        ("the lord of the rings", {"lord", "rings"}),
        ("the who", {"the who"}),
        ("张伟", {"张伟"}),
        ("北京大学", {"北京", "京大", "大学"}),
        ("张", {"张"}),
        ("トムさん", {"トムさん"}),
        ("打开wifi", {"打开", "wifi"}),
        ("", set()),
    ],
)
def test_the_pieces_of_a_phrase_say_something_alone(phrase, pieces):
    assert {shown(piece) for piece in pieces_of(phrase_of(phrase))} == pieces


@pytest.mark.parametrize("unit", ["word", "char", "mixed"])
def test_places_are_told_for_every_token_of_a_unit(unit):
    draws = random.Random(0)
    for _ in range(200):
        words = draws.choices(["ann", "打给", "hannah", "张伟", "go"], k=draws.randint(0, 6))
        text = " ".join(words)
        tokens = Tokens(text)
        everything = tokens.in_unit(text, unit, [(at, at + 1) for at in range(len(tokens))])
        units = tokenize(text, unit)
        assert len(everything) == len(units) == len(tokens.in_unit(text, unit, []))
        assert everything == [token != " " for token in units]


def test_a_phrase_of_two_words_covers_the_space_between_them():
    text = "to ann lee"
    covered = Tokens(text).in_unit(text, "char", [(1, 3)])
    assert "".join(c for c, inside in zip(text, covered) if inside) == "ann lee"


def test_keywords_are_those_of_the_shard_or_the_phrases_that_are_said():
    phrases = ["Caitlin Adams", "Marc", "Caitlin Adams", "张伟"]
    assert keywords_of({}, reference="Call Caitlin Adams.", phrases=phrases, normalize=normalize) == ("Caitlin Adams",)
    assert keywords_of({"keywords": []}, reference="call marc", phrases=phrases, normalize=normalize) == ("Marc",)
    assert keywords_of({"keywords": ["a b"]}, reference="marc", phrases=phrases, normalize=normalize) == ("a b",)
    assert keywords_of({}, reference="call marcia", phrases=phrases, normalize=normalize) == ()
    with pytest.raises(ValueError, match="keywords of 'u1' are 'marc'"):
        keywords_of({"keywords": "marc", "id": "u1"}, reference="", phrases=(), normalize=normalize)
