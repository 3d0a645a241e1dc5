"""Making a context fit: whole phrases are left out, from the end, and control characters are dropped.

What is dropped is what `clean_context` (data/contexts/text.py) drops from the contexts of training; lines stay.
A list loses entries, prose the ends of its sentences; a word is cut only where it alone does not fit.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

LONGEST_PART = 64  # characters; what is longer between two separators is cut between words
_PART = re.compile(r"[^,;:.!?\n，、；：。！？]*[,;:.!?\n，、；：。！？]*\s*")
_SEPARATORS = " \t\n,;:，、；："
_JOINERS = "\u200c\u200d"  # format characters that decide how Indic scripts, Persian and emoji read


def clean_text(text: str) -> str:
    """Return the text without characters that have no shape. ValueError where it is no Unicode text at all."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the context has a character that is no text ({text[error.start]!a} at {error.start}); give it in UTF-8"
        ) from None
    return "".join(map(_printable, text)).strip()


def _printable(character: str) -> str:
    """Return a line break or tab as it is, other white space as a blank, what has no shape as nothing."""
    category = unicodedata.category(character)
    if character in "\t\n":
        return character
    if category[0] == "Z" or character.isspace():
        return " "
    return "" if category[0] == "C" and category != "Co" and character not in _JOINERS else character


def cut(text: str, *, fits: Callable[[str], bool], keep: Iterable[str] = ()) -> str:
    """Return as many parts from the start of `text` as fit; those in which the phrases `keep` stand come first."""
    parts = _parts(text)
    kept = _longest(parts, _touched(text, parts, keep), fits)
    return kept or _longest(parts, [False] * len(parts), fits)


def _longest(parts: Sequence[str], held: Sequence[bool], fits: Callable[[str], bool]) -> str:
    """Bisect the number of leading parts that fit beside the held ones; "" where not even these do."""

    def first(count: int) -> str:
        chosen = (part for i, part in enumerate(parts) if i < count or held[i])
        return "".join(chosen).rstrip(_SEPARATORS)

    fewest, most = 0, len(parts)
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if fits(first(middle)):
            fewest = middle
        else:
            most = middle - 1
    found = first(fewest)
    return found if fits(found) else ""


def _parts(text: str) -> list[str]:
    """Cut behind separators; where these are far apart, between words; where words are too long, between characters."""
    parts: list[str] = []
    for phrase in _PART.findall(text):
        for word in [phrase] if len(phrase) <= LONGEST_PART else re.findall(r"\s*\S+\s*", phrase):
            parts += [word] if len(word) <= LONGEST_PART else word
    return [part for part in parts if part]


def _touched(text: str, parts: Sequence[str], phrases: Iterable[str]) -> list[bool]:
    """Return which parts overlap one of the phrases."""
    spans = [match.span() for phrase in phrases if phrase for match in re.finditer(re.escape(phrase), text)]
    ends = list(accumulate(map(len, parts)))
    return [any(start < end and end - len(part) < stop for start, stop in spans) for end, part in zip(ends, parts)]
