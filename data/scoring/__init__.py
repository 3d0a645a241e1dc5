"""Scoring: normalise, align, count, report. Works without a model, without torch, on nothing but texts."""

from .errors import ErrorCounts, ErrorRate, align, count_errors, tokenize
from .files import read_hypotheses, score_folder, write_score_folder
from .normalize import Normalizer, get_normalizer
from .report import write_report
from .result import ScoredUtterance, ScoreReport, compare, score

__all__ = [
    "ErrorCounts",
    "ErrorRate",
    "Normalizer",
    "ScoreReport",
    "ScoredUtterance",
    "align",
    "compare",
    "count_errors",
    "get_normalizer",
    "read_hypotheses",
    "score",
    "score_folder",
    "tokenize",
    "write_report",
    "write_score_folder",
]
