"""`seedling contextualize`: a context sidecar for a corpus of shards, resumable after a kill, by shard and by answer.

With templates it is the same, byte for byte, for any number of processes. What was counted of a shard is noted in
`OUT/.contextualize/`; a run that finds the shard and its note keeps them. `OUT/contexts.json` is written last.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ..index import Corpus, read_index
from ..parallel import advance, over_shards
from ..whole_file import PART, write_json
from .answers import AnswerCache, Writer, ask, context_request, open_cache
from .compose import Composer, Draft
from .config import ContextsConfig
from .corpus import ContextError, CorpusFacts, gather_facts, read_shard
from .names import NamePools
from .sidecar import (
    UtteranceContext,
    context_shard_name,
    is_written,
    write_context_index,
    write_context_shard,
)
from .templates import SENTENCES

FORMAT = 1  # raised when the same settings would give other contexts
NOTES = ".contextualize"
NOT_SETTINGS = ("jobs", "cache", "remote")  # change nothing of what is written
WRITER_SETTINGS = {"endpoint": ("model", "parameters"), "llm": ("path", "max_new_tokens", "temperature", "top_p")}


@dataclass
class ContextsSummary:
    """What a sidecar holds; `counts` is what its contexts.json says."""

    shards: int
    utterances: int
    contexts: int
    counts: dict[str, int]


class ShardTask(NamedTuple):
    """All that a worker needs to write the contexts of one shard."""

    out: Path
    name: str
    shard: Path
    cfg: ContextsConfig


def contextualize(
    shards: str | Path,
    out: str | Path,
    cfg: ContextsConfig,
    *,
    make_writer: Callable[[], Writer] | None = None,
) -> ContextsSummary:
    """Write contexts of every utterance of `shards` into the folder `out`, or go on where a killed run stopped.

    `make_writer` opens the language model that `cfg.writer` names; it is called only where there is something to write.
    Raises ContextError where the corpus lacks what is needed, `out` holds something else, or an endpoint gives up.
    """
    if (cfg.writer == "templates") != (make_writer is None):
        raise ValueError(f"writer is {cfg.writer}: make_writer must{' not' if make_writer else ''} be given")
    corpus, out = Corpus.open(shards, remote=cfg.remote), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = cfg.jobs or (len(os.sched_getaffinity(0)) if make_writer is None else 1)
    with _only_one(out):
        facts = gather_facts(corpus, cfg, jobs=jobs)
        made_by = _claim(out, cfg, facts)
        facts.save(out / NOTES / "facts.json")
        names = [context_shard_name(number, shard) for number, shard in enumerate(corpus.shards)]
        tasks = [ShardTask(out, name, shard, cfg) for name, shard in zip(names, corpus.shards)]
        todo = [task for task in tasks if not _is_finished(task)]
        if todo:
            (out / "contexts.json").unlink(missing_ok=True)
            _write_all(todo, make_writer, jobs=jobs)
        counts = sum((Counter(_read_note(task)) for task in tasks), Counter())
        write_context_index(
            out, names, shards=corpus.shards, settings=_settings(cfg), counts=_ordered(counts), made_by=made_by
        )
    return ContextsSummary(len(tasks), counts["utterances"], counts["contexts"], _ordered(counts))


def _write_all(todo: list[ShardTask], make_writer: Callable[[], Writer] | None, *, jobs: int) -> None:
    total = sum(len(read_index(task.shard)) for task in todo)
    if make_writer is None:
        for _ in over_shards(write_shard, todo, jobs=jobs, label="contextualize", total=total, unit="utt"):
            pass
        return
    cache_file = Path(todo[0].cfg.cache or todo[0].out / "answers.jsonl")
    with open_cache(cache_file) as cache:
        writer = make_writer()

        def write(task: ShardTask) -> None:
            write_shard(task, writer=writer, cache=cache)

        for _ in over_shards(write, todo, jobs=1, label="contextualize", total=total, unit="utt"):
            pass


def write_shard(task: ShardTask, *, writer: Writer | None = None, cache: AnswerCache | None = None) -> None:
    """Write the contexts of a shard, then the note of what was counted."""
    facts, pools = _facts_and_pools(task.out / NOTES / "facts.json")
    texts = read_shard(task.shard, lang=facts.lang)
    composer = Composer(task.cfg, facts, texts.said, pools=pools)
    drafts = [
        composer.draft(number, variant) for number in range(len(texts.said)) for variant in range(task.cfg.variants)
    ]
    answered: dict[int, UtteranceContext] = {}
    if writer is not None and cache is not None:
        answered = _answered(composer, drafts, writer=writer, cache=cache)
    contexts: dict[int, list[UtteranceContext]] = {}
    for number, draft in enumerate(drafts):
        context = answered.get(number) or composer.from_templates(draft)
        contexts.setdefault(draft.said.row, []).append(context)
        composer.counts[context.kind] += 1
    composer.counts["utterances"] += len(texts.said)
    composer.counts["contexts"] += len(drafts)
    composer.counts["utterances without a text"] += texts.without_text
    composer.counts["keywords that are not in their text"] += texts.not_said
    write_json(_note_path(task), dict(composer.counts))
    write_context_shard(task.out, task.name, shard=task.shard, contexts=contexts)
    advance(len(read_index(task.shard)))


def _answered(
    composer: Composer, drafts: list[Draft], *, writer: Writer, cache: AnswerCache
) -> dict[int, UtteranceContext]:
    """Ask for every sentence, and once more, with another seed, for those that are not allowed."""
    found: dict[int, UtteranceContext] = {}
    asked = [n for n, draft in enumerate(drafts) if draft.topic is not None and draft.form in SENTENCES]
    for attempt in range(2):
        left = [number for number in asked if number not in found]
        requests = [_request(drafts[number], attempt=attempt, cfg=composer.cfg) for number in left]
        answers = ask(requests, writer=writer, cache=cache, counts=composer.counts)
        for number, answer in zip(left, answers):
            if answer is not None and (context := composer.from_answer(drafts[number], answer.text)):
                found[number] = context
    composer.counts["sentences by the writer"] += len(found)
    composer.counts["sentences left to templates"] += len(asked) - len(found)
    return found


def _request(draft: Draft, *, attempt: int, cfg: ContextsConfig):
    assert draft.topic is not None, "only drafts with a topic are asked for"
    return context_request(
        draft.form, topic=draft.topic, names=draft.names, seed=cfg.seed + 1000 * draft.variant + attempt
    )


@lru_cache(maxsize=1)
def _read_facts(path: Path, _mtime_ns: int) -> tuple[CorpusFacts, NamePools]:
    facts = CorpusFacts.load(path)
    return facts, NamePools(facts.names, groups=facts.groups)


def _facts_and_pools(path: Path) -> tuple[CorpusFacts, NamePools]:
    """The facts and the names by sound, once a process."""
    return _read_facts(path, path.stat().st_mtime_ns)


# --- the output folder: one run at a time, one set of settings for ever


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    (out / NOTES).mkdir(exist_ok=True)
    with open(out / NOTES / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ContextError(f"{out}: another `seedling contextualize` writes here; wait for it or stop it") from None
        for part in [*out.glob(f".*{PART}"), *(out / NOTES).glob(f".*{PART}")]:
            part.unlink(missing_ok=True)
        yield


def _settings(cfg: ContextsConfig) -> dict:
    """Return what decides the contexts: of a language model what is asked, not where, how fast or how often."""
    kept = {name: value for name, value in asdict(cfg).items() if name not in NOT_SETTINGS}
    for writer, names in WRITER_SETTINGS.items():
        asked = kept.pop(writer)
        if cfg.writer == writer:
            kept[writer] = {name: asked[name] for name in names}
    return kept


def _claim(out: Path, cfg: ContextsConfig, facts: CorpusFacts) -> str:
    """Return the hash of settings and texts, having made sure that `out` holds nothing, or contexts of these."""
    settings = _settings(cfg)
    digest = sha256(json.dumps([FORMAT, settings, asdict(facts)], sort_keys=True).encode()).hexdigest()
    path = out / "contextualize.json"
    if not path.exists():
        if strangers := sorted(out.glob("*.contexts.jsonl")):
            raise ContextError(f"{out}: holds {strangers[0].name}, which was not written here; choose an empty folder")
        write_json(path, {"made_by": digest, "settings": settings})
        return digest
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["made_by"] != digest:
        was = stored["settings"]
        changed = [f"{key} was {was.get(key)!r}, is {now!r}" for key, now in settings.items() if was.get(key) != now]
        what = "; ".join(changed) or "the texts of the shards, or a file that an option names, changed"
        raise ContextError(
            f"{out}: has contexts made with something else ({what}); delete the folder or choose another"
        )
    return digest


def _note_path(task: ShardTask) -> Path:
    return task.out / NOTES / f"{task.name}.json"


def _read_note(task: ShardTask) -> dict[str, int]:
    return json.loads(_note_path(task).read_text(encoding="utf-8"))


def _is_finished(task: ShardTask) -> bool:
    return is_written(task.out, task.name) and _note_path(task).is_file()


def _ordered(counts: Counter[str]) -> dict[str, int]:
    """Totals first, then what happened, in the order of the alphabet."""
    first = ("utterances", "contexts")
    return {key: counts[key] for key in (*first, *sorted(set(counts) - {*first})) if counts[key]}
