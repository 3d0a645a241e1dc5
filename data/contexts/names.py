"""Names that contexts draw on: which sound like a keyword, which are near it, and which have nothing to do with a text.

Sounds are compared by their keys alone here, which takes more names for alike than `sounds_like` does: what is left out
of an irrelevant context must not sound like anything that is said, not even by a coarse ear.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

from ..phonetics import SoundPool, plain_letters, sound_groups, sound_key, sounds_like, spoken_words
from .templates import pick, shuffled
from .text import contains, content_words, words_of

MIN_NEAREST = 32  # nearest names that are looked at for a keyword
TRIES = 20  # draws per wanted name before all names are gone through


class NamePools:
    """A pool for each language that has names enough, made when it is asked for; the others draw on all names."""

    def __init__(self, names: Mapping[str, Mapping[str, int]], *, groups: Iterable[Sequence[str]] = ()):
        self._names, self._groups = names, groups
        self._pools: dict[str, NamePool] = {}

    def of(self, lang: str) -> NamePool:
        """Return the pool for utterances of a language."""
        lang = lang if lang in self._names else ""
        if lang not in self._pools:
            names = self._names[lang]
            weights = list(names.values())
            self._pools[lang] = NamePool(list(names), weights=weights, groups=self._groups, lang=lang)
        return self._pools[lang]


class NamePool:
    """Names that distractors are drawn from, by sound. `groups` are lists of words that sound alike.

    `weights` say how often each is drawn: as often as it is said, so that keywords do not look different.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Sequence[int] = (),
        groups: Iterable[Sequence[str]] = (),
        lang: str = "en",
    ):
        self.names, self.lang = list(names), lang
        self._cumulated = list(accumulate(weights or [1] * len(self.names)))
        self.heads = sound_groups(groups)
        self._members: dict[str, list[str]] = defaultdict(list)
        for word, head in self.heads.items():
            self._members[head].append(word)
        self.sounds = lru_cache(maxsize=1 << 12)(self._sounds_of)  # sound keys of the words of a text
        self.whole_sound = lru_cache(maxsize=50_000)(self._whole_sound_of)  # `new ark` in one, so that it is `newark`
        self._confusable = lru_cache(maxsize=1 << 12)(self._confusable_with)
        self._plain = [plain_letters(name) for name in self.names]
        self._whole: dict[str, list[int]] = defaultdict(list)
        self._by_sound: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(self.names):
            self._whole[self.whole_sound(name)].append(number)
            for sound in {*self.sounds(name), self.whole_sound(name)}:
                self._by_sound[sound].append(number)
        self._by_words = {" ".join(words_of(name)): name for name in reversed(self.names)}
        self._longest: dict[str, int] = defaultdict(int)  # first word -> words of the longest name that begins with it
        for words in map(str.split, self._by_words):
            self._longest[words[0]] = max(self._longest[words[0]], len(words))
        self._sounds = SoundPool(self.names, lang=lang)
        self._nearest = lru_cache(maxsize=1 << 13)(self._find_nearest)

    def _sounds_of(self, text: str) -> frozenset[str]:
        return frozenset(sound_key(word, lang=self.lang) for word in words_of(spoken_words(text, groups=self.heads)))

    def _whole_sound_of(self, name: str) -> str:
        return sound_key("".join(spoken_words(name, groups=self.heads).split()), lang=self.lang)

    def sound_alikes(self, keyword: str) -> list[str]:
        """Return what sounds like a keyword and is spelled otherwise: variants by the groups, and names of the pool."""
        plain = plain_letters(keyword)
        words = plain.split()
        found = list(self._members.get(self.heads.get(plain, ""), []))
        for at, word in enumerate(words):
            for other in self._members.get(self.heads.get(word, ""), []):
                found.append(" ".join([*words[:at], other, *words[at + 1 :]]))
        for number in self._whole.get(self.whole_sound(keyword), []):
            if sounds_like(self.names[number], keyword, lang=self.lang, groups=self.heads):
                found.append(self.names[number])
        spelled: dict[str, str] = {}
        for name in found:
            spelled.setdefault(plain_letters(name), name)
        spelled.pop(plain, None)
        return list(spelled.values())

    def said_in(self, text: str, keywords: Iterable[str]) -> set[int]:
        """Return the numbers of the names that have a word, or a word's sound, in common with a text or keywords."""
        heard = self.sounds(text) | {self.whole_sound(keyword) for keyword in keywords}
        return {number for sound in heard for number in self._by_sound.get(sound, ())}

    def confusable(self, keywords: Iterable[str]) -> set[int]:
        """Return the numbers of the names that sound like a keyword, or have a word that sounds like one of its words.

        A word that both spell alike does not count: `oak street` may stand beside `maple street`.
        """
        return {number for keyword in keywords for number in self._confusable(keyword)}

    def _confusable_with(self, keyword: str) -> frozenset[int]:
        found = set(self._whole.get(self.whole_sound(keyword), ()))
        words = words_of(keyword)
        sounds = self.sounds(keyword)
        for number in {number for sound in sounds for number in self._by_sound.get(sound, ())} - found:
            others = [word for word in words_of(self.names[number]) if word not in words]
            if any(self.sounds(word) & sounds for word in others):
                found.add(number)
        return frozenset(found)

    def is_unrelated(self, context: str, phrases: Iterable[str], *, text: str, keywords: Sequence[str]) -> bool:
        """Whether a context has nothing of a text: none of its words but function words, nothing like a keyword.

        Its phrases may not even share a function word, or the sound of any word, with the text.
        """
        said, named = self.sounds(text), set()
        keyword_sounds = self.sounds(" ".join(keywords)) | {self.whole_sound(keyword) for keyword in keywords}
        for phrase in phrases:
            named |= {*self.sounds(phrase), self.whole_sound(phrase)}
        if named & (said | keyword_sounds) or self.sounds(context) & keyword_sounds:
            return False
        return not content_words(context) & content_words(text)

    def choose(
        self, rng: random.Random, count: int, *, near: Sequence[str], close_share: float, without: Collection[int]
    ) -> list[str]:
        """Draw `count` names, fewer if there are no more: a share of them close to `near` by sound, the others any.

        `without` are numbers of names that may not be drawn.
        """
        taken = {plain_letters(name) for name in near}
        chosen: list[str] = []

        def take(number: int) -> None:
            if number not in without and self._plain[number] not in taken:
                taken.add(self._plain[number])
                chosen.append(self.names[number])

        close = round(count * close_share)
        around = [self._nearest(name, max(MIN_NEAREST, 2 * close)) for name in near] if close else []
        # From twice as many as are wanted: a keyword has not the same company in each of its contexts.
        candidates = [number for rank in zip(*around) for number in rank if number not in without]
        for number in shuffled(rng, list(dict.fromkeys(candidates))[: 2 * close]):
            if len(chosen) < close:
                take(number)
        for _ in range(TRIES * count):
            if len(chosen) == count:
                return chosen
            take(bisect(self._cumulated, rng.random() * self._cumulated[-1]))
        for number in shuffled(rng, range(len(self.names))):
            if len(chosen) == count:
                break
            take(number)
        return chosen

    def found_in(self, text: str) -> list[str]:
        """Return the names that stand in a text, word for word."""
        words = words_of(text)
        starts = (start for start in range(len(words)) if words[start] in self._longest)
        return list(
            dict.fromkeys(
                self._by_words[piece]
                for start in starts
                for length in range(self._longest[words[start]], 0, -1)
                if (piece := " ".join(words[start : start + length])) in self._by_words
            )
        )

    def decoys(self, rng: random.Random, count: int, *, without: Collection[int]) -> list[str]:
        """Draw names that stand where keywords would."""
        return self.choose(rng, count, near=(), close_share=0.0, without=without)

    def alike(self, rng: random.Random, keyword: str, *, text: str) -> str | None:
        """Draw a sound-alike of a keyword that is not itself said in the text."""
        found = [name for name in self.sound_alikes(keyword) if not contains(text, name)]
        return pick(rng, found) if found else None

    def _find_nearest(self, name: str, count: int) -> list[int]:
        return self._sounds.nearest(name, count).tolist()
