"""Scoring: normalise, align, count, report. Works without a model, without torch, on nothing but texts."""

from .baseline import Baseline, Comparison
from .baseline_table import comparison_text, write_comparison
from .conditions import NONE, ConditionScores, read_conditions, rescore_conditions, score_conditions, write_conditions
from .context import ContextReport, score_context
from .errors import ErrorCounts, ErrorRate, align, count_errors, tokenize
from .files import read_hypotheses, score_folder, write_score_folder
from .normalize import Normalizer, get_normalizer
from .phrases import keywords_of
from .report import write_report
from .result import ScoredUtterance, ScoreReport, compare, score

__all__ = [
    "NONE",
    "Baseline",
    "Comparison",
    "ConditionScores",
    "ContextReport",
    "ErrorCounts",
    "ErrorRate",
    "Normalizer",
    "ScoreReport",
    "ScoredUtterance",
    "align",
    "compare",
    "comparison_text",
    "count_errors",
    "get_normalizer",
    "keywords_of",
    "read_conditions",
    "read_hypotheses",
    "rescore_conditions",
    "score",
    "score_conditions",
    "score_context",
    "score_folder",
    "tokenize",
    "write_comparison",
    "write_conditions",
    "write_report",
    "write_score_folder",
]
