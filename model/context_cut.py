"""Making a context fit: whole phrases are left out, from the end, and control characters become spaces.

A list loses entries, prose the ends of its sentences; a word is cut only where it alone does not fit.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

LONGEST_PIECE = 64  # characters; what is longer between two separators is cut between words
_PIECE = re.compile(r"[^,;:.!?\n，、；：。！？]*[,;:.!?\n，、；：。！？]*\s*")
_SEPARATORS = " \t\n,;:，、；："


def clean_text(text: str) -> str:
    """Return the text with a space for every control character. ValueError where it is no Unicode text at all."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the context has a character that is no text ({text[error.start]!a} at {error.start}); give it in UTF-8"
        ) from None
    return "".join(" " if unicodedata.category(c) == "Cc" and c not in "\t\n" else c for c in text).strip()


def cut(text: str, *, fits: Callable[[str], bool], keep: Iterable[str] = ()) -> str:
    """Return as many pieces from the start of `text` as fit; those in which the phrases `keep` stand come first."""
    pieces = _pieces(text)
    kept = _longest(pieces, _touched(text, pieces, keep), fits)
    return kept or _longest(pieces, [False] * len(pieces), fits)


def _longest(pieces: Sequence[str], held: Sequence[bool], fits: Callable[[str], bool]) -> str:
    """Bisect the number of leading pieces that fit beside the held ones; "" where not even these do."""

    def first(count: int) -> str:
        chosen = (piece for i, piece in enumerate(pieces) if i < count or held[i])
        return "".join(chosen).rstrip(_SEPARATORS)

    fewest, most = 0, len(pieces)
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if fits(first(middle)):
            fewest = middle
        else:
            most = middle - 1
    found = first(fewest)
    return found if fits(found) else ""


def _pieces(text: str) -> list[str]:
    """Cut behind separators; where these are far apart, between words; where words are too long, between characters."""
    pieces: list[str] = []
    for phrase in _PIECE.findall(text):
        for word in [phrase] if len(phrase) <= LONGEST_PIECE else re.findall(r"\s*\S+\s*", phrase):
            pieces += [word] if len(word) <= LONGEST_PIECE else word
    return [piece for piece in pieces if piece]


def _touched(text: str, pieces: Sequence[str], phrases: Iterable[str]) -> list[bool]:
    """Return which pieces have a part in one of the phrases."""
    spans = [match.span() for phrase in phrases if phrase for match in re.finditer(re.escape(phrase), text)]
    ends = list(accumulate(map(len, pieces)))
    return [any(start < end and end - len(piece) < stop for start, stop in spans) for end, piece in zip(ends, pieces)]
