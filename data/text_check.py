"""What is wrong with a transcript: characters that nobody speaks, scripts of another language.

Scripts are the first word of a letter's Unicode name (LATIN, CYRILLIC, CJK, ...), which needs no table of its own.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

# Zero-width (non-)joiners are part of Persian and Indic spelling; all other invisible characters are accidents.
JOINERS = "\u200c\u200d"
UNSPEAKABLE = {"Cc": "control", "Cf": "invisible", "Cs": "surrogate", "Co": "private", "Cn": "unassigned"}
# Languages written in these commonly hold Latin words (names, brands), without a space in between.
WITH_LATIN = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}
# Written together in one word.
ONE_WORD = WITH_LATIN | {"LATIN", "FULLWIDTH"}
FREQUENT_UTTERANCES = 3  # a second script of a language is expected from so many utterances on ...
FREQUENT_FRACTION = 0.02  # ... and so large a part of them


def character_problem(text: str) -> str | None:
    """Return what the first bad character of a text is, by code point."""
    for char in text:
        if char == "\ufffd":
            return "the text holds U+FFFD, left by a wrong decoding"
        kind = UNSPEAKABLE.get(unicodedata.category(char))
        if kind and char not in JOINERS:
            return f"the text holds a {kind} character (U+{ord(char):04X})"
    return None


@lru_cache(maxsize=65536)
def script(letter: str) -> str:
    """Return LATIN, CYRILLIC, CJK, ...; empty for what is no letter."""
    if not unicodedata.category(letter).startswith("L"):
        return ""
    return unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0]


def scripts(text: str) -> Counter[str]:
    """Count the letters of a text by script. Modifier letters, which belong to several, are left out."""
    counts = Counter(map(script, text))
    counts.pop("", None)
    counts.pop("MODIFIER", None)
    return counts


def mixed_word(text: str) -> str | None:
    """Return the first word that mixes scripts, as one with a Cyrillic letter in the place of its Latin double does."""
    for word in text.split():
        found = set(scripts(word))
        if len(found) > 1 and not found <= ONE_WORD:
            return f"the word {word!r} mixes {' and '.join(sorted(found))} letters"
    return None


def expected_scripts(texts: Iterable[Counter[str]]) -> set[str]:
    """Return the scripts in which a language is written, from the script counts of its utterances.

    These are the one with the most letters, and others that are frequent.
    """
    letters: Counter[str] = Counter()
    utterances: Counter[str] = Counter()
    total = 0
    for counts in texts:
        letters.update(counts)
        utterances.update(counts.keys())
        total += 1
    if not letters:
        return set()
    least = max(FREQUENT_UTTERANCES, FREQUENT_FRACTION * total)
    expected = {letters.most_common(1)[0][0]} | {name for name, count in utterances.items() if count >= least}
    return expected | {"LATIN"} if expected & WITH_LATIN else expected
