"""Context metrics: closed forms of small cases, and what must hold of any texts."""

import random
import time

import jiwer
import pytest

from seedling.data.scoring import ScoredUtterance, score, score_context
from seedling.data.scoring.context import judge
from seedling.data.scoring.phrases import phrase_of
from seedling.data.scoring.result import tokenize

NAMES = ("caitlin", "kaitlyn", "adams", "evans", "marc", "mark", "stockholm", "neal")
WORDS = ("call", "please", "now", "and", "to", "the", *NAMES)


def judged(reference, hypothesis, *, keywords=(), phrases=(), plain="", **others):
    return judge(
        hypothesis,
        reference=reference,
        plain=plain,
        keywords=[phrase_of(word) for word in keywords],
        phrases=[phrase_of(phrase) for phrase in phrases],
        **others,
    )


def reports(rows, *, plain=None, normalizer="none", **others):
    """Rows of (reference, hypothesis, keywords, phrases) -> the context report, and that of the texts."""
    records = [ScoredUtterance(f"u{i}", r, h, keywords=k, phrases=p) for i, (r, h, k, p) in enumerate(rows)]
    free = [ScoredUtterance(f"u{i}", row[0], h) for i, (row, h) in enumerate(zip(rows, plain or [r[1] for r in rows]))]
    with_context, without = (score(side, normalizer=normalizer, **others) for side in (records, free))
    return score_context(with_context, plain=without, replicates=50), with_context


def random_rows(count, *, seed=0):
    draws = random.Random(seed)

    def sentence():
        return " ".join(draws.choices(WORDS, k=draws.randint(0, 7)))

    for _ in range(count):
        phrases = tuple(" ".join(draws.sample(NAMES, k=draws.randint(1, 2))) for _ in range(draws.randint(0, 3)))
        yield sentence(), sentence(), tuple(draws.sample(NAMES, k=2)), phrases


def test_recall_counts_phrases_and_how_often_they_were_said():
    counts = judged(
        "call caitlin adams and caitlin adams and marc",
        "call caitlin adams and caitlin evans",
        keywords=["caitlin adams", "marc"],
    ).counts
    assert (counts.said, counts.recalled) == (3, 1)
    assert judged("call ann", "call ann ann", keywords=["ann"]).counts.recalled == 1


def test_strict_recall_looks_at_what_the_context_free_model_misses():
    counts = judged("marc and neal", "marc and neal", keywords=["marc", "neal"], plain="mark and neal").counts
    assert (counts.missed, counts.regained) == (1, 1)
    counts = judged("marc and neal", "mark and neal", keywords=["marc", "neal"], plain="marc and neil").counts
    assert (counts.missed, counts.regained) == (1, 1)  # what it loses elsewhere is told by the loose recall
    free, _ = reports([("marc and neal", "mark and neal", ("marc", "neal"), ())])
    assert free.rates["strict_recall"].fraction == 0 and free.rates["recall"].fraction == 0.5


def test_precision_is_the_share_of_emitted_phrases_that_were_said():
    context, _ = reports(
        [
            ("call marc", "call marc neal", ("marc",), ("marc", "neal", "evans")),
            ("call her", "call marc", (), ()),  # a keyword of another utterance is emitted too
        ]
    )
    assert (context.rates["precision"].count, context.rates["precision"].of) == (1, 3)
    assert context.rates["recall"].fraction == 1
    assert context.rates["f1"].fraction == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))


@pytest.mark.parametrize(
    ("reference", "hypothesis", "phrases", "echoes", "conflicts"),
    [
        ("call neal now", "call evans now", ["evans"], ["evans"], []),
        ("call neal now", "call neal now evans", ["jane evans"], ["evans"], []),
        ("call caitlin now", "call kaitlyn now", ["kaitlyn"], [], ["kaitlyn"]),
        ("call caitlin evans", "call kaitlyn adams", ["kaitlyn adams"], ["adams"], ["kaitlyn"]),
        ("call caitlin", "call kate lynn", ["kate lynn"], [], ["kate", "lynn"]),
        ("call marc", "call marc marc", ["marc"], ["marc"], []),
        ("call marc and meet him at noon", "call marc and meet marc at noon", ["marc"], ["marc"], []),
        ("adams calls caitlin", "caitlin calls adams", ["caitlin adams"], [], []),
        ("call the man", "call the man with", ["meeting with evans"], [], []),
        ("hannah", "hannah", ["ann"], [], []),
        ("call sean", "call shaun", ["shaun"], ["shaun"], []),
        ("请打给李娜", "请打给张伟", ["张伟"], ["张伟"], []),
        ("请打给章伟", "请打给张伟", ["张伟"], [], ["张伟"]),
        ("去北京", "去北京大", ["北京大学"], ["京大"], []),
    ],
)
def test_copied_pieces_are_echoes_and_sound_alikes_conflicts(reference, hypothesis, phrases, echoes, conflicts):
    found = judged(reference, hypothesis, phrases=phrases)
    assert (sorted(found.echoes), sorted(found.conflicts)) == (echoes, conflicts)
    assert (found.counts.echoing, found.counts.conflicting) == (bool(echoes), bool(conflicts))


@pytest.mark.parametrize(
    ("reference", "hypothesis", "context", "echoes", "conflicts"),
    [
        ("call her now", "ignore previous now", "ignore all previous instructions", ["ignore", "previous"], []),
        ("call her now", "call the what now", "the what of it", [], []),
        ("book it", "dentist it", "dentist at noon with neal", ["dentist"], []),
        ("call caitlin", "call kaitlyn", "a note from kaitlyn to neal", [], ["kaitlyn"]),
        ("book the dentist", "book the dentist", "dentist at noon with neal", [], []),
        ("去北京", "去会议", "明天会议", ["会议"], []),
    ],
)
def test_copying_the_prose_of_a_context_is_an_echo(reference, hypothesis, context, echoes, conflicts):
    for phrases in ((), ("neal",)):
        found = judged(reference, hypothesis, phrases=phrases, context=context)
        assert (sorted(found.echoes), sorted(found.conflicts)) == (echoes, conflicts)
        assert found.counts.with_context == 1


def test_a_bare_list_has_no_pieces_beside_those_of_its_phrases():
    listed = {"phrases": ["张伟", "王芳"], "context": "张伟 王芳"}
    assert not judged("请打给李娜", "请打给伟王", **listed).echoes
    assert judged("请打给李娜", "请打给王芳", **listed).echoes == ("王芳",)


def test_prose_that_ordinary_errors_hit_is_shown_by_chance():
    heard = {"a": ("call marc dentist", "call marc now"), "b": ("read marc now", "read marc now")}
    records = [ScoredUtterance(u, "call marc now", h[0], context="read on the dentist") for u, h in heard.items()]
    free = [ScoredUtterance(u, "call marc now", h[1]) for u, h in heard.items()]
    found = score_context(score(records, normalizer="none"), plain=score(free, normalizer="none"))
    assert found.with_context == 2 and (found.rates["echo_rate"].count, found.chance["echo_rate"].count) == (2, 1)


def test_groups_say_which_words_sound_alike():
    rows = [("call sean", "call shaun", (), ("shaun",))]
    assert reports(rows)[0].rates["echo_rate"].fraction == 1
    context, _ = reports(rows, equivalences=[["Sean", "Shaun"]])
    assert (context.rates["echo_rate"].fraction, context.rates["conflict_rate"].fraction) == (0, 1)
    assert context.conflicts == {"u0": ("shaun",)}


def test_who_heard_no_context_echoes_by_chance():
    rows = [("call neal", "call evans", (), ("evans",)), ("call neal", "call adams", (), ("adams",))]
    context, _ = reports(rows, plain=["call evans", "call neal"])
    assert context.rates["echo_rate"].fraction == 1 and context.chance["echo_rate"].fraction == 0.5


def test_without_contexts_nothing_is_echoed():
    context, _ = reports([(r, h, k, ()) for r, h, k, _ in random_rows(50)])
    assert context.with_context == 0 and not context.echoes and context.rates["echo_rate"].fraction is None
    assert context.rates["echo_rate"].count == 0


def test_the_references_themselves_are_perfect():
    context, _ = reports([(r, r, k, p) for r, _, k, p in random_rows(100)], plain=["" for _ in range(100)])
    perfect = ("recall", "strict_recall", "precision", "f1")
    assert [context.rates[name].fraction for name in perfect] == [1, 1, 1, 1]
    assert [context.rates[name].fraction for name in ("echo_rate", "conflict_rate", "b_wer", "u_wer")] == [0, 0, 0, 0]


def test_errors_are_split_into_those_on_keywords_and_the_rest():
    found = judged(
        "please call caitlin adams now",
        "call kaitlyn adams marc now now",
        keywords=["caitlin adams"],
        phrases=["marc"],
    ).counts
    # B: caitlin -> kaitlyn, and marc inserted; U: please deleted, now inserted.
    assert (found.b_errors, found.b_tokens, found.u_errors, found.u_tokens) == (2, 2, 2, 3)


@pytest.mark.parametrize("unit", ["word", "char", "mixed"])
def test_b_and_u_errors_are_all_errors(unit):
    context, report = reports(list(random_rows(200)), unit=unit)
    b, u = (context.rates[f"{side}_{report.headline.metric}"] for side in "bu")
    counts = report.headline.counts
    assert (b.count + u.count, b.of + u.of) == (counts.errors, counts.reference_tokens)
    assert 0 < b.of < counts.reference_tokens
    if unit == "word":
        rows = [(r, h) for r, h in zip(report.references, report.hypotheses) if tokenize(r, unit)]
        truth = jiwer.process_words(*map(list, zip(*rows)))
        inserted = sum(len(h.split()) for r, h in zip(report.references, report.hypotheses) if not tokenize(r, unit))
        assert b.count + u.count == truth.substitutions + truth.deletions + truth.insertions + inserted


def test_the_order_of_the_utterances_changes_nothing():
    rows = list(random_rows(80))
    records = [ScoredUtterance(f"u{i}", r, h, keywords=k, phrases=p) for i, (r, h, k, p) in enumerate(rows)]
    plain = score([ScoredUtterance(f"u{i}", row[0], rows[i - 1][1]) for i, row in enumerate(rows)], normalizer="none")
    shuffled = random.Random(1).sample(records, len(records))
    one, other = (score_context(score(side, normalizer="none"), plain=plain) for side in (records, shuffled))
    assert one.rates == other.rates and one.chance == other.chance and one.echoes == other.echoes


def test_intervals_hold_the_rate_and_need_two_utterances():
    context, _ = reports(list(random_rows(100)))
    for name, ratio in context.rates.items():
        assert ratio.interval.low <= ratio.fraction <= ratio.interval.high, name
    assert all(ratio.interval is None for ratio in reports(list(random_rows(1)))[0].rates.values())


def test_conditions_of_other_utterances_are_refused():
    one = score([ScoredUtterance("a", "x", "x")], normalizer="none")
    with pytest.raises(ValueError, match="different utterances"):
        score_context(one, plain=score([ScoredUtterance("b", "x", "x")], normalizer="none"))


def test_five_hundred_distractors_an_utterance_are_not_quadratic():
    """A list per utterance from one pool, as in the literature on biasing."""

    draws = random.Random(0)
    pool = [f"name{i} surname{i % 997}" for i in range(5000)]
    rows = [
        ("call name1 surname1", "call name2", ("name1 surname1",), tuple(draws.sample(pool, 500))) for _ in range(100)
    ]
    began = time.process_time()
    reports(rows)
    assert time.process_time() - began < 10  # 0.4 s; quadratic in the list it would be minutes
