"""Context text: cleaning it, its words, and whether it gives the transcript away."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from ..function_words import FUNCTION_WORDS
from ..phonetics import HAN, plain_letters

JOINERS = "\u200c\u200d"  # format characters that decide how Indic scripts, Persian and emoji read


class _Printable(dict):
    """A table for str.translate, filled as characters come: white space becomes a blank, what has no shape nothing."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        blank = category[0] == "Z" or character.isspace()
        kept = category[0] != "C" or category == "Co" or character in JOINERS
        return self.setdefault(code, " " if blank else character if kept else "")


PRINTABLE = _Printable()


def clean_context(text: str) -> str:
    """Return a text on one line: control and format characters dropped, white space made single blanks."""
    return " ".join(text.translate(PRINTABLE).split())


@lru_cache(maxsize=1 << 11)
def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text as they are compared: plain letters, each Chinese character a word."""
    plain = plain_letters(text)
    return tuple((plain if plain.isascii() else re.sub(HAN, r" \g<0> ", plain)).split())


@lru_cache(maxsize=1 << 11)
def content_words(text: str) -> frozenset[str]:
    """Return the words that say what a text is about; of Chinese, its pairs of neighbouring characters."""
    words = words_of(text)
    if text.isascii():
        return frozenset(words) - FUNCTION_WORDS
    pairs = {a + b for a, b in pairwise(words) if re.match(HAN, a) and re.match(HAN, b)}
    return frozenset(pairs) | {word for word in words if word not in FUNCTION_WORDS and not re.match(HAN, word)}


def contains(text: str, phrase: str) -> bool:
    """Whether the words of a phrase stand in a text one after the other."""
    return f" {' '.join(words_of(phrase))} " in f" {' '.join(words_of(text))} "


def leaks(context: str, transcript: str, *, keywords: Sequence[str] = (), share: float = 0.6) -> bool:
    """Whether a context gives the transcript away: it has at least `share` of its words in one run.

    A run within one keyword gives nothing away, since naming keywords is what a context is for. So an utterance that is
    just a name may have the name in its context, among others: a context of nothing but the transcript always leaks.
    """
    said, written = words_of(transcript), words_of(context)
    run = max(1, math.ceil(share * len(said) - 1e-9))
    if not said or len(written) < min(run, len(said)):
        return False
    if said == written:
        return True
    text = f" {' '.join(written)} "
    allowed = [f" {' '.join(words_of(keyword))} " for keyword in keywords]
    pieces = (f" {' '.join(said[start : start + run])} " for start in range(len(said) - run + 1))
    return any(piece in text and not any(piece in keyword for keyword in allowed) for piece in pieces)
