"""Risks: what they come to on texts as they are, where keywords come from, and settings that cannot take effect."""

import jiwer
import pytest

from seedling.data.scoring import get_normalizer
from seedling.stages.reinforcement.risks import RiskConfig, Risks, rare_words

normalize = get_normalizer("whisper-basic")
HEARD = ["call marc now", "Call, Mark now!", "call", "", "please call marc now now"]


def risks(*, rare=(), by=normalize, **settings) -> Risks:
    return Risks(RiskConfig(**settings), normalize=by, rare=rare)


def test_without_a_weight_the_risk_is_the_number_of_errors_of_normalised_texts():
    judged = risks().of("Call Marc now.", HEARD, keywords=["Marc"])
    assert [one.risk for one in judged] == [one.errors for one in judged] == [0, 1, 2, 3, 2]


@pytest.mark.parametrize("unit, peer", [("word", jiwer.wer), ("char", jiwer.cer)])
def test_the_rate_is_jiwers(unit, peer):
    judged = risks(unit=unit, scale="rate").of("Call Marc now.", HEARD)
    wanted = [peer("call marc now", normalize(text)) for text in HEARD]
    assert [one.risk for one in judged] == pytest.approx(wanted, abs=1e-12)


def test_mixed_tokens_are_characters_and_words():
    judged = risks(unit="mixed", scale="rate", by=get_normalizer("code-switch")).of(
        "打开 WiFi。", ["打开", "打kai wifi"]
    )
    assert [(one.risk, one.errors) for one in judged] == [(pytest.approx(1 / 3), 1), (pytest.approx(1 / 3), 1)]


def test_keywords_of_an_utterance_are_normalised_and_cost_more():
    weighted = risks(keyword_weight=5)
    judged = weighted.of("Call Marc now.", HEARD, keywords=["MARC!", ""])
    assert [one.risk for one in judged] == [0, 5, 6, 7, 2]
    assert [one.errors for one in judged] == [0, 1, 2, 3, 2]
    assert [one.risk for one in weighted.of("Call Marc now.", HEARD)] == [0, 1, 2, 3, 2]
    rates = risks(keyword_weight=5, scale="rate").of("Call Marc now.", HEARD, keywords=["marc"])
    assert [one.risk for one in rates] == pytest.approx([0, 5 / 7, 6 / 7, 1, 2 / 7])


def test_rare_words_and_listed_phrases_are_keywords_of_every_utterance(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("Ann Lee\n\nDr. Evans\n", encoding="utf-8")
    settings = {"keyword_weight": 5, "keywords": ["rare", "list"], "rare_max_count": 1, "keyword_list": str(file)}
    both = risks(**settings, rare={"marc"})
    judged = both.of("Marc, Ann Lee and Kate", ["ann lee and kate", "marc and lee and kate", "marc ann lee and"])
    assert [one.risk for one in judged] == [5, 5, 1]
    assert [one.risk for one in both.of("Kate", [""], keywords=["Kate"])] == [5]
    # A source that is not named is not looked at.
    assert risks(keyword_weight=5, rare={"marc"}).of("marc", [""])[0].risk == 1


def test_rare_words_are_counted_over_all_transcripts():
    texts = ["Call Marc now.", "call ANN now", "Ann, Ann!"]
    assert rare_words(texts, max_count=1, normalize=normalize) == {"marc"}
    assert rare_words(iter(texts), max_count=2, normalize=normalize) == {"marc", "call", "now"}
    assert rare_words(["张伟在", "在家"], max_count=1, normalize=get_normalizer("mandarin")) == {"张", "伟", "家"}
    assert rare_words([], max_count=1, normalize=normalize) == frozenset()


@pytest.mark.parametrize("scale", ["errors", "rate"])
@pytest.mark.parametrize("unit", ["word", "char", "mixed"])
def test_what_is_empty_after_normalisation_has_a_finite_risk(scale, unit):
    found = risks(scale=scale, unit=unit, keyword_weight=5).of("...", ["", "?!", "a b"], keywords=["b", "!"])
    letters = 3 if unit == "char" else 2
    assert found == [(0, 0), (0, 0), (letters + 4, letters)]
    assert risks(scale=scale, unit=unit).of("a b", [""]) == [(letters if scale == "errors" else 1, letters)]
    assert risks(scale=scale, unit=unit).of("a b", []) == []


def test_reference_tokens_are_those_that_rates_are_of():
    assert risks().reference_tokens("Call  Marc, now!") == 3
    assert risks(unit="char").reference_tokens("Call  Marc, now!") == len("call marc now")
    assert risks(unit="mixed", by=get_normalizer("code-switch")).reference_tokens("打开 WiFi。") == 3
    assert risks().reference_tokens("...") == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"unit": "phone"}, "risk.unit is 'phone'; choose one of word, char, mixed"),
        ({"scale": "mean"}, "risk.scale is 'mean'; choose one of errors, rate"),
        ({"keyword_weight": 0.5}, "risk.keyword_weight is 0.5; it must be at least 1"),
        ({"keyword_weight": float("nan")}, "risk.keyword_weight is nan"),
        ({"keyword_weight": float("inf")}, "risk.keyword_weight is inf"),
        ({"keywords": ["index", "ontology"]}, "an entry of risk.keywords is 'ontology'; choose one of index, context"),
        ({"keyword_weight": 5, "keywords": []}, "risk.keywords is empty, so nothing has that weight; name a source"),
        ({"keywords": ["list"]}, "risk.keywords has 'list' and risk.keyword_list is ''; name a file"),
        ({"keywords": ["rare"]}, "risk.keywords has 'rare' and risk.rare_max_count is 0; set how often"),
        ({"keyword_list": "names.txt"}, "risk.keyword_list is 'names.txt' but risk.keywords lacks 'list'; add it"),
        ({"rare_max_count": 3}, "risk.rare_max_count is 3 but risk.keywords lacks 'rare'; add it"),
        ({"keywords": ["rare"], "rare_max_count": -1}, "risk.rare_max_count is -1; it must be 0 or more"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        RiskConfig(**settings)


def test_no_weight_needs_no_keywords():
    assert risks(keywords=[]).of("a", ["b"]) == [(1, 1)]


def test_a_list_that_is_not_there_or_has_nothing_in_it_is_refused(tmp_path):
    file = tmp_path / "names.txt"
    settings = {"keyword_weight": 5, "keywords": ["list"], "keyword_list": str(file)}
    with pytest.raises(ValueError, match=r"risk.keyword_list .*names.txt does not exist; name a text file"):
        risks(**settings)
    file.write_text("\n...\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"names.txt has no phrase in it; write one a line"):
        risks(**settings)
