"""What sounds alike: sound keys, their distance, and groups of words that somebody says are one sound.

Latin script is keyed by Metaphone (https://en.wikipedia.org/wiki/Metaphone), made for English and blind to vowels, so
two words sound alike only if their letters are also close: `jon` is `john` and not `jane`. Chinese is keyed by pinyin
without tones. Every other script, and digits, stand for themselves. Metaphone misses some pairs (`sean`, `shawn`):
groups say them explicitly.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import cast

import jellyfish
import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

# Of the letters of two words with one key: keeps jon/john (0.75) and neil/neal, parts jon/jane and neil/noel (0.5).
ALIKE_LETTERS = 0.6
NO_MARKS = str.maketrans({"æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"})
HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
RUNS = re.compile(rf"(?P<latin>[a-z]+)|(?P<han>{HAN}+)")
# Spellings of one sound that Metaphone, or a comparison of letters, would take for two.
RESPELLED = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"ch(?=[rl])|ck|qu(?=e\b)|c(?=[aouklrt]|$)", "k"),
        (r"ph", "f"),
        (r"(?<=.)y", "i"),
        (r"(.)\1+", r"\1"),
    )
)


class _WordsOnly(dict):
    """A table for str.translate, filled as characters come: letters, marks and digits stay, the rest becomes blank."""

    def __missing__(self, code: int) -> str:
        kept = unicodedata.category(chr(code))[0] in "LMN"
        return self.setdefault(code, "" if chr(code) in "'’" else chr(code) if kept else " ")


WORDS_ONLY = _WordsOnly()


@lru_cache(maxsize=1 << 11)
def plain_letters(text: str) -> str:
    """Return a text as words only: lower case, full width made half, Latin letters without marks, no punctuation."""
    if text.isascii():
        return " ".join(text.lower().translate(WORDS_ONLY).split())
    text = unicodedata.normalize("NFKC", text).casefold().translate(NO_MARKS)
    parted = unicodedata.normalize("NFD", text)
    # Accents on Latin letters only: elsewhere marks are part of how a word reads.
    text = unicodedata.normalize("NFC", re.sub(r"(?<=[a-z])[\u0300-\u036f]+", "", parted))
    return " ".join(text.translate(WORDS_ONLY).split())


@lru_cache(maxsize=1 << 18)
def sound_key(word: str, *, lang: str = "en") -> str:
    """Return what stands for the sound of a word or phrase: equal keys sound alike, near ones similar.

    The script decides how it is keyed; `lang` only whether Han is read as Chinese (not in ja, ko).
    """
    return " ".join("".join(_keys(part, lang)) for part in plain_letters(word).split())


def _keys(word: str, lang: str) -> Iterable[str]:
    at = 0
    for run in RUNS.finditer(word):
        yield word[at : run.start()]  # other scripts and digits
        at = run.end()
        if run["latin"]:
            yield _metaphone(run["latin"])
        else:
            yield run["han"] if lang[:2] in ("ja", "ko") else _pinyin(run["han"])
    yield word[at:]


def _metaphone(letters: str) -> str:
    return jellyfish.metaphone(_respelled(letters)) or letters


def _respelled(letters: str) -> str:
    for pattern, by in RESPELLED:
        letters = pattern.sub(by, letters)
    return letters


def _pinyin(han: str) -> str:
    import pypinyin  # here: its dictionary takes a quarter of a second

    return "".join(f"{syllable}'" for syllable in pypinyin.lazy_pinyin(han))


@lru_cache(maxsize=1 << 18)
def _letters(word: str) -> str:
    """The letters that are compared beside the key: respelled Latin; Chinese as it sounds."""
    plain = plain_letters(word)
    if re.search(HAN, plain):
        return sound_key(word)
    return " ".join(map(_respelled, plain.split()))


def sound_groups(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return {word: the one that stands for its group}; groups that share a word are one."""
    stands: dict[str, str] = {}
    for group in groups:
        words = [plain_letters(word) for word in group]
        heads = {stands[word] for word in words if word in stands}
        head = min(heads, default=words[0] if words else "")
        stands.update((word, head) for word, old in [*stands.items()] if old in heads)
        stands.update((word, head) for word in words)
    return stands


def spoken_words(text: str, *, groups: Mapping[str, str]) -> str:
    """Return the plain letters of a text, each word, or the whole, replaced by what stands for its group."""
    plain = plain_letters(text)
    return groups.get(plain) or " ".join(groups.get(word, word) for word in plain.split())


def sounds_like(a: str, b: str, *, lang: str = "en", groups: Iterable[Sequence[str]] | dict[str, str] = ()) -> bool:
    """Whether two words or phrases could be heard as one another; a word sounds like itself.

    `groups` are lists of words that sound alike, or what `sound_groups` made of them (faster in a loop).
    """
    stands = cast("dict[str, str]", groups) if isinstance(groups, dict) else sound_groups(groups)
    a, b = (spoken_words(word, groups=stands) for word in (a, b))
    if a == b:
        return True
    if not a or not b or sound_key(a, lang=lang) != sound_key(b, lang=lang):
        return False
    return Levenshtein.normalized_similarity(_letters(a), _letters(b)) >= ALIKE_LETTERS


def sound_distance(a: str, b: str, *, lang: str = "en") -> float:
    """Return how far apart two words or phrases sound, 0 (the same) to 1: half by their keys, half by their letters."""
    by_key = Levenshtein.normalized_distance(sound_key(a, lang=lang), sound_key(b, lang=lang))
    return (by_key + Levenshtein.normalized_distance(_letters(a), _letters(b))) / 2


class SoundPool:
    """Words and phrases, keyed once, that many others are compared with."""

    def __init__(self, names: Sequence[str], *, lang: str = "en"):
        self.names, self.lang = list(names), lang
        keys = [sound_key(name, lang=lang) for name in self.names]
        self._letters = [_letters(name) for name in self.names]
        self._keys = sorted(set(keys))
        numbers = {key: number for number, key in enumerate(self._keys)}
        self._key_of_name = np.array([numbers[key] for key in keys], dtype=np.int64)

    def distances(self, word: str) -> np.ndarray:
        """Return the `sound_distance` of every name to `word`, float32 [names]."""
        return (self._by_key(word)[self._key_of_name] + self._by_letters(word, self._letters)) / 2

    def nearest(self, word: str, count: int) -> np.ndarray:
        """Return the numbers of about the `count` nearest names, nearest first: 20 ms among 100,000.

        Letters are compared only where the keys are among the nearest, which a name far by its key hardly ever is.
        """
        by_key = self._by_key(word)[self._key_of_name]
        kept = np.arange(len(self.names))
        if len(kept) > 8 * count:
            kept = np.flatnonzero(by_key <= np.partition(by_key, 8 * count)[8 * count])
        distances = by_key[kept] + self._by_letters(word, [self._letters[number] for number in kept])
        return kept[np.argsort(distances, kind="stable")[:count]]

    def _by_key(self, word: str) -> np.ndarray:
        return _distances(sound_key(word, lang=self.lang), self._keys)

    def _by_letters(self, word: str, letters: Sequence[str]) -> np.ndarray:
        return _distances(_letters(word), letters)


def _distances(one: str, many: Sequence[str]) -> np.ndarray:
    return process.cdist([one], many, scorer=Levenshtein.normalized_distance, dtype=np.float32)[0]
