"""Normalisers: what each version returns, and what its version string admits."""

import json

import pytest

from seedling.data.scoring import get_normalizer
from seedling.data.scoring.normalize import CODE_SWITCH_VERSION, MANDARIN_VERSION, NORMALIZERS

# Pinned for version 1: a change of any line here is a new version.
MANDARIN = {
    "今天,天气 很好。": "今天天气很好",
    "ＡＢＣ１２３，你好！": "ABC123你好",
    "我 在 用 iphone ４ｓ": "我在用IPHONE4S",
    "增长3.5%": "增长35",
    "二〇二四年": "二〇二四年",
    "\u200b零宽\ufeff字符\u3000空格": "零宽字符空格",
    "don't stop": "DONTSTOP",
    "": "",
}
CODE_SWITCH = {
    "打开 bluetooth 设备": "打开BLUETOOTH设备",
    "play hello  world，谢谢": "PLAY HELLO WORLD谢谢",
    "don’t stop 'now'": "DON'T STOP NOW",
    "我用了 machine-learning": "我用了MACHINE LEARNING",
    "カタカナ and 漢字": "カタカナAND漢字",
    "": "",
}


@pytest.mark.parametrize("text", MANDARIN)
def test_mandarin_version_1_returns_what_it_always_returned(text):
    assert get_normalizer("mandarin")(text) == MANDARIN[text]
    assert MANDARIN_VERSION == "1", "new rules: pin what the new version returns"


@pytest.mark.parametrize("text", CODE_SWITCH)
def test_code_switch_version_1_returns_what_it_always_returned(text):
    assert get_normalizer("code-switch")(text) == CODE_SWITCH[text]
    assert CODE_SWITCH_VERSION == "1", "new rules: pin what the new version returns"


@pytest.mark.parametrize("name", ["mandarin", "code-switch", "none"])
def test_normalising_twice_changes_nothing(name):
    normalize = get_normalizer(name)
    for text in [*MANDARIN, *CODE_SWITCH]:
        assert normalize(normalize(text)) == normalize(text), text


def test_whisper_english_follows_whispers_rules_and_admits_that_it_has_no_spelling_map():
    normalize = get_normalizer("whisper-english")
    assert normalize(" Mr. Smith won't pay twenty-two dollars, um, for colour! ") == (
        "mister smith will not pay $22 for colour"
    )
    assert normalize.version.endswith("+no-spelling-map")


def test_a_spelling_map_is_used_and_named_in_the_version(tmp_path):
    (tmp_path / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    from_folder = get_normalizer("whisper-english", spelling=tmp_path)
    from_file = get_normalizer("whisper-english", spelling=tmp_path / "normalizer.json")
    other = get_normalizer("whisper-english", spelling={"colour": "kolor"})
    assert from_folder("The Colour") == from_file("The Colour") == "the color"
    assert from_folder.version == from_file.version
    assert len({from_folder.version, other.version, get_normalizer("whisper-english").version}) == 3


def test_whisper_basic_keeps_other_alphabets():
    assert get_normalizer("whisper-basic")("Grüß Gott, [Musik] Ελλάδα!") == "grüß gott ελλάδα"


def test_none_returns_the_text_untouched():
    assert get_normalizer("none")("  As It, is ") == "  As It, is "


def test_every_listed_normaliser_carries_the_name_it_is_listed_under():
    for name in NORMALIZERS:
        normalize = get_normalizer(name)
        assert normalize.name == name and normalize.version and normalize("") == ""


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'whisper-english'"):
        get_normalizer("wisper_english")


def test_a_spelling_map_that_cannot_take_effect_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no spelling map"):
        get_normalizer("mandarin", spelling={"a": "b"})
    with pytest.raises(ValueError, match="does not exist"):
        get_normalizer("whisper-english", spelling=tmp_path / "absent.json")
