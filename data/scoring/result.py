"""`score`: records of reference and hypothesis in, a ScoreReport out. Needs neither a model nor torch.

Every report carries a stamp: normaliser with version, unit, and the words taken as equal. Only reports with equal
stamps may be compared. Shape letters: N utterances, C = 4 counts (substitutions, deletions, insertions, hits).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from .bootstrap import PairedDifference, bootstrap_interval, paired_bootstrap
from .diagnostics import Diagnostics, diagnose
from .errors import (
    DELETION,
    HIT,
    INSERTION,
    METRICS,
    SUBSTITUTION,
    AlignedPair,
    ErrorCounts,
    ErrorRate,
    align,
    corpus_counts,
    count_corpus,
    has_cjk,
    tokenize,
    tokenizer_of,
)
from .languages import suited, unit_of
from .normalize import Normalizer, get_normalizer


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance with raw texts. seconds: of audio; rtf: decoding seconds per second of audio, None if unknown.

    keywords are the names and phrases of the reference to look for; phrases those of the context it was
    decoded with, and context its text.
    """

    id: str
    reference: str
    hypothesis: str
    seconds: float = 0.0
    nbest: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    rtf: float | None = None
    lang: str = ""
    keywords: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    memory_gb: float | None = None  # most memory in use while it was decoded, with the model and its batch
    context: str = ""


class Stamp(NamedTuple):
    """What made the numbers; rates under different stamps must not be compared."""

    normalizer: str
    normalizer_version: str
    unit: str
    equivalences: str | None  # hash of the groups; concerns the merged rate only

    def comparable(self, other: "Stamp") -> bool:
        """Say whether plain rates under both stamps may stand side by side."""
        return self[:3] == other[:3]


class Confusions(NamedTuple):
    """Token errors by frequency: (reference, hypothesis) pairs, deleted reference tokens, inserted tokens."""

    substitutions: Counter
    deletions: Counter
    insertions: Counter


@dataclass(frozen=True)
class ScoreReport:
    """Everything that files and report.html are written from. `rates` has wer, cer and mer where they make sense."""

    stamp: Stamp
    utterances: tuple[ScoredUtterance, ...]
    references: tuple[str, ...]
    hypotheses: tuple[str, ...]
    counts_NC: np.ndarray
    rates: dict[str, ErrorRate]
    merged: ErrorRate | None  # the headline rate with the equivalent words merged
    diagnostics: Diagnostics
    languages: dict[str, ErrorRate] = field(default_factory=dict)  # of each language, where there are several
    keywords: tuple[tuple[str, ...], ...] = ()  # of each utterance, normalised as its texts; so are the phrases
    phrases: tuple[tuple[str, ...], ...] = ()
    contexts: tuple[str, ...] = ()  # the text of each utterance's, normalised as well
    equivalences: tuple[tuple[str, ...], ...] = ()
    seed: int = 0

    @property
    def headline(self) -> ErrorRate:
        return self.rates[METRICS[self.stamp.unit]]

    @property
    def seconds(self) -> float:
        return float(sum(utterance.seconds for utterance in self.utterances))

    @property
    def rtf(self) -> float | None:
        """Decoding time over audio time, summed over the utterances that have both."""
        timed = [(u.rtf, u.seconds) for u in self.utterances if u.rtf is not None and u.seconds > 0]
        return sum(rtf * seconds for rtf, seconds in timed) / sum(seconds for _, seconds in timed) if timed else None

    @property
    def memory_gb(self) -> float | None:
        """The most memory that any utterance took, None if none was measured."""
        return max((u.memory_gb for u in self.utterances if u.memory_gb is not None), default=None)

    def counts(self, index: int) -> ErrorCounts:
        return ErrorCounts(*self.counts_NC[index].tolist())

    def alignment(self, index: int) -> list[AlignedPair]:
        unit = self.stamp.unit
        return align(tokenize(self.references[index], unit), tokenize(self.hypotheses[index], unit))

    def worst(self, limit: int) -> list[int]:
        """Return indexes of the utterances with the most errors, shortest reference first among equals."""
        errors_N = self.counts_NC[:, :3].sum(axis=1)
        lengths_N = self.counts_NC[:, [0, 1, 3]].sum(axis=1)
        order = np.lexsort((lengths_N, -errors_N))[:limit]
        return [int(i) for i in order if errors_N[i]]

    @cached_property
    def confusions(self) -> Confusions:
        found = {SUBSTITUTION: Counter(), DELETION: Counter(), INSERTION: Counter(), HIT: Counter()}
        for index in np.flatnonzero(self.counts_NC[:, :3].any(axis=1)):
            for pair in self.alignment(int(index)):
                key = (pair.reference, pair.hypothesis) if pair.kind == SUBSTITUTION else pair.reference
                found[pair.kind][pair.hypothesis if pair.kind == INSERTION else key] += 1
        return Confusions(found[SUBSTITUTION], found[DELETION], found[INSERTION])


def score(
    records: Iterable[ScoredUtterance],
    *,
    normalizer: str | Normalizer | None = None,
    unit: str | None = None,
    equivalences: Sequence[Collection[str]] | None = None,
    seed: int = 0,
    replicates: int = 1000,
) -> ScoreReport:
    """Normalise, align and count.

    normalizer: None takes the one that suits the languages of the references (languages.py).
    unit: "word", "char" or "mixed", what the headline rate counts; None takes the normaliser's own, or with no
    normaliser given the one that suits the languages.
    equivalences: groups of words that sound alike, [["caitlin", "kaitlyn"], ["marc", "mark"]]; the headline rate is
    also given with each group merged into one word, beside and never instead of the plain rate.
    seed: of the bootstrap intervals; the same seed gives the same report.
    """
    utterances = tuple(records)
    _check_ids(utterances)
    if normalizer is None:
        normalizer, suiting = suited([u.lang for u in utterances], texts=[u.reference for u in utterances])
        unit = suiting if unit is None else unit
    normalize = get_normalizer(normalizer) if isinstance(normalizer, str) else normalizer
    unit = normalize.unit if unit is None else unit
    tokens = tokenizer_of(unit)
    if unit == "word" and not normalize.has_words:
        raise ValueError(f"unit 'word' with normalizer {normalize.name!r}, which drops spaces: set unit to 'char'")
    normalize = _remembering(normalize)
    references = tuple(normalize(u.reference) for u in utterances)
    hypotheses = tuple(normalize(u.hypothesis) for u in utterances)
    counts = _count_units(references, hypotheses, normalize, unit)
    groups, merged = _merge_groups(equivalences or (), normalize), None
    if groups:
        texts = [[_merge_words(text, groups) for text in side] for side in (references, hypotheses)]
        merged = _rate(count_corpus(*texts, unit=unit), METRICS[unit], seed=seed, replicates=replicates)
    return ScoreReport(
        stamp=Stamp(normalize.name, normalize.version, unit, _hash_groups(groups)),
        utterances=utterances,
        references=references,
        hypotheses=hypotheses,
        counts_NC=counts[unit],
        rates={METRICS[u]: _rate(counts[u], METRICS[u], seed=seed, replicates=replicates) for u in counts},
        merged=merged,
        diagnostics=diagnose(
            [u.id for u in utterances], [tokens(t) for t in references], [tokens(t) for t in hypotheses], counts[unit]
        ),
        languages=_by_language(utterances, references, hypotheses, normalize, seed=seed, replicates=replicates),
        keywords=tuple(tuple(map(normalize, u.keywords)) for u in utterances),
        phrases=tuple(tuple(map(normalize, u.phrases)) for u in utterances),
        contexts=tuple(normalize(u.context) if u.context else "" for u in utterances),
        equivalences=tuple(tuple(sorted(group)) for group in equivalences or ()),
        seed=seed,
    )


def compare(first: ScoreReport, second: ScoreReport, *, seed: int = 0, replicates: int = 1000) -> PairedDifference:
    """Say whether `second` is better than `first` on the same utterances: paired bootstrap of the headline rate."""
    order_N = same_utterances(first, second)
    return paired_bootstrap(
        first.counts_NC[:, :3].sum(axis=1),
        second.counts_NC[order_N, :3].sum(axis=1),
        first.counts_NC[:, [0, 1, 3]].sum(axis=1),
        seed=seed,
        replicates=replicates,
    )


def same_utterances(first: ScoreReport, second: ScoreReport) -> np.ndarray:
    """Return order_N, where in `second` each utterance of `first` is; ValueError where they cannot be compared."""
    if not first.stamp.comparable(second.stamp):
        raise ValueError(f"reports are not comparable: {first.stamp} against {second.stamp}; score both the same way")
    other = {utterance.id: index for index, utterance in enumerate(second.utterances)}
    if alone := other.keys() ^ {utterance.id for utterance in first.utterances}:
        raise ValueError(
            f"reports hold different utterances ({len(first.utterances)} and {len(other)}; {min(alone)!r} is in one of "
            "them only): score one set with both"
        )
    order_N = np.array([other[utterance.id] for utterance in first.utterances])
    for utterance, text, index in zip(first.utterances, first.references, order_N):
        if text != second.references[index]:
            raise ValueError(f"utterance {utterance.id!r} has two different references: score one set with both")
    return order_N


def _check_ids(utterances: tuple[ScoredUtterance, ...]) -> None:
    if not utterances:
        raise ValueError("nothing to score: records is empty")
    id_, count = Counter(utterance.id for utterance in utterances).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"utterance id {id_!r} occurs {count} times: ids must be unique, prefix them with the set name"
        )


def _remembering(normalize: Normalizer) -> Normalizer:
    """Normalise each distinct text once: references and names recur, and Whisper's rules take 0.1 ms a text."""
    return replace(normalize, function=lru_cache(maxsize=None)(normalize.function))


def _by_language(
    utterances: tuple[ScoredUtterance, ...],
    references: tuple[str, ...],
    hypotheses: tuple[str, ...],
    normalize: Normalizer,
    *,
    seed: int,
    replicates: int,
) -> dict[str, ErrorRate]:
    """Return the rate of each language by the unit that suits it, where there are several; "" is called unknown."""
    languages = sorted({utterance.lang for utterance in utterances})
    rates = {}
    for lang in languages if len(languages) > 1 else ():
        rows = [i for i, utterance in enumerate(utterances) if utterance.lang == lang]
        texts = [[side[i] for i in rows] for side in (references, hypotheses)]
        unit = unit_of(lang, texts=texts[0]) if normalize.has_words else "char"
        counts_NC = count_corpus(*texts, unit=unit)
        rates[lang or "unknown"] = _rate(counts_NC, METRICS[unit], seed=seed, replicates=replicates)
    return rates


def _count_units(
    references: tuple[str, ...], hypotheses: tuple[str, ...], normalize: Normalizer, headline_unit: str
) -> dict[str, np.ndarray]:
    """Return {unit: counts_NC} for every unit that means something after this normaliser."""
    units = METRICS if normalize.has_words else {"char": "cer", headline_unit: METRICS[headline_unit]}
    counts: dict[str, np.ndarray] = {}
    for unit in units:
        if unit == "mixed" and "word" in counts and not has_cjk(references + hypotheses):
            counts[unit] = counts["word"]
        else:
            counts[unit] = count_corpus(references, hypotheses, unit=unit)
    return counts


def _rate(counts_NC: np.ndarray, metric: str, *, seed: int, replicates: int) -> ErrorRate:
    errors_N, lengths_N = counts_NC[:, :3].sum(axis=1), counts_NC[:, [0, 1, 3]].sum(axis=1)
    interval = bootstrap_interval(errors_N, lengths_N, seed=seed, replicates=replicates)
    return ErrorRate(metric, corpus_counts(counts_NC), interval)


def _merge_groups(equivalences: Sequence[Collection[str]], normalize: Normalizer) -> dict[str, str]:
    """Return {variant: the group's word}, both normalised; the word is the first in the alphabet."""
    canonical: dict[str, str] = {}
    if equivalences and not normalize.has_words:
        raise ValueError(f"equivalences need words, and normalizer {normalize.name!r} drops spaces: use 'code-switch'")
    for group in equivalences:
        if isinstance(group, str):
            raise ValueError(f"equivalences must be groups of words, not the bare word {group!r}: write [[...], [...]]")
        words = {variant: normalize(variant) for variant in group}
        for variant, word in words.items():
            if len(word.split()) != 1:
                raise ValueError(f"equivalences: {variant!r} is not one word after {normalize.name} ({word!r})")
            if word in canonical:
                raise ValueError(f"equivalences: {variant!r} is in two groups: join them into one")
        canonical.update(dict.fromkeys(words.values(), min(words.values(), default="")))
    return canonical


def _hash_groups(groups: dict[str, str]) -> str | None:
    if not groups:
        return None
    listing = json.dumps(sorted(groups.items()), ensure_ascii=False)
    return hashlib.sha256(listing.encode()).hexdigest()[:8]


def _merge_words(text: str, groups: dict[str, str]) -> str:
    return " ".join([groups.get(word, word) for word in text.split()])
