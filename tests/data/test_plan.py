"""The plan: exactly once, the same for any number of ranks, resumable anywhere, bounded memory, little padding."""

import hashlib
import json
import time
import tracemalloc
from dataclasses import replace
from itertools import chain, takewhile

import numpy as np
import pytest

from seedling.data.packing import into_whole_steps, pack, slice_max
from seedling.data.plan import Cursor, MicroBatch, Plan, PlanConfig

ROW = np.dtype([("key", "S16"), ("samples", "<i8"), ("sample_rate", "<i4"), ("text_chars", "<i4")])
RATE = 16000


class SyntheticCorpus:
    """An index without audio. `rows_served` counts what a plan reads of it."""

    fingerprint = "synthetic"

    def __init__(self, rows_per_shard, make_rows):
        self.shards = [f"shard-{number:06d}.tar" for number in range(len(rows_per_shard))]
        self.rows_per_shard, self.make_rows = rows_per_shard, make_rows
        self.shards_opened = 0

    @property
    def rows_S(self):
        return np.array(self.rows_per_shard)

    def expect(self, shards):
        pass

    def index(self, shard):
        self.shards_opened += 1
        return self.make_rows(shard, self.rows_per_shard[shard])


def rows_of(seconds, text_chars, *, shard=0):
    rows = np.zeros(len(seconds), dtype=ROW)
    rows["key"] = [f"{shard}-{row}".encode() for row in range(len(seconds))]
    rows["samples"], rows["sample_rate"] = np.round(np.asarray(seconds) * RATE), RATE
    rows["text_chars"] = text_chars
    return rows


def corpus_of(*seconds_per_shard):
    """A corpus of given lengths, with 10 characters a second."""
    shards = [rows_of(s, np.asarray(s) * 10, shard=number) for number, s in enumerate(seconds_per_shard)]
    return SyntheticCorpus([len(rows) for rows in shards], lambda shard, _: shards[shard])


def random_corpus(seed, *, utterances, shards=5, longest=20.0):
    random = np.random.default_rng(seed)
    cuts = np.sort(random.integers(0, utterances + 1, shards - 1))
    return corpus_of(*np.split(random.uniform(0.05, longest, utterances), cuts))


def librispeech_like(*, utterances, shards):
    """Lengths as in read audiobooks: most of them 12 to 17 s, cut at silences, some short, mean 12.7 s."""

    def make_rows(shard, count):
        random = np.random.default_rng(shard)
        rows = np.zeros(count, dtype=ROW)
        common, rest = random.normal(14.2, 1.2, count), random.uniform(1.5, 17.0, count)
        rows["samples"] = np.where(random.random(count) < 0.7, common, rest).clip(1.3, 35) * RATE
        rows["sample_rate"], rows["text_chars"] = RATE, rows["samples"] // 1100
        return rows

    return SyntheticCorpus(
        [utterances * (i + 1) // shards - utterances * i // shards for i in range(shards)], make_rows
    )


def utterances_of(steps):
    return [u for step in steps for micro_batch in step.micro_batches for u in micro_batch.utterances]


def small_plan(corpus, *, micro_batches_per_step=4, seed=3, **limits):
    defaults = {"max_seconds": 60.0, "window_utterances": 100}
    return Plan(corpus, PlanConfig(**(defaults | limits)), seed=seed, micro_batches_per_step=micro_batches_per_step)


def assert_within_limits(plan, micro_batch):
    rows = [plan.corpus.index(shard)[row] for shard, row in micro_batch.utterances]
    if rows:
        dearest = max(plan.cfg.cost(row["samples"] / row["sample_rate"]) for row in rows)
        assert dearest * len(rows) <= plan.cfg.max_seconds * (1 + 1e-6)
        if plan.cfg.max_tokens:
            assert max(row["text_chars"] for row in rows) * len(rows) <= plan.cfg.max_tokens


@pytest.mark.parametrize("block", range(10))
def test_every_utterance_is_planned_exactly_once_an_epoch_for_any_sizes_ranks_and_limits(block):
    for case in range(block * 20, block * 20 + 20):  # 200 cases in all
        random = np.random.default_rng(case)
        ranks = int(random.integers(1, 9))
        micro_batches_per_step = ranks * int(random.integers(1, 4))
        corpus = random_corpus(
            case,
            utterances=int(random.integers(4 * micro_batches_per_step, 800)),
            shards=int(random.integers(1, 12)),
        )
        plan = small_plan(
            corpus,
            micro_batches_per_step=micro_batches_per_step,
            seed=case,
            max_seconds=float(random.uniform(12, 120)),
            max_tokens=int(random.choice([0, 150, 600])),
            quadratic_seconds=float(random.choice([0, 30])),
            window_utterances=int(random.integers(1, 400)),
            min_seconds=float(random.choice([0, 0.5])),
            shuffle=bool(random.random() < 0.8),
        )
        refused = {(corpus.shards.index(r.shard), r.row) for r in plan.refused()}
        expected = {(s, r) for s, n in enumerate(corpus.rows_per_shard) for r in range(n)} - refused
        steps = list(plan.steps(epochs=2))
        running = iter(range(10**9))
        for epoch in (0, 1):
            own = [step for step in steps if step.micro_batches[0].epoch == epoch]
            seen = utterances_of(own)
            assert len(seen) == len(expected) and set(seen) == expected, f"case {case}, epoch {epoch}"
            assert [step.step for step in own] == list(range(len(own)))
            for step in own:
                assert len(step.micro_batches) == micro_batches_per_step
                assert [m.index for m in step.micro_batches] == [next(running) for _ in step.micro_batches]
                shares = [step.share(rank, world_size=ranks) for rank in range(ranks)]
                assert {len(share) for share in shares} == {micro_batches_per_step // ranks}
                assert [m for turn in zip(*shares) for m in turn] == step.micro_batches
                for micro_batch in step.micro_batches:
                    assert_within_limits(plan, micro_batch)
            empty = [m.index for step in own[:-4] for m in step.micro_batches if not m.utterances]
            assert not empty, f"case {case}: empty micro-batches before the last steps of the epoch"
        summary = plan.summary(epoch=1)
        assert summary.steps == steps[-1].step + 1
        assert (summary.utterances, summary.num_refused) == (len(expected), len(refused))


def test_the_plan_is_refused_a_rank_count_that_does_not_divide_a_step():
    step = next(small_plan(random_corpus(0, utterances=200)).steps())
    with pytest.raises(ValueError, match=r"4 micro-batches per step cannot be shared by 3 ranks.*multiple of 3"):
        step.share(0, world_size=3)


def test_resuming_at_any_cursor_continues_the_same_sequence_on_any_number_of_ranks():
    plan = small_plan(random_corpus(1, utterances=700), micro_batches_per_step=6)
    whole = list(plan.steps(epochs=3))
    assert len({step.cursor.window for step in whole}) > 1, "the corpus must span several windows"
    for position in range(0, len(whole), 3):
        saved = json.loads(json.dumps(whole[position].cursor.to_dict()))
        # A fresh plan, as in a new process; the ranks of before play no part in the cursor.
        again = small_plan(random_corpus(1, utterances=700), micro_batches_per_step=6)
        rest = list(again.steps(Cursor.from_dict(saved), epochs=3))
        assert rest == whole[position + 1 :]
        for ranks in (1, 2, 3, 6):
            mine = [m for step in rest for m in step.share(0, world_size=ranks)]
            assert mine == [m for step in whole[position + 1 :] for m in step.micro_batches][::ranks]


def test_restoring_reads_one_window_however_much_was_consumed():
    corpus = librispeech_like(utterances=40_000, shards=40)
    plan = Plan(corpus, PlanConfig(window_utterances=4000), seed=0, micro_batches_per_step=8)
    opened = []
    for step in plan.steps(epochs=1):
        if step.cursor.window in (1, 9) and step.cursor.offset == 5:
            before = corpus.shards_opened
            next(plan.steps(step.cursor))
            opened.append(corpus.shards_opened - before)
    assert len(opened) == 2
    assert max(opened) <= 25, f"a window of 4000 utterances in shards of 1000 opened {opened} shards"


def test_a_million_utterances_are_planned_in_seconds_and_in_the_memory_of_a_window():
    # Measured: 1.1 s for the summary, 1.3 s for all steps of an epoch (benchmarks/loader.py --only plan).
    corpus = librispeech_like(utterances=1_000_000, shards=400)
    cfg = PlanConfig(max_seconds=300, window_utterances=20_000)
    started = time.perf_counter()
    plan = Plan(corpus, cfg, seed=0, micro_batches_per_step=8)
    summary = plan.summary()
    seconds = time.perf_counter() - started
    assert summary.utterances == 1_000_000
    assert seconds < 60, f"{seconds:.0f} s"
    tracemalloc.start()
    plan = Plan(corpus, cfg, seed=0, micro_batches_per_step=8)
    planned = sum(1 for _ in takewhile(lambda step: step.cursor.window < 4, plan.steps()))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert planned > 300
    # The (shard, row) pairs of a million utterances alone would be 120 MB.
    assert peak_bytes < 25e6, f"{peak_bytes / 1e6:.0f} MB"


def test_a_plan_is_opened_without_reading_an_index():
    corpus = librispeech_like(utterances=100_000, shards=100)
    plan = Plan(corpus, PlanConfig(window_utterances=4000), seed=0, micro_batches_per_step=8)
    assert corpus.shards_opened == 0
    next(plan.steps())
    assert corpus.shards_opened <= 10, "a window of 4000 utterances lies in nine pieces of 500, or ten"


def test_a_long_epoch_is_estimated_from_a_few_windows_within_five_percent(monkeypatch):
    """Shards differ by a factor of four in mean length, and some utterances are refused."""

    def make_rows(shard, count):
        random = np.random.default_rng(shard)
        mean = 3.0 * 4.0 ** np.random.default_rng(shard // 50).random()
        return rows_of(random.gamma(4.0, mean / 4, count).clip(0.05), random.integers(1, 200, count), shard=shard)

    corpus = SyntheticCorpus([200] * 1000, make_rows)
    limits = {"min_seconds": 0.5, "max_utterance_seconds": 40, "max_tokens": 3000}
    cfg = PlanConfig(max_seconds=120, window_utterances=1000, **limits)
    plan = Plan(corpus, cfg, seed=0, micro_batches_per_step=4)
    assert plan.num_windows == 200
    exact = plan.summary()
    monkeypatch.setattr("seedling.data.plan.EXACT_UTTERANCES", 199_999)
    monkeypatch.setattr("seedling.data.plan.SAMPLED_UTTERANCES", 20_000)
    before = corpus.shards_opened
    estimate = plan.summary()
    assert corpus.shards_opened - before <= 2 * 11 * 20, "more than the shards of twenty windows were opened"
    assert (exact.sampled_windows, estimate.sampled_windows) == (0, 20)
    for name in ("steps", "micro_batches", "utterances", "seconds"):
        assert getattr(estimate, name) == pytest.approx(getattr(exact, name), rel=0.05), name
    assert estimate.padding_fraction == pytest.approx(exact.padding_fraction, abs=0.005)
    assert estimate.num_refused == pytest.approx(exact.num_refused, rel=0.3)
    assert estimate.refused and set(estimate.refused) <= set(exact.refused)
    assert "estimated from 20 of 200 windows" in plan.amount(estimate)
    assert estimate == plan.summary(), "every rank must come to the same estimate"

    def price(micro_batch):
        rows = [corpus.index(shard)[row] for shard, row in micro_batch.utterances]
        return max(row["samples"] / RATE for row in rows) * len(rows)

    assert price(exact.largest) >= price(estimate.largest) >= 0.98 * price(exact.largest)


def test_padding_is_at_most_three_per_cent_on_a_librispeech_like_mix():
    plan = Plan(
        librispeech_like(utterances=28_000, shards=10), PlanConfig(max_seconds=300), seed=0, micro_batches_per_step=8
    )
    summary = plan.summary()
    as_they_come = fixed_size_padding(plan, 24)
    print(f"padding {summary.padding_fraction:.2%}; in batches of 24 utterances as they come {as_they_come:.2%}")
    assert 0 < summary.padding_fraction <= 0.03
    padded = sum(max(lengths) * len(lengths) for lengths in micro_batch_lengths(plan))
    valid = sum(sum(lengths) for lengths in micro_batch_lengths(plan))
    assert summary.padding_fraction == pytest.approx(1 - valid / padded)
    assert summary.seconds == pytest.approx(valid)


def micro_batch_lengths(plan):
    shards = [plan.corpus.index(shard)["samples"] / RATE for shard in range(len(plan.corpus.shards))]
    for step in plan.steps(epochs=1):
        for micro_batch in step.micro_batches:
            yield [float(shards[shard][row]) for shard, row in micro_batch.utterances]


def fixed_size_padding(plan, size):
    lengths = np.concatenate([plan.corpus.index(shard)["samples"] for shard in range(len(plan.corpus.shards))])
    lengths = np.random.default_rng(0).permutation(lengths)[: len(lengths) // size * size].reshape(-1, size)
    return 1 - lengths.sum() / (lengths.max(axis=1).sum() * size)


def test_the_summary_names_the_dearest_micro_batch():
    plan = small_plan(random_corpus(4, utterances=900), quadratic_seconds=20.0)

    def price(micro_batch):
        rows = [plan.corpus.index(shard)[row] for shard, row in micro_batch.utterances]
        return max(plan.cfg.cost(row["samples"] / RATE) for row in rows) * len(rows)

    dearest = max((m for step in plan.steps(epochs=1) for m in step.micro_batches), key=price)
    assert plan.summary().largest == dearest


def test_utterances_outside_the_limits_are_refused_by_key_with_the_reason():
    lengths = [3.0] * 30
    lengths[4], lengths[9], lengths[14], lengths[20] = 31.0, 0.04, 0.0, 25.0
    rows = rows_of(lengths, 30)
    rows["text_chars"][25] = 500
    plan = small_plan(
        SyntheticCorpus([30], lambda *_: rows), max_seconds=28.0, max_utterance_seconds=24.0, max_tokens=400
    )
    refused = plan.summary().refused
    assert [(r.shard, r.key) for r in refused] == [("shard-000000.tar", f"0-{row}") for row in (4, 9, 14, 20, 25)]
    reasons = [r.reason for r in refused]
    assert "31.00 s is above max_utterance_seconds (24.0)" in reasons[0]
    assert "0.040 s is below min_seconds (0.1)" in reasons[1]
    assert "no audio" in reasons[2]
    assert "500 characters are above max_tokens (400)" in reasons[4]
    assert plan.summary().num_refused == 5


def test_the_quadratic_term_refuses_an_utterance_that_alone_is_too_dear():
    plan = small_plan(corpus_of([3.0] * 20 + [25.0]), max_seconds=30.0, quadratic_seconds=25.0)
    (refused,) = plan.refused()
    assert refused.key == "0-20" and "25.00 s cost 50.00 s, above max_seconds (30.0)" in refused.reason


def test_stretch_leaves_room_for_slowed_speech():
    plan = small_plan(corpus_of([10.0] * 40), max_seconds=30.0, stretch=1 / 0.9)
    sizes = {len(m.utterances) for step in plan.steps(epochs=1) for m in step.micro_batches}
    assert max(sizes) == 2, "three utterances of 10 s are 33.3 s when slowed to 0.9"


def test_held_out_data_may_be_too_few_for_a_step_and_are_read_whole_in_order():
    plan = small_plan(corpus_of([3.0, 1.0, 2.0]), micro_batches_per_step=8, shuffle=False)
    (step,) = plan.steps(epochs=1)
    assert len(step.micro_batches) == 8
    assert sorted(utterances_of([step])) == [(0, 0), (0, 1), (0, 2)]
    shares = [step.share(rank, world_size=4) for rank in range(4)]
    assert [len(share) for share in shares] == [2] * 4
    summary = plan.summary()
    assert (summary.steps, summary.utterances, summary.seconds, summary.num_refused) == (1, 3, 6.0, 0)
    assert summary.largest.utterances == ((0, 0),)
    with pytest.raises(ValueError, match=r"0 utterances within the limits \(3 in all\); widen"):
        small_plan(corpus_of([3.0, 1.0, 2.0]), shuffle=False, min_seconds=5.0).summary()


def test_too_few_utterances_for_a_step_are_an_error_that_names_both_numbers():
    with pytest.raises(ValueError, match=r"3 utterances.*4 micro-batches.*lower global_batch_seconds"):
        small_plan(corpus_of([3.0] * 3))
    plan = small_plan(corpus_of([3.0] * 3 + [500.0] * 9))
    with pytest.raises(ValueError, match=r"3 utterances within the limits \(12 in all\).*4 micro-batches"):
        plan.summary()
    with pytest.raises(ValueError, match="3 utterances within the limits"):
        next(plan.steps())


def test_an_epoch_with_hardly_more_utterances_than_a_step_still_fills_every_step():
    # Five utterances that fill a micro-batch each, four micro-batches a step: no split can help, three stay empty.
    steps = list(small_plan(corpus_of([59.0] * 5)).steps(epochs=1))
    assert sorted(utterances_of(steps)) == [(0, row) for row in range(5)]
    assert [len(step.micro_batches) for step in steps] == [4, 4]
    # Eight can be split: none is empty.
    steps = list(small_plan(corpus_of([10.0] * 8)).steps(epochs=1))
    assert all(m.utterances for step in steps for m in step.micro_batches)


def test_the_last_steps_of_an_epoch_share_the_remainder():
    plan = small_plan(corpus_of([6.0] * 1000), micro_batches_per_step=16, window_utterances=10_000)
    sizes = [sum(len(m.utterances) for m in step.micro_batches) for step in plan.steps(epochs=1)]
    assert sizes[:-2] == [160] * (len(sizes) - 2)
    assert sum(sizes) == 1000 and min(sizes[-2:]) >= 40, sizes


def test_epochs_and_seeds_shuffle_differently_and_equal_seeds_equally():
    corpus = random_corpus(6, utterances=500)

    def order(seed, epoch):
        return [
            m
            for s in small_plan(corpus, seed=seed).steps(Cursor(epoch=epoch), epochs=epoch + 1)
            for m in s.micro_batches
        ]

    def company(micro_batches):  # which utterances share a micro-batch
        return {frozenset(m.utterances) for m in micro_batches}

    assert order(1, 0) == order(1, 0)
    assert len(company(order(1, 0)) & company(order(1, 1))) < 0.2 * len(order(1, 0))
    assert len(company(order(1, 0)) & company(order(2, 0))) < 0.2 * len(order(1, 0))


def test_micro_batches_of_all_lengths_are_spread_over_the_window():
    plan = Plan(librispeech_like(utterances=20_000, shards=4), PlanConfig(), seed=0, micro_batches_per_step=4)
    longest = np.array([max(lengths) for lengths in micro_batch_lengths(plan)])
    halves = np.array_split(longest, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.05 * longest.mean()


def test_without_shuffling_every_epoch_is_the_same_and_windows_keep_the_order_of_the_shards():
    plan = small_plan(random_corpus(7, utterances=600, longest=5.0), shuffle=False)
    first, second = (
        [m.utterances for s in plan.steps(Cursor(epoch=e), epochs=e + 1) for m in s.micro_batches] for e in (0, 1)
    )
    assert first == second
    places = [shard for micro_batch in first for shard, _ in micro_batch]
    assert np.mean(places[: len(places) // 5]) < np.mean(places[-len(places) // 5 :])


def test_a_large_shard_is_drawn_on_in_another_order_each_epoch():
    plan = small_plan(corpus_of([2.0] * 2000), window_utterances=200)
    starts = [
        min(row for m in next(plan.steps(Cursor(epoch=epoch))).micro_batches for _, row in m.utterances)
        for epoch in range(8)
    ]
    assert len(set(starts)) > 1, "the first window of every epoch began with the same rows"


def test_the_sequence_of_a_seed_does_not_change_with_versions():
    """Whoever changes what is planned must raise PLAN_VERSION, or old cursors mean something else."""
    random = np.random.Generator(np.random.Philox(5)).random  # a double per raw word: stable
    plan = small_plan(corpus_of(1 + 10 * random(300), 1 + 10 * random(200)), seed=11, max_tokens=500)
    steps = [[list(map(list, m.utterances)) for m in step.micro_batches] for step in plan.steps(epochs=2)]
    digest = hashlib.sha256(json.dumps(steps).encode()).hexdigest()
    assert digest[:16] == "a64f6fab6efe7478"


def test_fingerprints_tell_plans_apart():
    corpus = random_corpus(8, utterances=100)
    base = small_plan(corpus)
    assert base.fingerprint == small_plan(corpus).fingerprint
    others = [
        small_plan(corpus, seed=4),
        small_plan(corpus, micro_batches_per_step=2),
        small_plan(corpus, max_seconds=61.0),
    ]
    assert len({plan.fingerprint for plan in [base, *others]}) == 4


def test_a_cursor_of_another_plan_is_refused():
    plan = small_plan(random_corpus(9, utterances=300))
    with pytest.raises(ValueError, match=r"window 99 of \d+; it belongs to another plan"):
        next(plan.steps(Cursor(window=99)))
    with pytest.raises(ValueError, match="step 50 of a shorter window"):
        next(plan.steps(replace(Cursor(), offset=50, step=50)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_seconds": 0.0}, "train.micro_batch_seconds is 0.0; it must be above 0"),
        ({"length_jitter": 1.5}, "data.limits.length_jitter is 1.5"),
        ({"max_utterance_seconds": 90.0}, r"max_utterance_seconds \(90.0\) costs 90 s.*micro_batch_seconds \(60.0\)"),
    ],
)
def test_settings_that_cannot_work_are_errors(setting, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**setting)


def test_packing_fills_up_to_the_limit_and_not_beyond():
    cost = np.array([0.1, 0.1, 0.1, 0.2, 0.3, 0.3])
    tokens = np.array([1, 1, 1, 1, 9, 1])
    slices = pack(cost, tokens, max_cost=0.3, max_tokens=0)
    assert slices.tolist() == [[0, 3], [3, 4], [4, 5], [5, 6]]
    assert pack(cost, tokens, max_cost=9, max_tokens=5)[:1].tolist() == [[0, 4]]
    assert pack(cost[:0], tokens[:0], max_cost=1, max_tokens=0).shape == (0, 2)
    assert slice_max(cost, slices[::-1]).tolist() == [0.3, 0.3, 0.2, 0.1]
    assert slice_max(cost, np.array([[4, 6], [0, 0], [1, 2]])).tolist() == [0.3, 0.0, 0.1]


def test_splitting_into_whole_steps_keeps_every_utterance():
    slices = np.array([[0, 5], [5, 9], [9, 20], [20, 21], [21, 40]])
    head, tail = into_whole_steps(slices, np.ones(40), step=4)
    assert (len(head) + len(tail)) % 4 == 0
    assert sorted(chain(*(range(*pair) for pair in [*head.tolist(), *tail.tolist()]))) == list(range(40))


def test_a_micro_batch_is_a_plain_tuple_that_workers_can_receive():
    micro_batch = next(small_plan(random_corpus(2, utterances=100)).steps()).micro_batches[0]
    assert isinstance(micro_batch, MicroBatch)
    assert all(type(number) is int for utterance in micro_batch.utterances for number in utterance)
