"""Where phrases stand in a text, by words and not by letters: "ann" is not in "hannah".

Tokens here are words, and single characters of scripts that are written without spaces. A phrase (a keyword, a name in
a context) is a tuple of tokens. Its pieces are what of it says something when it stands alone: its words without
function words, pairs of neighbouring Han characters, runs of kana or Thai; the whole phrase where nothing is left.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, groupby, pairwise

from ..function_words import FUNCTION_WORDS
from .errors import METRICS, MIXED_TOKEN
from .normalize import CJK, SPACE_AT_UNSPACED, UNSPACED

Phrase = tuple[str, ...]

_TOKEN = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_KANA = re.compile("[\u3040-\u30ff\u31f0-\u31ff]")
_CJK = re.compile(f"[{CJK}]")
_UNITS = {"word": re.compile(r"\S+"), "char": re.compile(r"."), "mixed": MIXED_TOKEN}


class Tokens(Sequence[str]):
    """The tokens of a normalised text, and where each lies among its characters."""

    def __init__(self, text: str):
        found = list(_TOKEN.finditer(text))
        self.words: Phrase = tuple(match[0] for match in found)
        self.spans = [match.span() for match in found]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, at):
        return self.words[at]

    def scan(self, inventory: "Inventory") -> list[tuple[int, int]]:
        """Return (start, end) of the phrases that stand here: from the left, the longest first, none within another."""
        found, at = [], 0
        while at < len(self):
            longest = min(inventory.longest, len(self) - at)
            size = next((n for n in range(longest, 0, -1) if self.words[at : at + n] in inventory), 0)
            if size:
                found.append((at, at + size))
            at += size or 1
        return found

    def occurrences(self, piece: Phrase) -> list[tuple[int, int]]:
        """Return (start, end) of every place where a piece stands, overlaps included."""
        n = len(piece)
        return [(at, at + n) for at in range(len(self) - n + 1) if self.words[at : at + n] == piece]

    def places(self, inventory: "Inventory") -> list[tuple[int, int]]:
        """Return (start, end) of every place where a phrase stands, overlaps and phrases within others included."""
        sizes = range(1, min(inventory.longest, len(self)) + 1)
        starts = ((at, at + n) for n in sizes for at in range(len(self) - n + 1))
        return [(start, end) for start, end in starts if self.words[start:end] in inventory]

    def in_unit(self, text: str, unit: str, places: Iterable[tuple[int, int]]) -> list[bool]:
        """Say of each token of `unit` in `text` (as `errors.tokenize` cuts it) whether it lies in one of `places`."""
        covered = bytearray(len(text))
        for start, end in places:
            first, last = self.spans[start][0], self.spans[end - 1][1]
            covered[first:last] = b"\1" * (last - first)
        return [covered.find(1, *match.span()) >= 0 for match in _UNITS[unit].finditer(text)]


class Inventory:
    """A set of phrases that a text is scanned for; `base` adds those of another."""

    def __init__(self, phrases: Iterable[Phrase], *, base: "Inventory | None" = None):
        self.phrases, self.base = frozenset(phrases) - {()}, base
        self.longest = max([len(p) for p in self.phrases] + ([base.longest] if base else []), default=0)

    def __contains__(self, phrase: Phrase) -> bool:
        return phrase in self.phrases or (self.base is not None and phrase in self.base)


assert _UNITS.keys() == METRICS.keys()


@lru_cache(maxsize=1 << 18)
def phrase_of(text: str) -> Phrase:
    """Return the tokens of a normalised keyword or phrase."""
    return tuple(_TOKEN.findall(text))


def shown(tokens: Sequence[str]) -> str:
    """Return tokens as they are written: spaces between words only."""
    return SPACE_AT_UNSPACED.sub("", " ".join(tokens))


@lru_cache(maxsize=1 << 18)
def pieces_of(phrase: Phrase) -> frozenset[Phrase]:
    """Return what of a phrase says something when it stands alone."""
    return frozenset(_pieces(phrase)) or frozenset({phrase} if phrase else ())


def content_of(text: str, *, phrases: Iterable[Phrase]) -> frozenset[Phrase]:
    """Return the pieces of a normalised context; none of a bare list, of which its phrases have all."""
    words = tuple(_TOKEN.findall(text))
    return frozenset(_pieces(words)) if set(words) - set(chain.from_iterable(phrases)) else frozenset()


def _pieces(phrase: Phrase) -> Iterator[Phrase]:
    for kind, run in groupby(phrase, key=_kind):
        tokens = tuple(run)
        if kind == "word":
            yield from ((token,) for token in tokens if token.casefold() not in FUNCTION_WORDS)
        elif kind == "han":
            yield from pairwise(tokens)  # one character alone is in too many words
        elif len(tokens) > 1:
            yield tokens


def _kind(token: str) -> str:
    if not _UNSPACED.fullmatch(token):
        return "word"
    return "han" if _CJK.fullmatch(token) and not _KANA.fullmatch(token) else "run"


def keywords_of(
    meta: Mapping, *, reference: str, phrases: Iterable[str], normalize: Callable[[str], str]
) -> tuple[str, ...]:
    """Return an utterance's keywords: those of its meta, or if it has none those context phrases that were said."""
    given = meta.get("keywords") or []
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise ValueError(f"keywords of {meta.get('id', 'an utterance')!r} are {given!r}, not a list of texts")
    if given:
        return tuple(given)
    said, found = Tokens(normalize(reference)), {phrase: phrase_of(normalize(phrase)) for phrase in phrases}
    return tuple(phrase for phrase, tokens in found.items() if tokens and said.occurrences(tokens))
