"""Context text: what cleaning keeps and drops, and that no context gives its transcript away."""

import random

import pytest

from seedling.data.contexts.text import clean_context, contains, leaks, words_of

WORDS = [f"w{number}" for number in range(40)]


def test_cleaning_drops_what_has_no_shape_and_keeps_every_script():
    assert clean_context("a\n\tb\r\n  c\x00\x1b[31m\u200b\u202e\ufeff d\u2028e\u00a0f") == "a b c[31m d e f"
    kept = "שלום مرحبا हिन्दी 你好，张三 한국어 ไทย 👩\u200d🚀 می\u200cخواهم Ünïcödé"
    assert clean_context(kept) == kept
    assert clean_context("\ud800x") == "x"


def test_cleaning_twice_is_cleaning_once_and_the_result_is_one_line_of_utf8():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(chr(rng.choice([rng.randrange(0x300), rng.randrange(0x110000)])) for _ in range(30))
        cleaned = clean_context(text)
        assert clean_context(cleaned) == cleaned == cleaned.strip()
        assert len(cleaned.splitlines()) <= 1 and cleaned.encode("utf-8") is not None


def test_chinese_is_compared_by_character():
    assert words_of("打给 Anna 张三!") == ("打", "给", "anna", "张", "三")
    assert contains("请打给张三。", "张三") and not contains("请打给张三。", "张四")


def longest_run(a, b):
    """By the table of common suffixes: another way than the code's."""
    best, previous = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for at, y in enumerate(b):
            row.append(previous[at] + 1 if x == y else 0)
        best, previous = max(best, *row), row
    return best


def test_a_leak_is_a_common_run_of_the_share_of_the_transcript():
    rng = random.Random(2)
    seen = {True: 0, False: 0}
    for _ in range(3000):
        said = rng.choices(WORDS[: rng.choice([3, 40])], k=rng.randint(1, 12))
        written = rng.choices(WORDS[: rng.choice([3, 40])], k=rng.randint(0, 20))
        if rng.random() < 0.5:
            start, at = rng.randrange(len(said)), rng.randint(0, len(written))
            written[at:at] = said[start : start + rng.randint(1, 12)]
        share = rng.choice([0.3, 0.6, 1.0])
        expected = longest_run(said, written) >= share * len(said) - 1e-9
        assert leaks(", ".join(written), " ".join(said).upper(), share=share) == expected
        seen[expected] += 1
    assert min(seen.values()) > 500


@pytest.mark.parametrize(
    "context, leak",
    [
        ("mark, caitlin adams, dublin", False),  # a keyword among others, though it is 2 of 3 words
        ("remind me to call caitlin adams", True),
        ("they call caitlin often", True),  # 2 of 3 words, not all of a keyword
        ("caitlin, call, adams", False),
        ("Call -- Caitlin Adams!", True),
        ("", False),
    ],
)
def test_naming_a_keyword_is_no_leak(context, leak):
    assert leaks(context, "call caitlin adams", keywords=["caitlin adams"]) == leak


def test_an_utterance_that_is_a_name_may_have_it_among_others_and_not_alone():
    assert not leaks("caitlin, mark", "caitlin", keywords=["caitlin"])
    assert leaks("Caitlin.", "caitlin", keywords=["caitlin"])
    assert leaks("yes, mark", "yes")
    assert leaks("mark caitlin", "mark caitlin", keywords=["mark", "caitlin"])


def test_ten_thousand_words_are_compared_in_a_moment():
    rng = random.Random(3)
    said = rng.choices([f"v{number}" for number in range(500)], k=10_000)
    assert leaks(" ".join(said[2000:9000]), " ".join(said))
    assert not leaks(" ".join(said[2000:5000] + said[2000:6000]), " ".join(said))
