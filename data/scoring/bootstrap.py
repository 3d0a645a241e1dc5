"""Bootstrap intervals of a corpus error rate, and of the difference of two systems (Bisani and Ney, ICASSP 2004).

Utterances are drawn with replacement and the rate is recomputed as sum over sum. Utterances with equal error count and
length are interchangeable, so a replicate is one multinomial draw over the distinct rows: the same distribution, at a
cost that does not grow with the corpus. It takes utterances as independent; many from one speaker make it too narrow.

Shape letters: N utterances, C columns, K distinct rows, R replicates.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Draws are held in blocks of this many numbers: 8 bytes each, so 80 MB.
BLOCK = 10_000_000


class Interval(NamedTuple):
    """Percentile interval, as fractions."""

    low: float
    high: float
    confidence: float
    replicates: int


class PairedDifference(NamedTuple):
    """Rate of the second system minus that of the first, as fractions: negative where the second is better."""

    difference: float
    low: float
    high: float
    probability_of_improvement: float  # share of replicates in which the second system is strictly better
    confidence: float
    replicates: int


def bootstrap_interval(
    errors_N: np.ndarray, lengths_N: np.ndarray, *, seed: int, replicates: int = 1000, confidence: float = 0.95
) -> Interval | None:
    """Return the interval of errors.sum() / lengths.sum(); None with fewer than two utterances or no reference."""
    columns_NC = np.stack([errors_N, lengths_N], axis=1)
    return bootstrap_statistic(columns_NC, ratio_of_sums, seed=seed, replicates=replicates, confidence=confidence)


def ratio_of_sums(sums_RC: np.ndarray) -> np.ndarray:
    """Return the first column over the second, NaN over nothing."""
    over_R = np.where(sums_RC[:, 1] > 0, sums_RC[:, 1], 1)
    return np.where(sums_RC[:, 1] > 0, sums_RC[:, 0] / over_R, np.nan)


def bootstrap_statistic(
    columns_NC: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    replicates: int = 1000,
    confidence: float = 0.95,
) -> Interval | None:
    """Return the interval of a function of column sums, sums_RC -> values_R, such as an F1.

    Replicates that give NaN are left out. None with fewer than two utterances, or where the value itself is NaN.
    """
    _check(replicates, confidence)
    if len(columns_NC) < 2 or np.isnan(statistic(columns_NC.sum(axis=0, keepdims=True))).any():
        return None
    values_R = statistic(_resampled_sums(columns_NC, seed=seed, replicates=replicates))
    bounds = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(values_R[~np.isnan(values_R)], bounds)
    return Interval(float(low), float(high), confidence, replicates)


def paired_bootstrap(
    errors_N: np.ndarray,
    other_errors_N: np.ndarray,
    lengths_N: np.ndarray,
    *,
    seed: int,
    replicates: int = 1000,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compare two systems on the same utterances: each replicate draws the same ones for both."""
    _check(replicates, confidence)
    if len(errors_N) < 2 or not lengths_N.sum():
        raise ValueError(f"paired bootstrap needs two or more utterances with reference tokens, got {len(errors_N)}")
    columns_NC = np.stack([errors_N, other_errors_N, lengths_N], axis=1)
    sums_RC = _resampled_sums(columns_NC, seed=seed, replicates=replicates)
    sums_RC = sums_RC[sums_RC[:, 2] > 0]
    change_R = (sums_RC[:, 1] - sums_RC[:, 0]) / sums_RC[:, 2]
    low, high = np.quantile(change_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    first, second, length = columns_NC.sum(axis=0)
    return PairedDifference(
        float((second - first) / length), float(low), float(high), float((change_R < 0).mean()), confidence, replicates
    )


def paired_statistic(
    first_NC: np.ndarray,
    second_NC: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    replicates: int = 1000,
    confidence: float = 0.95,
) -> Interval | None:
    """Return the interval of statistic(second) - statistic(first) on the same utterances, as `bootstrap_statistic`.

    Unlike `paired_bootstrap` it takes rates whose denominators differ between the two systems, and an F1.
    """
    C = first_NC.shape[1]

    def difference(sums_RC: np.ndarray) -> np.ndarray:
        return statistic(sums_RC[:, C:]) - statistic(sums_RC[:, :C])

    both_NC = np.concatenate([first_NC, second_NC], axis=1)
    return bootstrap_statistic(both_NC, difference, seed=seed, replicates=replicates, confidence=confidence)


def _resampled_sums(columns_NC: np.ndarray, *, seed: int, replicates: int) -> np.ndarray:
    """Return sums_RC, the column sums of `replicates` resamples of N rows."""
    rows_KC, counts_K = np.unique(columns_NC, axis=0, return_counts=True)
    total = int(counts_K.sum())
    generator = np.random.default_rng(seed)
    per_block = max(1, BLOCK // len(rows_KC))
    blocks = []
    for start in range(0, replicates, per_block):
        draws_RK = generator.multinomial(total, counts_K / total, size=min(per_block, replicates - start))
        blocks.append(draws_RK @ rows_KC)
    return np.concatenate(blocks)


def _check(replicates: int, confidence: float) -> None:
    if replicates < 1:
        raise ValueError(f"replicates ({replicates}) must be positive; 1000 is usual")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence ({confidence}) must lie between 0 and 1; 0.95 is usual")
