"""The list of shards: a folder opened by it is the same as without, and a list that lies is not believed."""

import logging
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from seedling.data.index import Corpus, MissingIndex, index_folder, index_path, list_shards, write_index
from seedling.data.shard_list import SHARD_LIST, read_shard_list
from seedling.data.shards import open_shard, shard_path


def shard(folder: Path, number: int, *, utterances: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open_shard(shard_path(folder, number), sample_rate=16000) as writer:
        for i in range(utterances):
            writer.add(f"{number}-{i}", np.full(1600 * (i + 1), 0.1, np.float32), {"text": "a", "lang": "en"})
    return shard_path(folder, number)


def facts(corpus: Corpus) -> tuple:
    rows = [corpus.index(i).tolist() for i in range(len(corpus.shards))]
    return list(corpus.shards), corpus.rows_S.tolist(), corpus.seconds, corpus.fingerprint, rows


def test_a_folder_with_a_list_is_the_corpus_that_it_is_without(tmp_path):
    for folder, number in (("a", 1), ("a", 0), ("a/b", 7), ("", 3)):
        shard(tmp_path / "train" / folder, number, utterances=number + 1)
    without = facts(Corpus.open(tmp_path / "train"))
    index_folder(tmp_path / "train", list_only=True)
    assert (tmp_path / "train" / SHARD_LIST).exists()
    assert facts(Corpus.open(tmp_path / "train")) == without
    assert facts(pickle.loads(pickle.dumps(Corpus.open(tmp_path / "train")))) == without
    assert len(without[0]) == 4 and sum(without[1]) == 2 + 1 + 8 + 4


def test_a_listed_folder_is_opened_without_looking_at_its_shards(tmp_path, monkeypatch):
    shard(tmp_path, 0)
    shard(tmp_path, 1)
    index_folder(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("opened or listed")

    for name in ("scandir", "listdir", "walk"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("seedling.data.index._mapped", refuse)
    corpus = Corpus.open(tmp_path)
    assert (len(corpus.shards), corpus.num_utterances) == (2, 6)
    assert corpus.fingerprint and corpus.seconds == pytest.approx(2 * 0.6)


@pytest.mark.parametrize("change", ["added", "removed", "rewritten", "below"])
def test_a_folder_that_has_changed_is_read_itself_and_the_user_told(tmp_path, caplog, change):
    shard(tmp_path, 0)
    shard(tmp_path, 1)
    index_folder(tmp_path)
    time.sleep(0.02)  # two ticks of the kernel's clock, by which files are dated
    if change == "added":
        shard(tmp_path, 2)
    elif change == "removed":
        shard_path(tmp_path, 1).unlink()
    elif change == "rewritten":
        shard(tmp_path, 1, utterances=5)
    else:
        shard(tmp_path / "below", 0)
    with caplog.at_level(logging.WARNING):
        found = facts(Corpus.open(tmp_path))
    assert "does not fit the shards there and is not used; run `seedling index" in caplog.text
    (tmp_path / SHARD_LIST).unlink()
    assert facts(Corpus.open(tmp_path)) == found


def test_other_files_and_copies_leave_a_list_in_force(tmp_path, caplog):
    shard(tmp_path / "a", 0)
    index_folder(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("newer than the list")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    for folder in ("a", "b"):
        assert read_shard_list(tmp_path / folder) is not None
        assert Corpus.open(tmp_path / folder).num_utterances == 3
    assert not caplog.text


def test_an_index_changed_in_place_is_refused_when_its_turn_comes(tmp_path):
    rows = np.array(np.load(index_path(shard(tmp_path, 0))))
    index_folder(tmp_path)
    rows["samples"][0] += 1
    np.save(index_path(shard_path(tmp_path, 0)), rows)  # as large as before, and no new name in the folder
    with pytest.raises(MissingIndex, match=r"has changed since shards.npy was written; run `seedling index .*--list"):
        Corpus.open(tmp_path).index(0)
    list_shards(tmp_path)
    assert Corpus.open(tmp_path).index(0)["samples"][0] == 1601


def test_a_file_that_is_no_list_is_named(tmp_path):
    shard(tmp_path, 0)
    (tmp_path / SHARD_LIST).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"shards.npy: not a list of shards.*run `seedling index .* --list-only`"):
        Corpus.open(tmp_path)
    np.save(tmp_path / SHARD_LIST, np.zeros(3))
    with pytest.raises(ValueError, match=r"shards.npy: a list of another version"):
        Corpus.open(tmp_path)


def test_the_same_shard_by_list_and_by_name_is_noticed(tmp_path):
    tar = shard(tmp_path / "x", 0)
    index_folder(tmp_path / "x")
    os.symlink(tmp_path / "x", tmp_path / "y")
    for other in (tar, tmp_path / "y", tmp_path / "y" / tar.name):
        with pytest.raises(ValueError, match="twice"):
            Corpus.open([tmp_path / "x", other])


def test_many_shards_cost_a_hundred_bytes_each(tmp_path):
    """A million shards of a corpus must be no burden to each of thousands of ranks."""
    write_index(shard(tmp_path, 0))
    index_folder(tmp_path)
    rows = read_shard_list(tmp_path)
    assert rows.dtype.itemsize <= 100
    assert isinstance(rows, np.memmap)
    assert len(pickle.dumps(Corpus.open(tmp_path))) < 2000
