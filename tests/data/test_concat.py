"""Concatenation by the plan: each utterance once, in order, within the bounds, from the index alone."""

import json
import pickle
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seedling.data.audio_sets import AudioDataConfig, heldout
from seedling.data.augment import AugmentConfig
from seedling.data.concat import ConcatConfig, GroupedCorpus, cut_run
from seedling.data.index import Corpus, MissingIndex, index_dtype, index_path, list_shards, name_hash, write_index
from seedling.data.plan import Cursor, Plan, PlanConfig, PlanLimits
from seedling.data.prepare import prepare

RATE = 16000
ROOMY = PlanConfig(max_seconds=1000.0)


class Indexes:
    """A corpus of indexes without audio."""

    def __init__(self, *shards):
        self.shards, self.rows = [Path(f"indexes/s{i}.tar") for i in range(len(shards))], shards
        self.fingerprint = "indexes"

    def expect(self, shards):
        pass

    def index(self, shard):
        return self.rows[shard]


def rows_of(seconds, *, who=1, chars=20, rate=RATE, shard=0):
    rows = np.zeros(len(seconds), dtype=index_dtype(12))
    rows["key"] = [f"{shard}-{row}".encode() for row in range(len(seconds))]
    rows["sample_rate"] = rate
    rows["samples"] = np.round(np.asarray(seconds) * rows["sample_rate"])
    rows["text_chars"], rows["speaker"], rows["session"] = chars, who, np.asarray(who) + 100
    return rows


def random_rows(seed, count, *, speakers=5, shard=0):
    random = np.random.default_rng(seed)
    who = random.integers(0, speakers, count)  # 0: unknown
    rate = random.choice([RATE, RATE, RATE, 8000], count)
    return rows_of(
        random.uniform(0.0, 25.0, count), who=who, chars=random.integers(0, 300, count), rate=rate, shard=shard
    )


def grouped(*shards, plan=ROOMY, seed=1, require_text=False, **options):
    cfg = ConcatConfig(**({"share": 1.0, "min_seconds": 30.0, "max_seconds": 90.0} | options))
    return GroupedCorpus(Indexes(*shards), cfg, plan=plan, seed=seed, require_text=require_text)


def keys_of(corpus):
    """Return the keys of each group of each shard."""
    return [
        [[key.decode() for key in corpus.members(shard, row)["key"]] for row in range(len(corpus.index(shard)))]
        for shard in range(len(corpus.shards))
    ]


@pytest.mark.parametrize("case", range(30))
def test_every_utterance_is_in_one_group_and_groups_keep_order_bounds_and_sums(case):
    random = np.random.default_rng(case)
    shards = [random_rows(case * 10 + i, int(random.integers(1, 120)), shard=i) for i in range(3)]
    plan = replace(ROOMY, max_tokens=int(random.choice([0, 800])), min_seconds=1.0)
    by, require_text = str(random.choice(["speaker", "corpus"])), bool(random.random() < 0.5)
    corpus = grouped(
        *shards, plan=plan, by=by, require_text=require_text, share=float(random.choice([1.0, 0.4])), gap_seconds=0.25
    )
    assert corpus.num_utterances == sum(len(corpus.index(shard)) for shard in range(3))
    for shard, rows in enumerate(shards):
        seen = []
        for group, planned in enumerate(corpus.index(shard)):
            members = corpus.members(shard, group)
            numbers = [int(key.split(b"-")[1]) for key in members["key"]]
            seen += numbers
            assert numbers == sorted(numbers)
            gap = round(0.25 * planned["sample_rate"]) * (len(members) - 1)
            assert planned["samples"] == members["samples"].sum() + gap
            assert planned["text_chars"] == members["text_chars"].sum() + len(members) - 1
            if len(members) == 1:
                assert planned["key"] == members["key"][0]
                continue
            assert planned["key"] == members["key"][0] + f"+{len(members) - 1}".encode()
            assert len(set(members["sample_rate"])) == 1
            assert planned["samples"] / planned["sample_rate"] <= 90.0 + 1e-6
            assert not plan.max_tokens or planned["text_chars"] <= plan.max_tokens
            assert (members["samples"] / members["sample_rate"]).min() >= 1.0  # what the plan refuses stays alone
            assert not require_text or members["text_chars"].min() > 0
            assert by == "corpus" or (len({*members["speaker"]}) == 1 and members["speaker"][0] != 0)
        assert sorted(seen) == list(range(len(rows)))
        first = [corpus.members(shard, group)["key"][0] for group in range(len(corpus.index(shard)))]
        assert [int(key.split(b"-")[1]) for key in first] == sorted(int(key.split(b"-")[1]) for key in first)


def test_lengths_spread_over_the_bounds_and_a_short_rest_joins_the_group_before_it():
    seconds = np.full(4000, 3.0)
    lengths = grouped(rows_of(seconds), min_seconds=30, max_seconds=300).index(0)["samples"] / RATE
    assert lengths.min() >= 30 and lengths.max() <= 300
    assert np.quantile(lengths, [0.1, 0.5, 0.9]) == pytest.approx([57, 165, 273], abs=30)
    cfg = ConcatConfig(share=1, min_seconds=10, max_seconds=20, gap_seconds=0)
    # 11 s are reached after six utterances; what is left over, 4 s, goes with them.
    assert cut_run([2.0] * 8, [5] * 8, [0.1] * 8, cfg=cfg, most_characters=1000) == [0]
    assert cut_run([2.0] * 11, [5] * 11, [0.1] * 11, cfg=cfg, most_characters=1000) == [0, 6]
    assert cut_run([2.0] * 8, [5] * 8, [0.1] * 8, cfg=cfg, most_characters=40) == [0, 6]


def test_the_share_is_of_the_audio_and_what_is_not_joined_keeps_its_row():
    corpus = grouped(rows_of(np.full(20000, 3.0)), share=0.6)
    joined = sum(len(corpus.members(0, row)) for row in range(len(corpus.index(0))) if len(corpus.members(0, row)) > 1)
    assert joined / 20000 == pytest.approx(0.6, abs=0.05)


def test_groups_are_a_pure_function_of_index_settings_and_seed():
    shards = [random_rows(1, 200), random_rows(2, 100, shard=1)]
    corpus = grouped(*shards)
    assert keys_of(corpus) == keys_of(grouped(*shards)) == keys_of(pickle.loads(pickle.dumps(corpus)))
    assert keys_of(grouped(*shards, seed=2)) != keys_of(corpus)
    prints = {
        grouped(*shards, **options).fingerprint
        for options in (
            {},
            {"seed": 2},
            {"share": 0.5},
            {"max_seconds": 80.0},
            {"by": "session"},
            {"require_text": True},
            {"plan": replace(ROOMY, max_tokens=500)},
            {"gap_seconds": 0.1},
        )
    }
    assert len(prints) == 8 and corpus.fingerprint in prints


def test_a_plan_over_groups_has_each_utterance_once_an_epoch_and_resumes_anywhere():
    shards = [random_rows(i, 300, shard=i) for i in range(4)]
    corpus = grouped(*shards, plan=replace(ROOMY, max_seconds=120.0, min_seconds=0.0))
    cfg = replace(corpus.plan, window_utterances=60)
    plan = Plan(corpus, cfg, seed=5, micro_batches_per_step=2)
    steps = list(plan.steps(epochs=2))
    for epoch in (0, 1):
        pairs = [u for s in steps for m in s.micro_batches if m.epoch == epoch for u in m.utterances]
        keys = [key for shard, row in pairs for key in corpus.members(shard, row)["key"]]
        assert len(keys) == len(set(keys)) == sum((rows["samples"] > 0).sum() for rows in shards)
    for at, after in pairwise(steps):
        again = Plan(grouped(*shards, plan=corpus.plan), plan.cfg, seed=5, micro_batches_per_step=2)
        cursor = Cursor.from_dict(json.loads(json.dumps(at.cursor.to_dict())))
        assert next(again.steps(cursor)) == after


def test_no_more_shards_are_held_than_allowed(monkeypatch):
    monkeypatch.setattr("seedling.data.concat.MAX_SHARDS", 3)
    corpus = grouped(*(rows_of(np.full(2000, 3.0), shard=i) for i in range(40)))
    corpus.index(0)
    tracemalloc.start()
    for shard in range(40):
        corpus.index(shard)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 8 * 3 * 2000 * 8


# ---- with audio


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """30 utterances of 0.5 to 1.4 s in two shards, three speakers in turn; the audio of utterance i is i / 100."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for i in range(30):
        seconds = 0.5 + 0.1 * (i * 7 % 10)
        soundfile.write(folder / f"{i:02d}.wav", np.full(round(RATE * seconds), (i + 1) / 100), RATE, subtype="FLOAT")
        lines.append({"audio_filepath": f"{i:02d}.wav", "duration": seconds, "text": f"number {i}", "speaker": i % 3})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(folder / "all.jsonl", folder / "shards", shard_seconds=15)
    return folder / "shards"


LIMITS = {"micro_batch_seconds": 8.0, "micro_batches": 1, "sample_rate": RATE, "require_text": True}
CONCAT = {"share": 1.0, "min_seconds": 2.0, "max_seconds": 4.0, "gap_seconds": 0.1}


def epoch(planned):
    return [planned.dataset[m] for step in planned.plan.steps(epochs=1) for m in step.micro_batches]


def test_joined_audio_is_that_of_its_texts_with_a_gap_in_between(shards):
    batches = epoch(AudioDataConfig(train=[str(shards)], concat=ConcatConfig(**CONCAT)).training(seed=1, **LIMITS))
    said = [number for batch in batches for text in batch.texts for number in text.replace("number ", "").split()]
    assert sorted(map(int, said)) == list(range(30)) and not any(batch.bad for batch in batches)
    assert sum(batch.utterances for batch in batches) == 30 > sum(len(batch) for batch in batches)
    for batch in batches:
        for text, waveform_N, length, meta in zip(batch.texts, batch.waveforms_BN, batch.lengths_B, batch.meta):
            at = 0
            numbers = [int(number) for number in text.replace("number ", "").split()]
            for number in numbers:
                samples = round(RATE * (0.5 + 0.1 * (number * 7 % 10)))
                np.testing.assert_allclose(waveform_N[at : at + samples], (number + 1) / 100, atol=1e-4)
                at += samples + 1600
            assert at - 1600 == length
            assert len({number % 3 for number in numbers}) == 1
            assert len(numbers) == 1 or meta["members"] == [f"{number:02d}" for number in numbers]


def test_a_member_that_cannot_be_read_is_named_and_the_others_are_heard(shards, tmp_path):
    for path in shards.glob("*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tar = sorted(tmp_path.glob("*.tar"))[0]
    rows = np.load(index_path(tar))
    content = bytearray(tar.read_bytes())
    start = int(rows["audio_offset"][4])
    content[start : start + int(rows["audio_size"][4])] = bytes(int(rows["audio_size"][4]))
    tar.write_bytes(content)
    batches = epoch(AudioDataConfig(train=[str(tmp_path)], concat=ConcatConfig(**CONCAT)).training(seed=1, **LIMITS))
    assert [bad.key for batch in batches for bad in batch.bad] == ["04"]
    said = [number for batch in batches for text in batch.texts for number in text.replace("number ", "").split()]
    assert sorted(map(int, said)) == [i for i in range(30) if i != 4]


def test_workers_and_speed_perturbation_agree_with_the_plan(shards):
    augment = AugmentConfig(speed_probability=1.0, speed_factors=[0.8])
    data = AudioDataConfig(train=[str(shards)], concat=ConcatConfig(**CONCAT), augment=augment)
    planned = data.training(seed=1, **LIMITS)
    again = pickle.loads(pickle.dumps(planned.dataset))
    for step in planned.plan.steps(epochs=1):
        for micro_batch in step.micro_batches:
            batch = planned.dataset[micro_batch]
            assert batch.waveforms_BN.equal(again[micro_batch].waveforms_BN)
            assert batch.waveforms_BN.numel() / RATE <= 8.0 + 0.01


def test_heldout_audio_is_joined_in_the_order_of_the_corpus(shards):
    cfg = ConcatConfig(**(CONCAT | {"by": "corpus"}))
    limits = {"micro_batch_seconds": 4.0, "micro_batches": 1, "sample_rate": RATE}
    batches = epoch(heldout(str(shards), PlanLimits(), concat=cfg, **limits))
    by_first = sorted(meta["members"] for batch in batches for meta in batch.meta if "members" in meta)
    assert all([int(b) - int(a) for a, b in pairwise(members)] == [1] * (len(members) - 1) for members in by_first)


def test_no_concatenation_gives_the_plan_of_before(shards):
    plain, corpus = AudioDataConfig(train=[str(shards)]).training(seed=1, **LIMITS), Corpus.open(str(shards))
    assert plain.plan.fingerprint == Plan(corpus, plain.plan.cfg, seed=1, micro_batches_per_step=1).fingerprint
    joined = AudioDataConfig(train=[str(shards)], concat=ConcatConfig(**CONCAT)).training(seed=1, **LIMITS)
    assert joined.fingerprint != plain.fingerprint


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"concat.share \(1.5\)"),
        ({"min_seconds": 50.0, "max_seconds": 40.0}, r"concat.min_seconds \(50.0\)"),
        ({"gap_seconds": -1.0}, r"concat.gap_seconds \(-1.0\)"),
        ({"by": "room"}, r"'room'; choose one of speaker, session, corpus"),
    ],
)
def test_impossible_settings_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ConcatConfig(**options)


def test_groups_that_the_plan_would_refuse_are_errors():
    with pytest.raises(ValueError, match=r"concat.max_seconds \(90\) costs 90 s .* raise train.micro_batch_seconds"):
        grouped(rows_of([1.0]), plan=PlanConfig(max_seconds=60.0))
    with pytest.raises(ValueError, match=r"max_utterance_seconds \(30\) is below data.concat.max_seconds \(90\)"):
        grouped(rows_of([1.0]), plan=replace(ROOMY, max_utterance_seconds=30.0))


def test_without_speakers_the_error_names_the_ways_out(shards, tmp_path):
    with pytest.raises(ValueError, match=r"no utterance of .* names its speaker.*data.concat.by=corpus"):
        grouped(rows_of([1.0, 2.0], who=0))
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(RATE), RATE)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": "a.wav", "duration": 1.0, "text": "a"}))
    prepare(tmp_path / "m.jsonl", tmp_path / "shards")
    (tar,) = (tmp_path / "shards").glob("*.tar")
    rows = np.load(index_path(tar))
    old = [name for name in rows.dtype.names if name not in ("speaker", "session")]
    np.save(index_path(tar), np.array(rows[old].tolist(), dtype=[(n, rows.dtype[n]) for n in old]))
    list_shards(tmp_path / "shards")
    data = AudioDataConfig(train=[str(tmp_path / "shards")])
    assert len(epoch(data.training(seed=1, **LIMITS))) == 1  # an index from before there were speakers still works
    with pytest.raises(MissingIndex, match=r"before there were speakers.*run `seedling index"):
        replace(data, concat=ConcatConfig(**CONCAT)).training(seed=1, **LIMITS)
    assert write_index(tar)["speaker"].tolist() == [0]


def test_what_belongs_to_single_utterances_cannot_be_joined(shards):
    data = AudioDataConfig(train=[str(shards)], concat=ConcatConfig(**CONCAT))
    with pytest.raises(ValueError, match=r"data.concat.share is 1.0 and there are frame labels"):
        data.training(seed=1, **LIMITS, labels=object())


def test_names_are_hashed_the_same_everywhere_and_none_is_zero():
    assert name_hash("") == name_hash(None) == name_hash("  ") == name_hash(["a"]) == 0
    assert name_hash(12) == name_hash("12") != name_hash("13")
    assert name_hash("annie") == -4434659622519673298  # as every index ever written has it
