"""Units and normalisers by language, and a corpus of several."""

import pytest

from seedling.data.scoring import ScoredUtterance, get_normalizer, score, write_score_folder
from seedling.data.scoring.languages import suited, unit_of
from seedling.data.scoring.normalize import MULTILINGUAL_VERSION

# Pinned for version 1: a change of any line here is a new version.
MULTILINGUAL = {
    "Call Marc, at 5 o'clock!": "call marc at 5 o clock",
    "今天,天气 很好。": "今天天气很好",
    "打开 Bluetooth 设备": "打开bluetooth设备",
    "ＡＢＣ１２３": "abc123",
    "สวัสดี ครับ": "สวัสดีครับ",
    "हिन्दी में": "हिन्दी में",
    "[noise] café (laughs)": "café",
    "": "",
}
ENGLISH = ["Hello, World!", "twenty-two & more", "it's  [noise] O.K. (laughs) now", "Zoë naïve", "$3.50"]
MIXED = [
    ScoredUtterance("a", "call Marc now", "call mark now", lang="en"),
    ScoredUtterance("b", "打给 张伟", "打给张玮", lang="zh"),
    ScoredUtterance("c", "打开 wifi 吧", "打开 wife 吧", lang="zh-en"),
]


@pytest.mark.parametrize("text", MULTILINGUAL)
def test_multilingual_version_1_returns_what_it_always_returned(text):
    normalize = get_normalizer("multilingual")
    assert normalize(text) == MULTILINGUAL[text] == normalize(MULTILINGUAL[text])
    assert MULTILINGUAL_VERSION == "1", "new rules: pin what the new version returns"


@pytest.mark.parametrize("text", ENGLISH)
def test_english_comes_out_as_of_whispers_rules(text):
    assert get_normalizer("multilingual")(text) == get_normalizer("whisper-basic")(text)


@pytest.mark.parametrize(
    ("lang", "unit"),
    [("en", "word"), ("en-US", "word"), ("zh", "char"), ("zh-TW", "char"), ("yue", "char"), ("cmn", "char"),
     ("ja", "char"), ("th", "char"), ("ko", "word"), ("zh-en", "mixed"), ("en-zh", "mixed"), ("", "word")],
)  # fmt: skip
def test_the_unit_of_a_language(lang, unit):
    assert unit_of(lang) == unit


def test_without_a_tag_the_texts_decide():
    assert unit_of("", texts=["打开"]) == "mixed" and unit_of("", texts=["open"]) == "word"


def test_one_language_is_scored_by_its_own_unit_and_several_by_mer():
    assert suited(["en", "en"], texts=["a", "b"]) == ("whisper-basic", "word")
    assert suited(["en", "de"], texts=["a", "b"]) == ("whisper-basic", "word")
    assert suited(["zh"], texts=["打开"]) == ("multilingual", "char")
    assert suited(["zh", "en"], texts=["打开", "a"]) == ("multilingual", "mixed")


def test_every_language_of_a_corpus_has_its_rate_and_the_headline_is_mer(tmp_path):
    report = score(MIXED)
    assert report.headline.metric == "mer" and report.headline.counts[:3] == (3, 0, 0)
    assert report.headline.counts.reference_tokens == 3 + 4 + 4
    rates = {
        lang: (rate.metric, rate.counts.errors, rate.counts.reference_tokens) for lang, rate in report.languages.items()
    }
    assert rates == {"en": ("wer", 1, 3), "zh": ("cer", 1, 4), "zh-en": ("mer", 1, 4)}
    summary = write_score_folder(report, tmp_path)
    assert summary["languages"]["zh"]["metric"] == "cer" and summary["languages"]["zh"]["errors"] == 1


def test_a_corpus_of_one_language_is_scored_as_ever():
    report = score(MIXED[:1])
    assert report.languages == {} and report.stamp.normalizer == "whisper-basic" and report.headline.metric == "wer"


def test_english_in_a_mixed_corpus_has_the_rate_it_has_alone():
    assert score(MIXED).languages["en"].counts == score(MIXED[:1]).headline.counts


def test_languages_are_scored_by_character_where_the_normaliser_drops_spaces():
    rates = score(MIXED, normalizer="mandarin").languages
    assert {rate.metric for rate in rates.values()} == {"cer"}
