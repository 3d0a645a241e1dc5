"""A grammar of short requests: intents, templates with {slots}, and names that sound alike.

A sentence starts at an intent and its slots are filled until none is left. What a word is depends on the language: with
spaces between words, or without any, where every character counts as one.

Two sentences are the same if they sound the same, so `call mark` never trains a model that is tested on `call marc`.
What held-out sentences do share with training is the grammar: the same templates with unseen fillings. They measure
whether the words are heard, not whether new phrasings are understood.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

EXHAUSTED = 100_000  # draws in a row that all sound like earlier ones


class Intent(NamedTuple):
    """Requests of one kind: their share of all sentences, in percent, and the templates, equally likely."""

    share: int
    templates: tuple[str, ...]


class Sentence(NamedTuple):
    """One request: its text, the intent it came from, and the names and places in it."""

    text: str
    intent: str
    keywords: tuple[str, ...]


def listed(text: str) -> tuple[str, ...]:
    """Split a list whose items are divided by commas."""
    return tuple(" ".join(item.split()) for item in text.split(","))


@dataclass(frozen=True)
class Grammar:
    """One language's requests. A slot's alternatives are equally likely; naming one twice doubles its share."""

    slots: Mapping[str, tuple[str, ...]]
    intents: Mapping[str, Intent]
    keyword_slots: tuple[str, ...]  # what a listener could be told beforehand: the contact list and the map
    homophones: tuple[tuple[str, ...], ...]  # groups of words that sound alike
    lengths: range  # of a sentence, in words
    space: str = " "  # between words; "" makes every character a word

    @cached_property
    def sounds_like(self) -> dict[str, str]:
        """Every word that sounds like another, and the first word of its group."""
        return {word: group[0] for group in self.homophones for word in group}

    def words(self, text: str) -> list[str]:
        return text.split() if self.space else list(text)

    def spoken_form(self, text: str) -> str:
        """Return the text with every word that sounds like another replaced by the first of its group.

        This is what the synthesiser is given, so that names of a group do sound alike (espeak-ng reads `kaitlyn` as
        `kite-lin`), and what decides whether two sentences are the same.
        """
        return self.space.join(self.sounds_like.get(word, word) for word in self.words(text))

    def draw(self, rng: random.Random) -> Sentence:
        """Draw one sentence; the same generator state gives the same sentences in every Python version."""
        while True:
            intent = _pick(rng, self._shares)
            keywords: list[str] = []
            text = self._fill(_pick(rng, self.intents[intent].templates), rng, keywords)
            if len(self.words(text)) in self.lengths:
                return Sentence(text, intent, tuple(dict.fromkeys(keywords)))

    def distinct_sentences(self, rng: random.Random) -> Iterator[Sentence]:
        """Yield sentences without end, no two of which sound the same; ValueError when there are no more."""
        seen: set[str] = set()
        repeats = 0
        while repeats < EXHAUSTED:
            sentence = self.draw(rng)
            spoken = self.spoken_form(sentence.text)
            repeats += 1
            if spoken not in seen:
                seen.add(spoken)
                repeats = 0
                yield sentence
        raise ValueError(f"the grammar has hardly more than {len(seen):,} sentences that sound different; ask for less")

    @cached_property
    def _shares(self) -> tuple[str, ...]:
        """Name every intent as often as it has percent."""
        return tuple(name for name, intent in self.intents.items() for _ in range(intent.share))

    def _fill(self, template: str, rng: random.Random, keywords: list[str]) -> str:
        """Fill the template's slots from left to right; names and places are added to `keywords`."""
        text = ""
        for literal, slot in _parts(template):
            filled = self._fill(_pick(rng, self.slots[slot]), rng, keywords) if slot else ""
            if slot in self.keyword_slots:
                keywords.append(filled)
            text += literal + filled
        return text


@cache
def _parts(template: str) -> tuple[tuple[str, str], ...]:
    """Split `call {person} back` into (`call `, `person`), (` back`, ``)."""
    literals_and_slots = [*re.split(r"\{(\w+)\}", template), ""]
    return tuple(zip(literals_and_slots[::2], literals_and_slots[1::2]))


def _pick(rng: random.Random, items: tuple[str, ...]) -> str:
    # random() is the one method whose values Python promises to keep; choice() has changed before.
    return items[int(rng.random() * len(items))]
