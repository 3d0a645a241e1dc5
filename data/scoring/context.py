"""What a context does to a recogniser: are its words found where they were said, and parroted where they were not?

Every number is a ratio of sums over utterances (or F1 of two of them) with a bootstrap interval over utterances, of
texts under one normaliser:

recall         keyword occurrences of the references that the hypotheses have
strict_recall  recall of those occurrences alone that the context-free hypotheses miss: 0 without context by definition
precision      of the keywords and context phrases emitted, the share that the reference has; `f1` is of it and recall
echo_rate      share of utterances (with a context) in whose hypothesis a piece of the context stands, of its phrases or
               its prose, that is not in the reference and sounds like nothing that was said at that place
conflict_rate  the same share, of pieces that do sound like what was said there
b_wer, u_wer   errors on the words of keywords, and on all others, each per its own reference words. An inserted word
               counts to B if it is of a keyword or a context phrase. B and U errors are all errors of the headline.

`chance` holds the same of the context-free hypotheses against the same contexts: who has heard no context echoes by
chance alone. Counting is by multiplicity: a name said once and emitted twice is one hit and one echo.
Shape letters: N utterances, C counts.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ..phonetics import sound_groups, sounds_like
from .bootstrap import Interval, bootstrap_statistic, ratio_of_sums
from .errors import HIT, INSERTION, METRICS, AlignedPair, align, tokenize
from .phrases import Inventory, Phrase, Tokens, content_of, phrase_of, pieces_of, shown
from .result import ScoreReport, same_utterances

REACH = 2  # columns of the alignment to each side of an emitted piece that are "at that place"


class ContextCounts(NamedTuple):
    """The sums that the ratios are made of, for an utterance or for many."""

    said: int = 0  # keyword occurrences in the reference
    recalled: int = 0  # of them, in the hypothesis
    missed: int = 0  # of them, not in the context-free hypothesis
    regained: int = 0  # of those missed, in the hypothesis
    emitted: int = 0  # keywords and context phrases in the hypothesis
    right: int = 0  # of them, in the reference
    with_context: int = 0
    echoing: int = 0
    conflicting: int = 0
    b_errors: int = 0
    b_tokens: int = 0
    u_errors: int = 0
    u_tokens: int = 0


RATIOS = {
    "recall": ("recalled", "said"),
    "strict_recall": ("regained", "missed"),
    "precision": ("right", "emitted"),
    "echo_rate": ("echoing", "with_context"),
    "conflict_rate": ("conflicting", "with_context"),
    "b": ("b_errors", "b_tokens"),  # named b_wer, b_cer or b_mer in a report
    "u": ("u_errors", "u_tokens"),
}
F1 = ("recalled", "said", "right", "emitted")


class Ratio(NamedTuple):
    """`fraction` is None where there is nothing to divide by; F1 has no counts of its own."""

    fraction: float | None
    interval: Interval | None = None
    count: int | None = None
    of: int | None = None


class Judged(NamedTuple):
    """What was found in one utterance; the pieces are shown as text."""

    counts: ContextCounts
    echoes: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ContextReport:
    """Ratios by name, what they are made of, and what was parroted: {utterance id: pieces}."""

    rates: dict[str, Ratio]
    chance: dict[str, Ratio]
    counts_NC: np.ndarray  # ContextCounts of each utterance, in the report's order
    utterances: int
    with_context: int
    echoes: dict[str, tuple[str, ...]]
    conflicts: dict[str, tuple[str, ...]]


def score_context(report: ScoreReport, *, plain: ScoreReport, seed: int = 0, replicates: int = 1000) -> ContextReport:
    """Judge hypotheses with context against those of the same utterances without (`plain`)."""
    order = same_utterances(report, plain)
    everyone = Inventory(phrase_of(word) for words in report.keywords for word in words)
    groups = sound_groups(report.equivalences)
    judged, by_chance = [], []
    for i, utterance in enumerate(report.utterances):
        against = partial(
            judge,
            reference=report.references[i],
            plain=plain.hypotheses[order[i]],
            keywords=[phrase_of(word) for word in report.keywords[i]],
            phrases=[phrase_of(phrase) for phrase in report.phrases[i]],
            context=report.contexts[i],
            everyone=everyone,
            unit=report.stamp.unit,
            lang=utterance.lang or "en",
            groups=groups,
        )
        judged.append(against(report.hypotheses[i]))
        by_chance.append(against(plain.hypotheses[order[i]]))
    metric, ids = METRICS[report.stamp.unit], [utterance.id for utterance in report.utterances]
    counts_NC, by_chance_NC = (np.array([one.counts for one in side], dtype=np.int64) for side in (judged, by_chance))
    return ContextReport(
        rates=_ratios(counts_NC, metric=metric, seed=seed, replicates=replicates),
        chance=_ratios(by_chance_NC, metric=metric, seed=seed, replicates=replicates),
        counts_NC=counts_NC,
        utterances=len(judged),
        with_context=sum(one.counts.with_context for one in judged),
        echoes={id_: one.echoes for id_, one in zip(ids, judged) if one.echoes},
        conflicts={id_: one.conflicts for id_, one in zip(ids, judged) if one.conflicts},
    )


def judge(
    hypothesis: str,
    *,
    reference: str,
    plain: str,
    keywords: Sequence[Phrase],
    phrases: Sequence[Phrase] = (),
    context: str = "",
    everyone: Inventory | None = None,
    unit: str = "word",
    lang: str = "en",
    groups: Mapping[str, str] | None = None,
) -> Judged:
    """Judge one hypothesis; texts are normalised. `everyone` are phrases whose emission counts in every utterance."""
    reference, hypothesis, plain = (" ".join(text.split()) for text in (reference, hypothesis, plain))
    said, heard, heard_plainly = Tokens(reference), Tokens(hypothesis), Tokens(plain)
    wanted = Inventory(keywords)
    targets, found, found_plainly = (_scanned(tokens, wanted) for tokens in (said, heard, heard_plainly))
    hits, plain_hits = targets & found, targets & found_plainly
    copyable = Inventory([*keywords, *phrases], base=everyone)
    emitted = _scanned(heard, copyable)
    pieces = content_of(context, phrases=phrases).union(*map(pieces_of, phrases))
    echoes, conflicts = _copied(said, heard, pieces, lang=lang, groups=groups or {})
    split = _split_errors(reference, hypothesis, said, heard, wanted=wanted, phrases=phrases, unit=unit)
    counts = ContextCounts(
        said=targets.total(),
        recalled=hits.total(),
        missed=(targets - plain_hits).total(),
        regained=(hits - plain_hits).total(),
        emitted=emitted.total(),
        right=(emitted & _scanned(said, copyable)).total(),
        with_context=bool(phrases or context.strip()),
        echoing=bool(echoes),
        conflicting=bool(conflicts),
        **split,
    )
    return Judged(counts, echoes, conflicts)


def _scanned(tokens: Tokens, inventory: Inventory) -> Counter[Phrase]:
    return Counter(tokens.words[start:end] for start, end in tokens.scan(inventory))


def _copied(
    said: Tokens, heard: Tokens, pieces: Collection[Phrase], *, lang: str, groups: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the pieces that are emitted more often than said: those heard in error, then sound-alikes."""
    present = set(heard.words)
    emitted = sorted(piece for piece in pieces if piece[0] in present)
    surplus = {p: len(heard.occurrences(p)) - len(said.occurrences(p)) for p in emitted}
    surplus = {piece: count for piece, count in surplus.items() if count > 0}
    if not surplus:
        return (), ()
    columns = align(said.words, heard.words)
    column_of = [column for column, pair in enumerate(columns) if pair.hypothesis is not None]
    echoes, conflicts = [], []
    for piece, count in surplus.items():
        places = [(column_of[start], column_of[end - 1] + 1) for start, end in heard.occurrences(piece)]
        wrong = [place for place in places if any(pair.kind != HIT for pair in columns[slice(*place)])]
        alike = sum(_sounds_like_what_is_there(columns, place, lang=lang, groups=groups) for place in wrong)
        count = min(count, len(wrong))
        text = shown(piece)
        conflicts += [text] * min(count, alike)
        echoes += [text] * max(0, count - alike)
    return tuple(echoes), tuple(conflicts)


def _sounds_like_what_is_there(
    columns: Sequence[AlignedPair], place: tuple[int, int], *, lang: str, groups: Mapping[str, str]
) -> bool:
    """Whether the piece in these columns sounds like reference words in them or in the errors around, spaces aside.

    The piece may be a part of what sounds alike: "kate" of "kate lynn" where "caitlin" was said.
    """
    start, end = place
    first, last = start, end
    while first > 0 and start - first < REACH and columns[first - 1].kind != HIT:
        first -= 1
    while last < len(columns) and last - end < REACH and columns[last].kind != HIT:
        last += 1
    heard_as = [
        (words, (left, right) == place)
        for left in range(first, start + 1)
        for right in range(end, last + 1)
        if (words := [pair.hypothesis for pair in columns[left:right] if pair.hypothesis is not None])
    ]
    said_as = [
        words
        for left in range(first, last)
        for right in range(left + 1, last + 1)
        if (words := [pair.reference for pair in columns[left:right] if pair.reference is not None])
    ]
    return any(
        sounds_like("".join(heard), "".join(said), lang=lang, groups=groups)
        for heard, is_piece in heard_as
        for said in said_as
        if is_piece or len(said) == 1
    )


def _split_errors(
    reference: str,
    hypothesis: str,
    said: Tokens,
    heard: Tokens,
    *,
    wanted: Inventory,
    phrases: Sequence[Phrase],
    unit: str,
) -> dict[str, int]:
    """Return the errors and reference tokens of `unit` on keywords (b) and elsewhere (u)."""
    present = set(heard.words)
    pieces = {p for phrase in (*wanted.phrases, *phrases) for p in pieces_of(phrase) if p[0] in present}
    biased_reference = iter(said.in_unit(reference, unit, said.scan(wanted)))
    biased_hypothesis = iter(heard.in_unit(hypothesis, unit, [at for p in pieces for at in heard.occurrences(p)]))
    counts = Counter({"b_errors": 0, "b_tokens": 0, "u_errors": 0, "u_tokens": 0})
    for pair in align(tokenize(reference, unit), tokenize(hypothesis, unit)):
        inserted = next(biased_hypothesis) if pair.hypothesis is not None else False
        biased = inserted if pair.kind == INSERTION else next(biased_reference)
        side = "b" if biased else "u"
        counts[f"{side}_errors"] += pair.kind != HIT
        counts[f"{side}_tokens"] += pair.reference is not None
    return dict(counts)


def made_of(counts_NC: np.ndarray, rate: str) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Return the columns that a rate (of RATIOS, or f1) is made of, and the function of their sums that it is."""
    names, statistic = (F1, _f1) if rate == "f1" else (RATIOS[rate], ratio_of_sums)
    return counts_NC[:, [ContextCounts._fields.index(name) for name in names]], statistic


def _ratios(counts_NC: np.ndarray, *, metric: str, seed: int, replicates: int) -> dict[str, Ratio]:
    totals = ContextCounts(*counts_NC.sum(axis=0).tolist())
    ratios = {}
    for name, (count, of) in RATIOS.items():
        ratio = _ratio(*made_of(counts_NC, name), seed=seed, replicates=replicates)
        ratios[f"{name}_{metric}" if len(name) == 1 else name] = ratio._replace(
            count=getattr(totals, count), of=getattr(totals, of)
        )
    return ratios | {"f1": _ratio(*made_of(counts_NC, "f1"), seed=seed, replicates=replicates)}


def _ratio(counts_NC: np.ndarray, statistic, *, seed: int, replicates: int) -> Ratio:
    (fraction,) = statistic(counts_NC.sum(axis=0, keepdims=True))
    if np.isnan(fraction):
        return Ratio(None)
    return Ratio(float(fraction), bootstrap_statistic(counts_NC, statistic, seed=seed, replicates=replicates))


def _f1(sums_RC: np.ndarray) -> np.ndarray:
    """Of (recalled, said, right, emitted); 0 where nothing of what was said is emitted."""
    recall_R, precision_R = ratio_of_sums(sums_RC[:, :2]), np.nan_to_num(ratio_of_sums(sums_RC[:, 2:]))
    both_R = recall_R + precision_R
    return 2 * recall_R * precision_R / np.where(both_R == 0, 1, both_R)
