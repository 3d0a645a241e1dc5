"""Text normalisers with a name and a version, so that two error rates are compared only if the same chain made both.

A normaliser is applied once, to reference and hypothesis alike, and the raw text is kept beside the result: a change of
rules alone has moved a published average from 5.42 to 5.32 %, and one set from 9.34 to 8.64 %
(https://github.com/huggingface/open_asr_leaderboard/pull/142).

whisper-english   Whisper's English rules as transformers ships them: lower case, contractions, numbers to digits. The
                  British-to-American spelling map is a file of the Whisper checkpoint (`normalizer.json`), not of
                  transformers: give it as `spelling`, else the version says "no-spelling-map".
whisper-basic     Whisper's rules for every other language: lower case, punctuation to spaces. Combining marks become
                  spaces too, which breaks the words of Thai and Hindi.
multilingual      for corpora of several languages: the same rules, but marks stay, and between characters of scripts
                  written without spaces there are none. English comes out as of whisper-basic. Scored by CJK character
                  and word.
mandarin          AISHELL practice: full width to half width (NFKC), Latin upper case, punctuation, symbols and all
                  spaces dropped; digits stay as written. Scored by character.
code-switch       the same, but Latin words stay apart and keep their apostrophes. Scored by CJK character and
                  Latin word.
none              the text as it is.
"""

import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Han (with extensions, compatibility forms, 々 and 〇) and kana: scripts written without spaces. Hangul has spaces.
CJK = "\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# All scripts written without spaces: those and Thai, Lao, Burmese, Khmer.
UNSPACED = CJK + "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# Raise with any change of the rules below: tests/data/scoring/test_normalize.py pins what each version returns.
MANDARIN_VERSION = "1"
CODE_SWITCH_VERSION = "1"
MULTILINGUAL_VERSION = "1"

SpellingMap = Mapping[str, str] | str | Path


@dataclass(frozen=True)
class Normalizer:
    """A named, versioned text -> text function; `unit` is what its text is usually scored by."""

    name: str
    version: str
    unit: str
    function: Callable[[str], str]
    has_words: bool = True  # False where the spaces between words are gone, so that counting words means nothing

    def __call__(self, text: str) -> str:
        return self.function(text)


def get_normalizer(name: str, *, spelling: SpellingMap | None = None) -> Normalizer:
    """Return the normaliser called `name`.

    spelling: for whisper-english only: {British: American}, a JSON file of that form, or a Whisper checkpoint folder.
    """
    if name not in NORMALIZERS:
        near = difflib.get_close_matches(name, NORMALIZERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"normalizer {name!r} is unknown: {hint}choose one of {', '.join(NORMALIZERS)}")
    if name == "whisper-english":
        return _whisper_english(spelling)
    if spelling is not None:
        raise ValueError(f"normalizer {name!r} has no spelling map: leave `spelling` out or choose 'whisper-english'")
    return NORMALIZERS[name]()


def _whisper_english(spelling: SpellingMap | None = None) -> Normalizer:
    # Imported late: transformers takes a second to import, and the other normalisers do without it.
    from transformers.models.whisper import english_normalizer as whisper

    mapping, spelling_version = _load_spelling(spelling)
    version = f"transformers-{_source_hash(whisper)}+{spelling_version}"
    normalize = whisper.EnglishTextNormalizer(mapping)
    return Normalizer("whisper-english", version, "word", lambda text: normalize(text).strip())


def _whisper_basic() -> Normalizer:
    from transformers.models.whisper import english_normalizer as whisper

    normalize = whisper.BasicTextNormalizer()
    version = f"transformers-{_source_hash(whisper)}"
    return Normalizer("whisper-basic", version, "word", lambda text: normalize(text).strip())


def _source_hash(module) -> str:
    # The hash of the rules and not the release: most releases of transformers leave this file alone.
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:8]


def _load_spelling(spelling: SpellingMap | None) -> tuple[dict[str, str], str]:
    if spelling is None:
        return {}, "no-spelling-map"
    if not isinstance(spelling, Mapping):
        path = Path(spelling)
        path = path / "normalizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"spelling map {path} does not exist: give a JSON file or a Whisper checkpoint folder")
        spelling = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(spelling, dict):
            raise ValueError(f"spelling map {path} must be a JSON object of word: word, not {type(spelling).__name__}")
    digest = hashlib.sha256(json.dumps(sorted(spelling.items()), ensure_ascii=False).encode()).hexdigest()[:8]
    return dict(spelling), f"spelling-{digest}"


class _DropTable(dict):
    """A str.translate table, filled as characters are met: punctuation, symbols, spaces and controls become `to`."""

    def __init__(self, to: str, keep: str = ""):
        super().__init__({ord(character): character for character in keep})
        self.to = to

    def __missing__(self, codepoint: int) -> str:
        character = chr(codepoint)
        self[codepoint] = self.to if unicodedata.category(character)[0] in "PSZC" else character
        return self[codepoint]


_DROP = _DropTable("")
_SPACE_OUT = _DropTable(" ", keep="'")
_SPACE_OUT_ALL = _DropTable(" ", keep="\u200c\u200d")  # joiners belong to the words of Persian and of Indic scripts
_LONE_APOSTROPHE = re.compile(r"(?<![^\W_])'|'(?![^\W_])")
_SPACE_AT_CJK = re.compile(rf"(?<=[{CJK}]) | (?=[{CJK}])")
SPACE_AT_UNSPACED = re.compile(rf"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])")


def normalize_mandarin(text: str) -> str:
    """Return `text` with half-width, upper-case, and letters and digits only: the form in which AISHELL is scored."""
    return unicodedata.normalize("NFKC", text).upper().translate(_DROP)


def normalize_code_switch(text: str) -> str:
    """As normalize_mandarin, but with one space between Latin words, and apostrophes inside them kept."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").upper().translate(_SPACE_OUT)
    text = " ".join(_LONE_APOSTROPHE.sub(" ", text).split())
    return _SPACE_AT_CJK.sub("", text)


_BRACKETED = re.compile(r"[<\[][^>\]]*[>\]]|\(([^)]+?)\)")


def normalize_multilingual(text: str) -> str:
    """As Whisper's basic rules, but with combining marks, and without spaces at characters that are written without."""
    text = unicodedata.normalize("NFKC", _BRACKETED.sub("", text.lower()))
    return SPACE_AT_UNSPACED.sub("", " ".join(text.translate(_SPACE_OUT_ALL).split()))


NORMALIZERS: dict[str, Callable[..., Normalizer]] = {
    "whisper-english": _whisper_english,
    "whisper-basic": _whisper_basic,
    "multilingual": lambda: Normalizer("multilingual", MULTILINGUAL_VERSION, "mixed", normalize_multilingual),
    "mandarin": lambda: Normalizer("mandarin", MANDARIN_VERSION, "char", normalize_mandarin, has_words=False),
    "code-switch": lambda: Normalizer("code-switch", CODE_SWITCH_VERSION, "mixed", normalize_code_switch),
    "none": lambda: Normalizer("none", "1", "word", str),
}
