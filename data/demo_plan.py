"""What the demo's speakers say: sentences and voices of every split, a function of the seed alone.

A split is of one language. An espeak-ng variant (the shape of the throat) belongs to train, dev or test in all accents
and in both languages, so the voices of dev and test are unheard ones.
"""

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from .demo_text import ENGLISH
from .demo_text_zh import MANDARIN, NAMES_ALIKE
from .grammar import Grammar, Sentence
from .synthesis import VARIANTS

PARTS = ("train", "dev", "test")
# None of these has a near twin among the others, as f2 has in f5 or adam in benjamin.
HELD_OUT_VARIANTS = {"dev": ("f1", "m5", "edward", "linda"), "test": ("f4", "m4", "m7", "Annie")}


class Language(NamedTuple):
    """How a language is spoken; the seconds are a least-squares fit, good to 2 % in the sum."""

    grammar: Grammar
    names_alike: tuple[tuple[str, ...], ...]  # groups, as they are published with the corpus
    accents: tuple[str, ...]
    left_out: tuple[str, ...]  # variants
    words_per_minute: tuple[float, float]  # espeak-ng's, within which every voice has its habit
    seconds_at_the_ends: float
    seconds_per_character: float  # at one word per minute


LANGUAGES = {
    "en": Language(
        ENGLISH,
        names_alike=ENGLISH.homophones,
        accents=("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029"),  # what a small model can learn in minutes
        left_out=(),
        words_per_minute=(130, 175),
        seconds_at_the_ends=0.72,
        seconds_per_character=8.77,
    ),
    "zh": Language(
        MANDARIN,
        names_alike=NAMES_ALIKE,
        accents=("cmn",),
        left_out=("Andrea",),  # sets lengths by stress, which are tones here: gabbles at 1.6 times the others' pace
        words_per_minute=(150, 200),
        seconds_at_the_ends=0.52,
        seconds_per_character=45.5,
    ),
}


class Split(NamedTuple):
    """A part of the corpus in one language."""

    part: str  # train, rl (training voices, heard by no stage before reinforcement learning), dev or test
    lang: str

    @property
    def name(self) -> str:
        return self.part if self.lang == "en" else f"{self.part}_{self.lang}"


class Utterance(NamedTuple):
    """What is to be said and how; `key` also seeds the acoustics."""

    key: str
    split: Split
    text: str
    keywords: tuple[str, ...]
    voice: str
    words_per_minute: int
    pitch: int


def plan(
    *, hours: float, mandarin_hours: float, heldout_utterances: int, seed: int, rl_hours: float = 0.0
) -> dict[Split, list[Utterance]]:
    """Return every utterance of every split, in the order train, rl, dev, test; English first.

    Held-out sentences are drawn first, so they do not depend on the hours, and those of rl last. Of Mandarin a third as
    many are held out, and its share is the same in train and rl, which is left out at 0 hours.
    """
    english = _plan_of("en", hours=hours, rl_hours=rl_hours, heldout_utterances=heldout_utterances, seed=seed)
    if not mandarin_hours:
        return english
    return english | _plan_of(
        "zh",
        hours=mandarin_hours,
        rl_hours=rl_hours * mandarin_hours / hours,
        heldout_utterances=-(-heldout_utterances // 3),
        seed=seed,
    )


def _plan_of(
    lang: str, *, hours: float, rl_hours: float, heldout_utterances: int, seed: int
) -> dict[Split, list[Utterance]]:
    train, dev, test = (Split(part, lang) for part in PARTS)
    own = "" if lang == "en" else f"{lang}-"
    sentences = LANGUAGES[lang].grammar.distinct_sentences(random.Random(f"sentences-{own}{seed}"))
    heldout = {
        split: list(itertools.islice(_utterances(split, sentences, seed=seed), heldout_utterances))
        for split in (test, dev)
    }
    trained = {train: _lasting(hours, _utterances(train, sentences, seed=seed))}
    if rl_hours:
        rl = Split("rl", lang)
        trained[rl] = _lasting(rl_hours, _utterances(rl, sentences, seed=seed))
    return {**trained, dev: heldout[dev], test: heldout[test]}


def _lasting(hours: float, utterances: Iterator[Utterance]) -> list[Utterance]:
    taken, seconds = [], 0.0
    while seconds < hours * 3600:
        taken.append(next(utterances))
        seconds += expected_seconds(taken[-1])
    return taken


def voices(split: Split) -> list[str]:
    """Return the split's voices, every accent with every variant of its part; no variant is in two parts."""
    held_out = {variant for variants in HELD_OUT_VARIANTS.values() for variant in variants}
    variants = HELD_OUT_VARIANTS.get(split.part) or [variant for variant in VARIANTS if variant not in held_out]
    language = LANGUAGES[split.lang]
    return [
        f"{accent}+{variant}" for accent in language.accents for variant in variants if variant not in language.left_out
    ]


def _utterances(split: Split, sentences: Iterator[Sentence], *, seed: int) -> Iterator[Utterance]:
    """Give each sentence a voice, each equally often. A voice has its own pace and pitch; an utterance varies them."""
    rng = random.Random(f"{split.name}-{seed}")
    slowest, fastest = LANGUAGES[split.lang].words_per_minute
    habits = {voice: (rng.uniform(slowest, fastest), rng.uniform(30, 70)) for voice in voices(split)}
    turns = itertools.chain.from_iterable(sorted(habits, key=lambda _: rng.random()) for _ in itertools.count())
    for number, (sentence, voice) in enumerate(zip(sentences, turns)):
        pace, pitch = habits[voice]
        yield Utterance(
            key=f"{split.name}-{number:06d}",
            split=split,
            text=sentence.text,
            keywords=sentence.keywords,
            voice=voice,
            words_per_minute=round(pace * rng.uniform(0.9, 1.15)),
            pitch=round(pitch + rng.uniform(-8, 8)),
        )


def expected_seconds(utterance: Utterance) -> float:
    """Estimate the duration from characters and pace."""
    language = LANGUAGES[utterance.split.lang]
    return (
        language.seconds_at_the_ends + language.seconds_per_character * len(utterance.text) / utterance.words_per_minute
    )
