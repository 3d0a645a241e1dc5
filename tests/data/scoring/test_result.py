"""`score` and `compare`: stamps, sound-alikes, refusals of what would mislead, speed and independence of torch."""

import random
import subprocess
import sys
import time

import pytest

from seedling.data.scoring import ScoredUtterance, compare, get_normalizer, score

NAMES = [["Caitlin", "Kaitlyn"], ["marc", "mark"]]


def records_of(*pairs):
    return [ScoredUtterance(f"u{i}", reference, hypothesis) for i, (reference, hypothesis) in enumerate(pairs)]


def test_all_three_rates_come_with_the_headline_chosen_by_unit():
    report = score(records_of(("打开 wifi 吧", "打开 wife 吧")), normalizer="code-switch", unit="char")
    assert report.headline.metric == "cer" and set(report.rates) == {"wer", "cer", "mer"}
    assert report.rates["mer"].counts == (1, 0, 0, 3)
    assert report.rates["cer"].counts == (1, 0, 0, 6)


def test_the_normaliser_chooses_the_unit_unless_told():
    pairs = records_of(("今天", "今天"))
    assert score(pairs, normalizer="mandarin").headline.metric == "cer"
    assert score(pairs, normalizer="code-switch").headline.metric == "mer"
    assert score(pairs, normalizer="none").headline.metric == "wer"


def test_names_that_sound_alike_are_merged_beside_the_plain_rate():
    pairs = records_of(("call Kaitlyn now", "call caitlin now"), ("call Mark", "call park"), ("call Marc", "call Marc"))
    report = score(pairs, normalizer="whisper-english", equivalences=NAMES)
    assert report.headline.counts.errors == 2 and report.merged.counts.errors == 1
    assert report.headline.counts == score(pairs, normalizer="whisper-english").headline.counts
    assert report.stamp.equivalences is not None


def test_merging_works_by_character_too():
    report = score(records_of(("call marc", "call mark")), normalizer="none", unit="char", equivalences=NAMES)
    assert report.headline.counts.errors == 1 and report.merged.counts.errors == 0


def test_the_stamp_of_the_groups_does_not_depend_on_their_order():
    pairs = records_of(("a", "a"))
    first = score(pairs, normalizer="none", equivalences=NAMES).stamp
    assert first == score(pairs, normalizer="none", equivalences=[g[::-1] for g in NAMES[::-1]]).stamp
    assert first != score(pairs, normalizer="none", equivalences=NAMES[:1]).stamp


@pytest.mark.parametrize(
    "groups, message",
    [
        (["marc", "mark"], "bare word"),
        ([["mary ann", "marian"]], "not one word"),
        ([["marc", "mark"], ["mark", "markus"]], "two groups"),
    ],
)
def test_groups_that_cannot_be_merged_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        score(records_of(("a", "a")), normalizer="none", equivalences=groups)


def test_words_cannot_be_counted_after_a_normaliser_that_drops_spaces():
    with pytest.raises(ValueError, match="set unit to 'char'"):
        score(records_of(("a", "a")), normalizer="mandarin", unit="word")
    with pytest.raises(ValueError, match="use 'code-switch'"):
        score(records_of(("a", "a")), normalizer="mandarin", equivalences=NAMES)


@pytest.mark.parametrize("normalizer", ["mandarin", "code-switch", "none"])
def test_a_torn_character_is_one_error(normalizer):
    report = score(records_of(("今天见", "今天\ufffd"), ("今天见", "今天见")), normalizer=normalizer, unit="char")
    assert report.rates["cer"].counts.errors == 1 and report.rates["cer"].counts.reference_tokens == 6


def test_empty_and_repeated_input_is_refused():
    with pytest.raises(ValueError, match="records is empty"):
        score([], normalizer="none")
    with pytest.raises(ValueError, match="'u' occurs 2 times"):
        score([ScoredUtterance("u", "a", "a")] * 2, normalizer="none")


def test_raw_text_is_kept_and_normalised_once():
    calls = []
    inner = get_normalizer("none")
    counting = type(inner)("counting", "1", "word", lambda text: calls.append(text) or text.lower())
    report = score(records_of(("A b", "a B"), ("A b", "A b")), normalizer=counting)
    assert sorted(calls) == ["A b", "a B"]
    assert report.utterances[0].reference == "A b" and report.references == ("a b", "a b")


def test_the_worst_utterances_come_first_and_correct_ones_never():
    report = score(records_of(("a b", "a b"), ("a b c", "x y c"), ("a b c d", "a"), ("a b", "x y")), normalizer="none")
    assert report.worst(10) == [2, 3, 1] and report.worst(1) == [2]


def test_real_time_factor_is_weighted_by_audio_and_skips_what_was_not_timed():
    records = [
        ScoredUtterance("a", "x", "x", seconds=1.0, rtf=1.0),
        ScoredUtterance("b", "x", "x", seconds=9.0, rtf=0.0),
        ScoredUtterance("c", "x", "x", seconds=5.0),
    ]
    report = score(records, normalizer="none")
    assert report.rtf == pytest.approx(0.1) and report.seconds == 15.0
    assert score(records[2:], normalizer="none").rtf is None


def test_two_systems_are_compared_on_the_same_utterances_in_any_order():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdef", k=8)) for _ in range(200)]
    worse = score(records_of(*((t, t[2:]) for t in texts)), normalizer="none")
    best = score(records_of(*((t, t) for t in texts))[::-1], normalizer="none")
    change = compare(worse, best)
    assert change.difference == pytest.approx(-1 / 8) and change.probability_of_improvement == 1.0
    assert compare(best, worse).difference == pytest.approx(1 / 8)


def test_reports_that_were_made_differently_are_not_compared():
    one = score(records_of(("a", "a"), ("b", "b")), normalizer="none")
    with pytest.raises(ValueError, match="not comparable"):
        compare(one, score(records_of(("a", "a"), ("b", "b")), normalizer="none", unit="char"))
    with pytest.raises(ValueError, match="different utterances"):
        compare(one, score(records_of(("a", "a")), normalizer="none"))
    with pytest.raises(ValueError, match="two different references"):
        compare(one, score(records_of(("a", "a"), ("c", "b")), normalizer="none"))


def test_twenty_thousand_utterances_score_in_seconds():
    rng = random.Random(0)
    words = [f"word{i}" for i in range(5_000)]
    pairs = []
    for _ in range(20_000):
        reference = rng.choices(words, k=rng.randint(5, 30))
        pairs.append(
            (" ".join(reference), " ".join(w if rng.random() > 0.05 else rng.choice(words) for w in reference))
        )
    start = time.process_time()
    score(records_of(*pairs), normalizer="none")
    # 1.5 s on one core of a small machine; the bound catches a quadratic step, not a slow day.
    assert time.process_time() - start < 12


def test_scoring_starts_without_torch():
    program = (
        "import sys; from seedling.data.scoring import ScoredUtterance, score;"
        "score([ScoredUtterance('u', 'a', 'b')], normalizer='mandarin');"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "score([ScoredUtterance('u', 'a', 'b')], normalizer='whisper-english');"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
