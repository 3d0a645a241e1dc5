"""What contextualize reads of a corpus: the utterances of a shard, without their audio, and facts about all of them.

A first pass over the shards gathers names and counts words; the second, which writes, needs one shard and these facts.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..index import Corpus, parse_meta, read_index
from ..parallel import advance, over_shards
from ..payload import PayloadReader
from ..phonetics import HAN
from ..whole_file import write_json
from .config import ContextsConfig
from .templates import shuffled
from .text import clean_context, contains, words_of

MAX_NAMES = 100_000  # names that distractors are drawn from; more are thinned by chance


class ContextError(ValueError):
    """The corpus, the settings or the output folder do not allow what was asked; the message says the way out."""


class Said(NamedTuple):
    """What is known of an utterance; keywords as the shard gives them, those that are said."""

    row: int
    key: str
    text: str
    keywords: tuple[str, ...]
    speaker: str
    lang: str


class ShardTexts(NamedTuple):
    """Of one shard: the utterances with a text, and how many had none, or keywords that are not in it."""

    said: list[Said]
    without_text: int
    not_said: int


def read_shard(shard: Path, *, lang: str) -> ShardTexts:
    """Read the texts of a shard; `lang` is that of utterances without one."""
    reader, said = PayloadReader(), []
    without_text = not_said = 0
    for row, at in enumerate(read_index(shard)):
        meta = _meta(shard, at, reader)
        text = meta.get("text")
        text = clean_context(text) if isinstance(text, str) else ""
        if not words_of(text):
            without_text += 1
            continue
        given = meta.get("keywords")
        cleaned = [clean_context(word) for word in given if isinstance(word, str)] if isinstance(given, list) else []
        keywords = tuple(dict.fromkeys(word for word in cleaned if words_of(word) and contains(text, word)))
        not_said += len(cleaned) - len(keywords)
        key = bytes(at["key"]).decode("utf-8", errors="replace")
        speaker, language = meta.get("speaker"), meta.get("lang")
        said.append(
            Said(
                row,
                key,
                text,
                keywords,
                speaker if isinstance(speaker, str) else "",
                language if isinstance(language, str) and language else lang,
            )
        )
    reader.close()
    return ShardTexts(said, without_text, not_said)


def _meta(shard: Path, at: np.void, reader: PayloadReader) -> dict:
    if not at["meta_size"]:
        return {}
    payload = reader.read(shard, offset=int(at["meta_offset"]), size=int(at["meta_size"]))
    try:
        return parse_meta(payload, is_json=bool(at["meta_json"]))
    except ValueError:
        return {}


@dataclass
class CorpusFacts:
    """What is known of the corpus: names for distractors, groups of sound-alikes, common words, a hash of its texts.

    `names` are those of each language that has enough of them, with how often each is said, and under "" all;
    `common` is None where keywords are those of the shards.
    """

    names: dict[str, dict[str, int]]
    groups: list[list[str]]
    common: list[str] | None
    texts: str
    lang: str

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> CorpusFacts:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class _Gathered(NamedTuple):
    """Of one shard: a hash of its texts; how often each (language, keyword) and each (language, word) is said."""

    digest: str
    names: Counter[tuple[str, str]]
    words: Counter[tuple[str, str]]


def gather_facts(corpus: Corpus, cfg: ContextsConfig, *, jobs: int) -> CorpusFacts:
    """Read every text of a corpus once."""
    tasks = [(shard, cfg.lang) for shard in corpus.shards]
    gathered: dict[int, _Gathered] = dict(
        over_shards(_gather, tasks, jobs=jobs, label="read texts", total=corpus.num_utterances, unit="utt")
    )
    ordered = [gathered[number] for number in range(len(tasks))]
    names = sum((one.names for one in ordered), Counter())
    common = None
    if cfg.keywords == "rare" or (cfg.keywords == "auto" and not names):
        said = sum((one.words for one in ordered), Counter())
        counted = Counter({(language(cfg.lang), word): n for word, n in _words_in(cfg.word_counts).items()}) or said
        common = _common_words(counted, cfg.rare_share)
        known = set(common)
        both = said | counted  # a rare word of either is a distractor
        names = Counter({at: n for at, n in both.items() if at[1] not in known and not _has_digit(at[1])})
    if cfg.distractors:
        names = Counter({("", name): 1 for name in read_names(cfg.distractors)})
    texts = hashlib.sha256("".join(one.digest for one in ordered).encode()).hexdigest()
    return CorpusFacts(_by_language(names, cfg), read_groups(cfg.sound_alikes), common, texts, cfg.lang)


def language(tag: str) -> str:
    """Return the language of a tag such as zh-CN, without region or script."""
    return tag.lower().replace("_", "-").partition("-")[0]


def _by_language(names: Counter[tuple[str, str]], cfg: ContextsConfig) -> dict[str, dict[str, int]]:
    """Names of one language among those of another would tell by themselves what is spoken."""
    grouped: dict[str, Counter[str]] = defaultdict(Counter)
    for (lang, name), count in names.items():
        grouped[lang][name] += count
        if lang:
            grouped[""][name] += count
    kept = {lang: _thinned(grouped[lang], seed=cfg.seed) for lang in sorted(grouped)}
    most = cfg.list_size[1]
    if len(everyone := kept.get("", {})) <= most:
        source = cfg.distractors or "the corpus has them as keywords"
        raise ContextError(
            f"list_size ({most}) needs more names than the {len(everyone)} there are ({source}); name a file with a "
            "name a line in `distractors`, or make the lists shorter"
        )
    return {lang: some for lang, some in kept.items() if not lang or most < len(some) < len(everyone)}


def _gather(task: tuple[Path, str]) -> _Gathered:
    shard, lang = task
    said = read_shard(shard, lang=lang).said
    digest = hashlib.sha256(json.dumps(said, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()
    names = Counter((language(one.lang), keyword) for one in said for keyword in one.keywords)
    words = Counter((language(one.lang), word) for one in said for word in spaced_words(one.text))
    advance(len(read_index(shard)))
    return _Gathered(digest, names, words)


def spaced_words(text: str) -> list[str]:
    """Return the words of a text that spaces divide; Chinese has none, so its keywords must be given."""
    if text.isascii():
        return [*words_of(text)]
    return [word for word in words_of(text) if not re.match(HAN, word)]


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def _words_in(file: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    if file:
        with _open_text(file, option="word_counts") as lines:
            for line in lines:
                counts.update(spaced_words(line))
    return counts


def _common_words(counts: Counter[tuple[str, str]], rare_share: float) -> list[str]:
    """Return the most frequent words that make up all but `rare_share` of the running text."""
    left = (1 - rare_share) * counts.total()
    common = []
    for (_, word), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        left -= count
        if left < 0:
            break
        common.append(word)
    return common


def rare_words(text: str, *, common: frozenset[str]) -> tuple[str, ...]:
    """Return the words of a text that are not common, as they are spelled in it."""
    found = {}
    for token in text.split():
        words = spaced_words(token)
        if len(words) == 1 and words[0] not in common and not _has_digit(words[0]):
            found.setdefault(words[0], token.strip(".,;:!?\"'()[]«»“”„…"))
    return tuple(found.values())


def read_names(file: str) -> list[str]:
    """Read a file with a name or phrase a line."""
    with _open_text(file, option="distractors") as lines:
        cleaned = [clean_context(line) for line in lines]
    return list(dict.fromkeys(name for name in cleaned if words_of(name)))


def read_groups(file: str) -> list[list[str]]:
    """Read a JSON file with lists of words that sound alike."""
    if not file:
        return []
    with _open_text(file, option="sound_alikes") as handle:
        try:
            groups = json.load(handle)
        except ValueError as error:
            raise ContextError(f"sound_alikes: {file} is not JSON ({error})") from None
    right = isinstance(groups, list) and all(
        isinstance(group, list) and all(isinstance(word, str) for word in group) for group in groups
    )
    if not right:
        raise ContextError(f'sound_alikes: {file} must hold lists of words, [["caitlin", "kaitlyn"], ...]')
    return groups


def _open_text(file: str, *, option: str):
    try:
        return open(file, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ContextError(f"{option}: {file} cannot be read ({error.strerror}); name a text file") from None


def _thinned(names: Counter[str], *, seed: int) -> dict[str, int]:
    """Return names in order of the alphabet, no more than MAX_NAMES."""
    kept = sorted(names)
    if len(kept) > MAX_NAMES:
        kept = sorted(shuffled(random.Random(f"names-{seed}"), kept)[:MAX_NAMES])
    return {name: names[name] for name in kept}
