"""Risks: what a hypothesis costs that minimum error rate training lowers.

The cost is the number of errors, those on keywords weighted (data/scoring/weighted.py says how). Per utterance it is
taken as it is ("errors", whose sum over a corpus is the numerator of its rate, so that a long utterance says more), or
over the reference's weights ("rate": WER, or WWER; a reference without a token counts as one token).
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...data.scoring import tokenize
from ...data.scoring.errors import METRICS
from ...data.scoring.phrases import Phrase, Tokens, phrase_of, shown
from ...data.scoring.weighted import Keywords, keyword_errors
from ..runtime.train_config import require_choice

SCALES = ("errors", "rate")
SOURCES = ("index", "context", "rare", "list")


@dataclass
class RiskConfig:
    """What an error is, and on which words it costs more."""

    unit: str = "word"  # word (WER), char (CER) or mixed (MER)
    scale: str = "errors"  # errors of an utterance, or rate: over its reference's weights
    keyword_weight: float = 1.0  # what an error on a keyword costs; 1 is plain WER
    # Sources of keywords: index (an utterance's meta["keywords"]), context (the phrases of its context), rare, list.
    keywords: list[str] = field(default_factory=lambda: ["index"])
    keyword_list: str = ""  # file of the source "list", a phrase a line
    rare_max_count: int = 0  # of the source "rare": words that the training transcripts have at most so often

    def __post_init__(self):
        require_choice("risk.unit", self.unit, tuple(METRICS))
        require_choice("risk.scale", self.scale, SCALES)
        if not 1 <= self.keyword_weight < math.inf:
            raise ValueError(f"risk.keyword_weight is {self.keyword_weight}; it must be at least 1 and finite")
        for source in self.keywords:
            require_choice("an entry of risk.keywords", source, SOURCES)
        if self.keyword_weight > 1 and not self.keywords:
            raise ValueError(
                f"risk.keyword_weight is {self.keyword_weight} and risk.keywords is empty, so nothing has that weight; "
                f"name a source ({', '.join(SOURCES)}), or set risk.keyword_weight=1"
            )
        if self.rare_max_count < 0:
            raise ValueError(f"risk.rare_max_count is {self.rare_max_count}; it must be 0 or more")
        settings = {
            "list": ("keyword_list", self.keyword_list, "name a file with a phrase a line"),
            "rare": ("rare_max_count", self.rare_max_count, "set how often a rare word may occur"),
        }
        for source, (name, value, remedy) in settings.items():
            if source in self.keywords and not value:
                raise ValueError(f"risk.keywords has {source!r} and risk.{name} is {value!r}; {remedy}, or drop it")
            if value and source not in self.keywords:
                raise ValueError(f"risk.{name} is {value!r} but risk.keywords lacks {source!r}; add it, or drop {name}")


class Judgement(NamedTuple):
    """Of one hypothesis."""

    risk: float  # what the loss sees: weighted and scaled
    errors: int  # each counted as 1


class Risks:
    """Judges raw texts; `normalize` is applied here. `rare` are normalised words, as `rare_words` returns them."""

    def __init__(self, cfg: RiskConfig, *, normalize: Callable[[str], str], rare: Collection[str] = ()):
        self.cfg, self.normalize = cfg, normalize
        fixed = [phrase_of(word) for word in rare] if "rare" in cfg.keywords else []
        if "list" in cfg.keywords:
            fixed += _read_phrases(Path(cfg.keyword_list), normalize)
        self.everywhere = Keywords(fixed)

    def of(self, reference: str, hypotheses: Sequence[str], *, keywords: Sequence[str] = ()) -> list[Judgement]:
        """Judge an utterance's hypotheses. `keywords` are what the sources index and context give for it."""
        own = [phrase_of(self.normalize(keyword)) for keyword in keywords]
        judged = keyword_errors(
            self.normalize(reference),
            [self.normalize(hypothesis) for hypothesis in hypotheses],
            keywords=Keywords(own, base=self.everywhere),
            unit=self.cfg.unit,
            weight=self.cfg.keyword_weight,
        )
        by_rate = self.cfg.scale == "rate"
        return [Judgement(found.rate if by_rate else found.cost, found.errors) for found in judged]

    def phrases_in(self, *texts: str, keywords: Sequence[str] = ()) -> list[str]:
        """Return the normalised keywords, and those of the sources rare and list that stand in one of the raw texts."""
        found = [phrase_of(self.normalize(keyword)) for keyword in keywords]
        for text in texts:
            tokens = Tokens(self.normalize(text))
            found += [tokens.words[start:end] for start, end in tokens.places(self.everywhere.whole)]
        return [shown(phrase) for phrase in dict.fromkeys(found)]

    def reference_tokens(self, reference: str) -> int:
        """Return the number of the reference's tokens, that errors are a rate of; 0 for one without a token."""
        return len(tokenize(self.normalize(reference), self.cfg.unit))


def rare_words(texts: Iterable[str], *, max_count: int, normalize: Callable[[str], str]) -> frozenset[str]:
    """Return the normalised words that `texts` have at most `max_count` times; characters of scripts without spaces."""
    counts = Counter(word for text in texts for word in Tokens(normalize(text)))
    return frozenset(word for word, count in counts.items() if count <= max_count)


def _read_phrases(path: Path, normalize: Callable[[str], str]) -> list[Phrase]:
    if not path.is_file():
        raise ValueError(f"risk.keyword_list {path} does not exist; name a text file with a phrase a line")
    phrases = [phrase_of(normalize(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(phrases):
        raise ValueError(f"risk.keyword_list {path} has no phrase in it; write one a line, or drop the source 'list'")
    return phrases
