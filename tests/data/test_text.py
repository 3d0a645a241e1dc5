"""Text batches: the lines of files, each exactly once an epoch, within the limit of padded characters."""

import pickle

import numpy as np
import pytest

from seedling.data.batches import PlannedBatches, make_loader
from seedling.data.plan import MicroBatch
from seedling.data.text import TextCorpus, TextDataset, TextPlan, index_lines

TRICKY = "plain line\n\n  \t \r\nwindows line\r\nüber straße 你好\n   indented \nlast without newline"


def write(path, text, *, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def random_lines(seed, count, *, longest=80):
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("abc dé你"), random.integers(1, longest))) + "x" for _ in range(count)]


def test_lines_are_found_with_their_characters(tmp_path):
    rows = index_lines(write(tmp_path / "a.txt", TRICKY))
    lines = TRICKY.split("\n")
    expected = [number for number, line in enumerate(lines) if line.strip()]
    assert rows["key"].tolist() == [f"line {number + 1}".encode() for number in expected]
    assert rows["text_chars"].tolist() == [len(lines[number]) for number in expected]
    content = TRICKY.encode()
    payloads = [content[row["offset"] : row["offset"] + row["size"]].decode() for row in rows]
    assert payloads == [lines[number] for number in expected]


@pytest.mark.parametrize("text", ["", "\n\n", "one", "one\n", "\none", "é"])
def test_files_at_the_edge_have_the_lines_that_python_finds(tmp_path, text):
    rows = index_lines(write(tmp_path / "a.txt", text))
    assert rows["text_chars"].tolist() == [len(line) for line in text.split("\n") if line.strip()]


def test_every_line_is_delivered_exactly_once_an_epoch_within_the_limit(tmp_path):
    lines = random_lines(0, 400)
    write(tmp_path / "a.txt", "\n".join(lines[:150]))
    write(tmp_path / "b.txt", "\n".join(lines[150:]) + "\n")
    corpus = TextCorpus.open(str(tmp_path))
    batches = PlannedBatches(
        TextPlan(corpus, max_tokens=600, seed=1, micro_batches_per_step=4, window_utterances=100), TextDataset(corpus)
    )
    steps = list(batches.plan.steps(epochs=2))
    loaded = list(make_loader(batches, (m for step in steps for m in step.micro_batches), num_workers=1))
    for epoch in (0, 1):
        texts = [text for batch in loaded if batch.epoch == epoch for text in batch.texts]
        assert sorted(texts) == sorted(line.strip() for line in lines)
    assert all(max(map(len, batch.texts)) * len(batch) <= 600 for batch in loaded)
    assert [batch.index for batch in loaded] == list(range(len(loaded)))
    summary = batches.plan.summary()
    assert summary.utterances == 400 and summary.num_refused == 0
    assert summary.steps == steps[-1].step + 1
    assert summary.padding_fraction < 0.15


def test_a_batch_is_as_the_runtime_expects_it(tmp_path):
    corpus = TextCorpus.open(write(tmp_path / "a.txt", "a bb\nccc\n"))
    batch = TextDataset(corpus)[MicroBatch(7, 3, ((0, 0), (0, 1)))]
    assert (batch.texts, batch.keys) == (["a bb", "ccc"], ["line 1", "line 2"])
    assert (batch.index, batch.epoch, batch.seconds, batch.bad, len(batch)) == (7, 3, 0.0, [], 2)
    assert (batch.characters, batch.padded_characters) == (7, 8)
    assert (batch.seconds, batch.padded_seconds) == (0, 0)
    assert batch.to("cpu").texts == batch.texts
    assert pickle.loads(pickle.dumps(batch)) == batch


def test_lines_above_the_limit_are_refused_by_name(tmp_path):
    corpus = TextCorpus.open(write(tmp_path / "a.txt", "short\n" * 20 + "long " * 50 + "\n"))
    plan = TextPlan(corpus, max_tokens=100, seed=0, micro_batches_per_step=2)
    (refused,) = plan.summary().refused
    assert (refused.key, refused.shard) == ("line 21", str(tmp_path / "a.txt"))
    assert refused.reason == "250 characters are above max_tokens (100)"


def test_a_line_that_is_not_utf8_is_bad_and_nothing_left_is_an_empty_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe bad\n")
    corpus = TextCorpus.open(tmp_path / "a.txt")
    batch = TextDataset(corpus)[MicroBatch(0, 0, ((0, 0), (0, 1)))]
    assert batch.texts == ["good"]
    assert batch.bad[0].key == "line 2" and "utf-8" in batch.bad[0].reason
    alone = TextDataset(corpus)[MicroBatch(0, 0, ((0, 1),))]
    assert (alone.texts, alone.padded_characters, len(alone.bad)) == ([""], 0, 1)


def test_fingerprints_follow_the_text(tmp_path):
    first = TextCorpus.open(write(tmp_path / "a.txt", "one\ntwo\n")).fingerprint
    assert TextCorpus.open(write(tmp_path / "b.txt", "one\ntwo\n")).fingerprint == first
    assert TextCorpus.open(write(tmp_path / "a.txt", "one\ntwi\n")).fingerprint != first


def test_missing_and_empty_text_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.txt: no text here"):
        TextCorpus.open(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"no line with text"):
        TextCorpus.open(write(tmp_path / "blank.txt", " \n\n"))
