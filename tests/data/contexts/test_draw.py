"""Which utterance is a triple: by seed, epoch and key alone; and what the plan makes of the contexts' length."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch

from seedling.data.audio_sets import AudioDataConfig, heldout
from seedling.data.batches import make_loader
from seedling.data.contexts.draw import ContextConfig, DrawnContexts, WithContexts
from seedling.data.contexts.sidecar import (
    Contexts,
    StaleContexts,
    UtteranceContext,
    context_shard_name,
    write_context_index,
    write_context_shard,
)
from seedling.data.index import Corpus, list_shards
from seedling.data.loader import AudioDataset, utterance_key
from seedling.data.plan import PlanLimits
from seedling.data.prepare import prepare

LIMITS = {"micro_batch_seconds": 4.0, "micro_batches": 2, "sample_rate": 16000, "require_text": True}
UTTERANCES = 24
KINDS = ("relevant", "irrelevant", "empty")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 utterances of 0.5 s in several shards; each has an own word as its text."""
    folder, lines = tmp_path_factory.mktemp("corpus"), []
    for i in range(UTTERANCES):
        soundfile.write(folder / f"{i}.wav", 0.1 * np.ones(8000), 16000)
        lines.append({"audio_filepath": f"{i}.wav", "duration": 0.5, "text": f"number {i:02d}"})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(folder / "all.jsonl", folder / "shards", shard_seconds=4)
    return folder / "shards"


def contextualize(folder, shards, *, words=1, without=()):
    """Three contexts for every utterance but for those whose keys end in one of `without`."""
    folder.mkdir()
    corpus = Corpus.open(str(shards))
    names = [context_shard_name(number, path) for number, path in enumerate(corpus.shards)]
    for number, (name, path) in enumerate(zip(names, corpus.shards)):
        written = {}
        for row, at in enumerate(corpus.index(number)):
            key = utterance_key(at)
            if not key.endswith(tuple(without)) or not without:
                texts = (f"{key.zfill(3)} " * words, "elsewhere", "")
                written[row] = [UtteranceContext(kind, text.strip()) for kind, text in zip(KINDS, texts)]
        write_context_shard(folder, name, shard=path, contexts=written)
    write_context_index(folder, names, shards=corpus.shards)
    return folder


@pytest.fixture
def sidecar(tmp_path, shards):
    return contextualize(tmp_path / "contexts", shards)


def drawn(sidecar, shards, *, seed=1, first=False, **config) -> DrawnContexts:
    return DrawnContexts.open(
        [sidecar], corpora=[str(shards)], cfg=ContextConfig(**{"share": 1.0, **config}), seed=seed, first=first
    )


def kinds(contexts: DrawnContexts, shards, *, epoch: int) -> dict[str, str | None]:
    """Return the kind of context that each utterance has in an epoch."""
    found, corpus = {}, Corpus.open(str(shards))
    for number, path in enumerate(corpus.shards):
        for row, at in enumerate(corpus.index(number)):
            key = utterance_key(at)
            context = contexts.of(path, row, key=key, epoch=epoch)
            found[key] = context.kind if context else None
    return found


def many(contexts: DrawnContexts, shards, *, epochs: int = 40) -> list[str | None]:
    return [kind for epoch in range(epochs) for kind in kinds(contexts, shards, epoch=epoch).values()]


def test_the_share_of_triples_is_the_one_asked_for_and_dropout_takes_from_it(sidecar, shards):
    for config, wanted in (
        ({"share": 0.3}, 0.3),
        ({"share": 0.8, "dropout": 0.25}, 0.6),
        ({"share": 0.0}, 0.0),
        ({"share": 1.0}, 1.0),
        ({"share": 1.0, "dropout": 1.0}, 0.0),
    ):
        found = [kind is not None for kind in many(drawn(sidecar, shards, **config), shards)]
        assert np.mean(found) == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / len(found)))


def test_a_draw_depends_on_seed_epoch_and_key_and_on_nothing_else(sidecar, shards):
    contexts = drawn(sidecar, shards, share=0.5)
    first = [kinds(contexts, shards, epoch=epoch) for epoch in range(3)]
    again = pickle.loads(pickle.dumps(drawn(sidecar, shards, share=0.5)))
    assert [kinds(again, shards, epoch=epoch) for epoch in reversed(range(3))] == first[::-1]
    assert first[0] != first[1] != first[2]
    assert kinds(drawn(sidecar, shards, share=0.5, seed=2), shards, epoch=0) != first[0]


def test_every_variant_comes_as_often_as_the_others_and_another_one_each_epoch(sidecar, shards):
    found = many(drawn(sidecar, shards), shards)
    shares = [found.count(kind) / len(found) for kind in KINDS]
    assert shares == pytest.approx([1 / 3] * 3, abs=4 * math.sqrt(2 / 9 / len(found)))


def test_a_validation_set_has_the_first_of_its_contexts_in_every_epoch(sidecar, shards):
    assert set(many(drawn(sidecar, shards, first=True, share=0.0), shards, epochs=2)) == {"relevant"}


def test_utterances_without_contexts_and_corpora_without_a_sidecar_are_pairs(tmp_path, shards):
    sidecar = contextualize(tmp_path / "some", shards, without=("1", "2"))
    found = kinds(drawn(sidecar, shards), shards, epoch=0)
    assert {key for key, kind in found.items() if kind is None} == {key for key in found if key.endswith(("1", "2"))}
    none = DrawnContexts.open([""], corpora=[str(shards)], cfg=ContextConfig(share=1.0))
    assert set(many(none, shards, epochs=1)) == {None}
    corpus = Corpus.open(str(shards))
    assert all((WithContexts(corpus, none).index(i) == corpus.index(i)).all() for i in range(len(corpus.shards)))


@pytest.mark.parametrize(
    ("config", "said"),
    [({"share": 1.2}, r"context\.share is 1\.2"), ({"dropout": -1}, "context.dropout"), ({"max_tokens": 0}, "max_tok")],
)
def test_a_share_that_is_none_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        ContextConfig(**config)


def test_there_must_be_a_sidecar_for_each_corpus(sidecar, shards):
    with pytest.raises(ValueError, match=r"2 corpora .* and 1 folders of contexts"):
        DrawnContexts.open([sidecar], corpora=[str(shards), "more"], cfg=ContextConfig())


# ---- in batches


def training(shards, contexts, *, limits=None):
    data = AudioDataConfig(train=[str(shards)], limits=limits or PlanLimits())
    return data.training(seed=1, contexts=contexts, **LIMITS)


def epoch(planned, **loader) -> list:
    micro_batches = [mb for step in planned.plan.steps(epochs=1) for mb in step.micro_batches]
    return list(make_loader(planned, micro_batches, **loader))


def test_a_batch_holds_the_context_of_each_of_its_utterances(sidecar, shards):
    contexts = drawn(sidecar, shards, share=0.5)
    expected = kinds(contexts, shards, epoch=0)
    batches = epoch(training(shards, contexts))
    found = {key: context for batch in batches for key, context in zip(batch.keys, batch.contexts, strict=True)}
    assert {key: context and context.kind for key, context in found.items()} == expected
    assert all(context.text == key.zfill(3) for key, context in found.items() if context and context.kind == "relevant")
    workers = epoch(training(shards, contexts), num_workers=2)
    assert [batch.contexts for batch in workers] == [batch.contexts for batch in batches]
    assert all(a.contexts is not None and torch.equal(a.lengths_B, b.lengths_B) for a, b in zip(workers, batches))


def test_without_contexts_a_batch_has_none_and_the_plan_is_what_it_was(shards):
    planned = training(shards, None)
    assert all(batch.contexts is None for batch in epoch(planned))
    assert planned.fingerprint == AudioDataConfig(train=[str(shards)]).training(seed=1, **LIMITS).fingerprint


def test_the_fingerprint_changes_with_the_contexts_and_with_how_long_they_may_be(sidecar, tmp_path, shards):
    longer = contextualize(tmp_path / "longer", shards, words=2)
    prints = {
        training(shards, contexts).fingerprint
        for contexts in (None, drawn(sidecar, shards), drawn(longer, shards), drawn(longer, shards, max_tokens=5))
    }
    assert len(prints) == 4
    copied = contextualize(tmp_path / "again", shards)
    assert training(shards, drawn(copied, shards)).fingerprint in prints


def test_the_plan_counts_contexts_as_text(tmp_path, shards):
    """Each utterance has 9 characters of text and a context of some 200: two of them, but not three, make 500."""
    long = contextualize(tmp_path / "long", shards, words=50)
    limits = PlanLimits(max_tokens=500)
    assert max(len(batch) for batch in epoch(training(shards, None, limits=limits))) == 8
    batches = epoch(training(shards, drawn(long, shards), limits=limits))
    assert sum(map(len, batches)) == UTTERANCES
    for batch in batches:
        longest = max(len(text) + 199 for text in batch.texts)
        assert len(batch) * longest <= 500
    cut = epoch(training(shards, drawn(long, shards, max_tokens=50), limits=limits))
    assert max(map(len, cut)) == 500 // (9 + 50), "a context that is cut to 50 tokens counts as 50"
    refused = training(shards, drawn(long, shards), limits=PlanLimits(max_tokens=100)).plan
    with pytest.raises(ValueError, match="0 utterances within the limits"):
        next(refused.steps())


@pytest.mark.parametrize("listed", [2, 1])
def test_a_context_counts_as_the_most_tokens_it_may_have(tmp_path, shards, listed):
    """Han outside a vocabulary is three tokens a character; format 1 did not count bytes, and must not be too low."""
    texts = ["张伟，王芳", "abc", "", "张" * 200]
    path = Corpus.open(str(shards)).shards[0]
    name = context_shard_name(0, path)
    written = {row: [UtteranceContext("relevant", text)] for row, text in enumerate(texts)}
    write_context_shard(tmp_path, name, shard=path, contexts=written)
    if listed == 1:
        rows = np.load(tmp_path / f"{name}.rows.npy")
        rows["bytes"][: len(texts)] = [len(text) for text in texts]
        rows.dtype.names = ("key", "offset", "size", "chars")
        np.save(tmp_path / f"{name}.rows.npy", rows)
    write_context_index(tmp_path, [name], shards=[path])
    contexts = DrawnContexts({path: Contexts(tmp_path)}, ContextConfig(max_tokens=100))
    exact = np.array([15, 3, 0, 100])
    most = contexts.most_tokens(path)[: len(texts)]
    assert most.tolist() == exact.tolist() if listed == 2 else (most >= exact).all() and most[-1] == 100


def test_a_sidecar_of_other_utterances_is_fatal_not_one_more_bad_utterance(sidecar, shards, tmp_path):
    (tmp_path / "other").mkdir()
    soundfile.write(tmp_path / "other/a.wav", 0.1 * np.ones(8000), 16000)
    (tmp_path / "other/m.jsonl").write_text(json.dumps({"audio_filepath": "a.wav", "duration": 0.5, "text": "x"}))
    prepare(tmp_path / "other/m.jsonl", tmp_path / "other/shards")
    other = tmp_path / "other/shards"
    with pytest.raises(StaleContexts, match="has no contexts for the utterances in it"):
        heldout(
            str(other),
            PlanLimits(),
            micro_batch_seconds=4.0,
            micro_batches=1,
            sample_rate=16000,
            contexts=drawn(sidecar, other),
        )
    plain = heldout(str(other), PlanLimits(), micro_batch_seconds=4.0, micro_batches=1, sample_rate=16000)
    dataset = AudioDataset(Corpus.open(str(other)), contexts=drawn(sidecar, other))
    with pytest.raises(StaleContexts):
        dataset[plain.plan.summary().largest]


def test_a_text_that_changed_makes_the_sidecar_stale(sidecar, shards, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(shards, changed)
    index = min(changed.glob("*.index.npy"))
    rows = np.load(index)
    rows["text_chars"][0] += 1
    np.save(index, rows)
    list_shards(changed)
    with pytest.raises(StaleContexts):
        training(changed, drawn(sidecar, changed))


def test_a_batch_without_a_usable_utterance_has_no_context(shards, sidecar):
    planned = training(shards, drawn(sidecar, shards))
    empty = planned.plan.summary().largest._replace(utterances=())
    batch = planned.dataset[empty]
    assert (batch.keys, batch.contexts) == ([""], [None])
