"""Which unit and which normaliser suit a language, and a corpus of several.

Languages written without spaces are scored by character (CER), all others by word (WER), text that switches between
the two kinds (a tag such as zh-en) by both (MER). A corpus of several languages is normalised as one; its overall rate
is MER, unless all of them are scored alike.
"""

import re
from collections.abc import Iterable, Sequence

from .errors import has_cjk

BY_CHARACTER = frozenset({"zh", "cmn", "yue", "wuu", "nan", "hak", "ja", "th", "lo", "my", "km"})
# What the second part of a tag such as zh-en must be to name a language; in zh-TW and zh-Hans it is a region or script.
SWITCHED_WITH = frozenset({"en", "de", "fr", "es", "ru", "ko", "ms", "vi"})


def unit_of(lang: str, *, texts: Iterable[str] = ()) -> str:
    """Return "word", "char" or "mixed" for a language tag; without a tag the texts decide."""
    if not lang:
        return "mixed" if has_cjk(texts) else "word"
    first, *others = re.split(r"[-_+]", lang.lower())
    if {first, *others} & BY_CHARACTER and {first, *others[:1]} & SWITCHED_WITH:
        return "mixed"
    return "char" if first in BY_CHARACTER else "word"


def suited(languages: Sequence[str], *, texts: Sequence[str]) -> tuple[str, str]:
    """Return (normaliser, unit of the overall rate) for the references of a corpus and their language tags.

    English and other languages with spaces come out of both normalisers alike, so that a rate in a corpus of several
    languages may stand beside that of one.
    """
    units = {unit_of(lang, texts=[text] if not lang else ()) for lang, text in {*zip(languages, texts)}}
    unit = units.pop() if len(units) == 1 else "mixed"
    return ("whisper-basic" if unit == "word" else "multilingual"), unit
