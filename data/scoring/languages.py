"""Which unit and which normaliser suit a language, and a corpus of several.

Languages written without spaces are scored by character (CER), all others by word (WER), text that switches between
the two kinds (a tag such as zh-en) by both (MER). A corpus of several languages is normalised as one, and its overall
rate is MER where it is not of words alone.
"""

import re
from collections.abc import Iterable, Sequence

from .errors import has_cjk

BY_CHARACTER = frozenset({"zh", "cmn", "yue", "wuu", "nan", "hak", "ja", "th", "lo", "my", "km"})


def unit_of(lang: str, *, texts: Iterable[str] = ()) -> str:
    """Return "word", "char" or "mixed" for a language tag; without a tag the texts decide."""
    parts = re.split(r"[-_+]", lang.lower())
    if not parts[0]:
        return "mixed" if has_cjk(texts) else "word"
    if len(parts) > 1 and _is_second_language(parts[1], lang):
        return "mixed" if {parts[0], parts[1]} & BY_CHARACTER else "word"
    return "char" if parts[0] in BY_CHARACTER else "word"


def _is_second_language(part: str, lang: str) -> bool:
    """zh-en switches between two languages; in zh-TW, en-US and zh-Hans the second part is a region or script."""
    original = re.split(r"[-_+]", lang)[1]
    return len(part) == 2 and original.islower()


def suited(languages: Sequence[str], *, texts: Sequence[str]) -> tuple[str, str]:
    """Return (normaliser, unit of the overall rate) for the references of a corpus and their language tags.

    English and other languages with spaces come out of both normalisers alike, so that a rate in a corpus of several
    languages may stand beside that of one.
    """
    units = {unit_of(lang, texts=[text] if not lang else ()) for lang, text in {*zip(languages, texts)}}
    unit = units.pop() if len(units) == 1 else "mixed"
    return ("whisper-basic" if unit == "word" else "multilingual"), unit
