"""Sidecar: what was written is what is read, by whichever path; contexts of other utterances are refused by name."""

import pickle
import shutil

import numpy as np
import pytest

from seedling.data.contexts.sidecar import (
    Contexts,
    StaleContexts,
    UtteranceContext,
    context_shard_name,
    write_context_index,
    write_context_shard,
)
from seedling.data.index import Corpus, write_index
from seedling.data.loader import utterance_key
from seedling.data.shards import open_shard, shard_path

UTTERANCES = 5
WITHOUT = (1, 3)  # shard and row without a context


def speak(folder, *, shards=2, word="a", prefix="u"):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with open_shard(shard_path(folder, shard), sample_rate=16000) as writer:
            for row in range(UTTERANCES):
                writer.add(f"{prefix}{shard}-{row}", np.zeros(1600, np.float32), {"text": word * (row + 1)})
    return folder


def contexts_of(shard, row, *, tag=""):
    if (shard, row) == WITHOUT:
        return []
    listed = UtteranceContext("relevant", f"{tag}caitlin, 凯特琳\n{shard} {row} " + "x" * row, ("caitlin", "凯特琳"))
    return [listed, UtteranceContext("empty", "", ())][: 1 + row % 2]


def contextualize(folder, audio, *, tag=""):
    folder.mkdir(exist_ok=True)
    corpus = Corpus.open(audio)
    names = [context_shard_name(number, path) for number, path in enumerate(corpus.shards)]
    for number, (name, path) in enumerate(zip(names, corpus.shards)):
        written = {row: contexts_of(number, row, tag=tag) for row in range(UTTERANCES)}
        write_context_shard(folder, name, shard=path, contexts=written)
    write_context_index(folder, names, shards=corpus.shards, settings={"seed": 1}, counts={"relevant": 9})
    return folder


@pytest.fixture
def audio(tmp_path):
    return speak(tmp_path / "audio")


@pytest.fixture
def folder(audio, tmp_path):
    return contextualize(tmp_path / "contexts", audio)


def read(contexts, audio, shard, row):
    corpus = Corpus.open(audio)
    return contexts.of(corpus.shards[shard], row, key=utterance_key(corpus.index(shard)[row]))


def test_every_utterance_gets_its_own_contexts_also_from_a_pickled_reader(folder, audio):
    contexts = Contexts(folder)
    for reader in (contexts, pickle.loads(pickle.dumps(contexts)), Contexts([str(folder)])):
        for shard, row in [(1, 4), (0, 0), (0, 4), WITHOUT, (1, 0)]:
            assert read(reader, audio, shard, row) == tuple(contexts_of(shard, row))


def test_bytes_are_those_of_the_longest_context_in_order_of_the_rows(folder, audio):
    contexts, corpus = Contexts(folder), Corpus.open(audio)
    for shard, path in enumerate(corpus.shards):
        longest = [max((len(c.text.encode()) for c in contexts_of(shard, row)), default=0) for row in range(UTTERANCES)]
        found = contexts.text_bytes(path)
        assert found.tolist() == longest and found.dtype == np.int64


def test_the_audio_may_move_and_be_renamed(folder, audio, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for suffix in (".tar", ".index.npy"):
        shutil.move(audio / f"shard-000001{suffix}", moved / f"other{suffix}")
    assert read(Contexts(folder), moved, 0, 4) == tuple(contexts_of(1, 4))


def test_several_sidecars_of_one_corpus_are_put_together(folder, audio, tmp_path):
    more = contextualize(tmp_path / "more", audio, tag="B")
    contexts = Contexts([folder, more])
    assert read(contexts, audio, 0, 2) == tuple(contexts_of(0, 2)) + tuple(contexts_of(0, 2, tag="B"))
    assert contexts.text_bytes(Corpus.open(audio).shards[0])[2] == len(contexts_of(0, 2, tag="B")[0].text.encode())
    assert len({contexts.fingerprint, Contexts(folder).fingerprint, Contexts(more).fingerprint}) == 3


def test_the_fingerprint_follows_the_content_and_not_the_place(folder, audio, tmp_path):
    again = contextualize(tmp_path / "again", audio)
    assert Contexts(again).fingerprint == Contexts(folder).fingerprint


@pytest.mark.parametrize("change", [{"prefix": "v"}, {"word": "bb"}])
def test_contexts_of_other_utterances_are_refused(folder, tmp_path, change):
    other = speak(tmp_path / "other", **change)
    with pytest.raises(StaleContexts, match=r"shard-000000\.tar: .*contexts has no contexts for the utterances in it"):
        read(Contexts(folder), other, 0, 0)
    with pytest.raises(StaleContexts):
        Contexts(folder).text_bytes(Corpus.open(other).shards[0])


def test_an_index_written_anew_changes_nothing_and_a_wrong_key_is_found(folder, audio):
    path = Corpus.open(audio).shards[0]
    write_index(path)
    contexts = Contexts(folder)
    assert contexts.of(path, 2, key="u0-2")
    with pytest.raises(StaleContexts, match="row 2 is u0-3, but u0-2"):
        contexts.of(path, 2, key="u0-3")


def test_a_folder_without_finished_contexts_says_what_to_run(folder, tmp_path):
    (folder / "contexts.json").unlink()
    with pytest.raises(ValueError, match="seedling contextualize SHARDS --out"):
        Contexts(folder)
    with pytest.raises(ValueError, match="no folder named"):
        Contexts([])
