"""From an utterance to a context: which kind and form, which names, what text, and whether that text is allowed.

All is drawn from (seed, key, variant), so neither the number of processes nor the order of shards changes a word. Every
kind is made by one recipe: a core (the keywords; a sound-alike of each; or names that have nothing to do with it) among
distractors, some of which sound close to the core.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from .config import ContextsConfig
from .corpus import CorpusFacts, Said, language, rare_words
from .names import NamePool, NamePools
from .sidecar import UtteranceContext
from .templates import ONE_BY_ONE, pick, shuffled, weighted, written, written_turns
from .text import clean_context, contains, content_words, leaks

ATTEMPTS = 6  # texts from templates before an utterance goes without
LISTS_FROM = 3  # attempt from which only bare lists are tried
MAX_TURNS = 3
MAX_ITEMS = 4  # names of a form that says each with a sentence, unless longer lists are asked for
MAX_ANSWER_CHARS = 4000  # of a language model; lists may be longer


class Draft(NamedTuple):
    """A context before it has a text. `topic` is what a language model writes about, None where it is not asked."""

    said: Said
    variant: int
    kind: str
    form: str
    keywords: tuple[str, ...]
    core: tuple[str, ...]
    others: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    topic: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.core, *self.others)


class Composer:
    """Drafts and writes the contexts of the utterances of one shard; `counts` says what happened."""

    def __init__(self, cfg: ContextsConfig, facts: CorpusFacts, said: Sequence[Said], *, pools: NamePools):
        self.cfg, self.said = cfg, said
        self.pools = pools
        self.counts: Counter[str] = Counter()
        self._common = None if facts.common is None else frozenset(facts.common)
        self._keywords = [self._keywords_of(one) for one in said]
        self._mentions: dict[str, list[int]] = defaultdict(list)
        for number, keywords in enumerate(self._keywords):
            for keyword in keywords:
                self._mentions[keyword].append(number)

    def _keywords_of(self, said: Said) -> tuple[str, ...]:
        return said.keywords if self._common is None else rare_words(said.text, common=self._common)

    def _pool(self, said: Said) -> NamePool:
        return self.pools.of(language(said.lang))

    # --- what the context is made of

    def draft(self, number: int, variant: int) -> Draft:
        """Draw kind, form and names of a context of utterance `number` of the shard."""
        said = self.said[number]
        rng = random.Random(f"{self.cfg.seed}-{said.key}-{variant}")
        keywords = self._keywords[number]
        kind = weighted(rng, self.cfg.shares)
        form = weighted(rng, self.cfg.forms)
        least, most = self.cfg.list_size
        size = least + int(rng.random() * (most - least + 1))
        core = tuple(shuffled(rng, keywords)[: self.cfg.max_keywords])
        if kind == "conflict":
            core = tuple(alike for word in core if (alike := self._pool(said).alike(rng, word, text=said.text)))
        if kind in ("relevant", "history", "conflict") and not core:
            self.counts[f"{kind} became irrelevant"] += 1
            kind = "irrelevant"
        draft = Draft(said, variant, kind, form, keywords, core)
        if kind == "empty":
            return draft
        if kind == "history":
            draft = draft._replace(form="dialogue", turns=self._turns(rng, number))
        if draft.form in ONE_BY_ONE:
            size = min(size, max(least, MAX_ITEMS))
        return self._with_names(draft, rng, number, size=size)

    def _with_names(self, draft: Draft, rng: random.Random, number: int, *, size: int) -> Draft:
        said, keywords, pool = draft.said, draft.keywords, self._pool(draft.said)
        if draft.kind in ("relevant", "history"):
            without = pool.confusable(keywords)
        else:
            without = pool.said_in(said.text, keywords)
        if draft.kind == "irrelevant":
            count = min(max(1, len(keywords)), self.cfg.max_keywords)
            draft = draft._replace(core=tuple(pool.decoys(rng, count, without=without)))
        others = pool.choose(rng, size, near=draft.core, close_share=self.cfg.close_share, without=without)
        self.counts["lists shorter than asked for"] += len(others) < size
        draft = draft._replace(others=tuple(others))
        return draft if self.cfg.writer == "templates" else self._with_topic(draft, rng, number)

    def _turns(self, rng: random.Random, number: int) -> tuple[str, ...]:
        """Utterances of the shard that mention a keyword of this one, those of its speaker first."""
        said, keywords = self.said[number], self._keywords[number]
        found = list(dict.fromkeys(other for word in keywords for other in self._mentions[word] if other != number))
        found = sorted(
            shuffled(rng, found)[: 4 * MAX_TURNS], key=lambda other: self.said[other].speaker != said.speaker
        )
        texts = dict.fromkeys(self.said[other].text for other in found)
        fitting = [text for text in texts if not self._leaks(text, said, keywords)]
        return tuple(fitting[: 1 + int(rng.random() * MAX_TURNS)])

    def _with_topic(self, draft: Draft, rng: random.Random, number: int) -> Draft:
        """Add what a language model is to write about, in place of the template's company."""
        said = draft.said
        others = draft.others[: int(rng.random() * 4)]
        if draft.kind in ("relevant", "history"):
            return draft._replace(topic=said.text, others=others)
        if draft.kind == "conflict":
            return draft._replace(topic=", ".join(draft.core), others=others)
        without = content_words(said.text)
        for _ in range(20):
            other = pick(rng, self.said)
            if not content_words(other.text) & without:
                return draft._replace(topic=other.text, others=others)
        return draft

    # --- its text

    def from_templates(self, draft: Draft) -> UtteranceContext:
        """Write a context by templates, and an empty one where nothing is allowed."""
        if draft.kind == "empty":
            return UtteranceContext("empty", "", ())
        rng = random.Random(f"text-{self.cfg.seed}-{draft.said.key}-{draft.variant}")
        for attempt in range(ATTEMPTS):
            form = "list" if attempt >= LISTS_FROM else draft.form if not attempt else weighted(rng, self.cfg.forms)
            context = self._write(draft, rng, form=form, with_turns=attempt == 0)
            problem = self.problem(draft, context)
            if problem is None:
                return context
            self.counts[f"{draft.kind} rejected: {problem}"] += 1
        self.counts[f"{draft.kind} became empty"] += 1
        return UtteranceContext("empty", "", ())

    def _write(self, draft: Draft, rng: random.Random, *, form: str, with_turns: bool) -> UtteranceContext:
        lang = draft.said.lang
        if draft.turns and with_turns:
            text = clean_context(written_turns(rng, draft.turns, lang=lang))
            return UtteranceContext(draft.kind, text, self.phrases_in(text, draft))
        text = clean_context(written(form, rng, core=draft.core, others=draft.others, lang=lang))
        return UtteranceContext(draft.kind, text, tuple(sorted(draft.names, key=text.find)))

    def from_answer(self, draft: Draft, answer: str) -> UtteranceContext | None:
        """Make a context of what a language model wrote; None, and counted, where that is not allowed."""
        text = clean_context(answer)
        context = UtteranceContext(draft.kind, text, self.phrases_in(text, draft))
        problem = "nothing written" if not text else "too long" if len(text) > MAX_ANSWER_CHARS else None
        problem = problem or self.problem(draft, context)
        if problem:
            self.counts[f"{draft.kind} rejected: {problem}"] += 1
        return None if problem else context

    def phrases_in(self, text: str, draft: Draft) -> tuple[str, ...]:
        """The names of the draft and of the pool that stand in a text."""
        named = [name for name in draft.names if contains(text, name)]
        return tuple(dict.fromkeys([*named, *self._pool(draft.said).found_in(text)]))

    def problem(self, draft: Draft, context: UtteranceContext) -> str | None:
        """Return why a text may not be the context that was drafted; None where it may."""
        said, keywords, text = draft.said, draft.keywords, context.text
        if self._leaks(text, said, keywords):
            return "leak"
        present = [contains(text, name) for name in draft.core]
        if draft.kind == "irrelevant":
            unrelated = self._pool(said).is_unrelated(text, context.phrases, text=said.text, keywords=keywords)
            return None if text and unrelated else "related"
        if not (all(present) if draft.kind == "relevant" else any(present)):
            return "name missing"
        if draft.kind == "conflict" and any(contains(text, keyword) for keyword in keywords):
            return "related"
        return None

    def _leaks(self, text: str, said: Said, keywords: tuple[str, ...]) -> bool:
        return leaks(text, said.text, keywords=keywords, share=self.cfg.leak_share)
