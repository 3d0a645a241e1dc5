"""Scoring: normalise, align, count, report. Works without a model, without torch, on nothing but texts."""

from .conditions import ConditionScores, rescore_conditions, score_conditions, write_conditions
from .context import ContextReport, score_context
from .errors import ErrorCounts, ErrorRate, align, count_errors, tokenize
from .files import read_hypotheses, score_folder, write_score_folder
from .normalize import Normalizer, get_normalizer
from .report import write_report
from .result import ScoredUtterance, ScoreReport, compare, score

__all__ = [
    "ConditionScores",
    "ContextReport",
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
    "rescore_conditions",
    "score",
    "score_conditions",
    "score_context",
    "score_folder",
    "tokenize",
    "write_conditions",
    "write_report",
    "write_score_folder",
]
