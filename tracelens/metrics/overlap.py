"""How alike two sets of damaged features are, against what chance gives; and how alike the order of the damage is."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import hypergeom, rankdata

from tracelens.errors import MetricInputError
from tracelens.metrics.result import Result
from tracelens.stats import Estimate

_CHUNK = 2**22
"""Ranks held at once (32 MB)."""


@dataclass(frozen=True)
class SetOverlap(Result):
    """|A ∩ B| / |A ∪ B| of two sets of features, beside that of random sets."""

    n: int
    """Features that could be in either set."""
    n_a: int
    n_b: int
    n_both: int
    jaccard: float
    """In [0, 1]; NaN where both sets are empty."""
    chance: float
    """Mean Jaccard of random sets of the same sizes, drawn within the strata; NaN where both sets are empty."""
    p: float
    """P(random sets share as many features or more), one-sided."""


def set_overlap(a: np.ndarray, b: np.ndarray) -> SetOverlap:
    """Overlap of two sets given as masks [feature], against random sets of the same sizes.

    The size of a random intersection is hypergeometric, so `chance` and `p` are exact: what a permutation test would tend to.
    Raises `MetricInputError` for masks of different shapes.
    """
    n, n_a, n_b, n_both = _counts(a, b)
    if n_a + n_b == 0:
        return SetOverlap(n, 0, 0, 0, math.nan, math.nan, 1.0)
    shared = np.arange(max(0, n_a + n_b - n), min(n_a, n_b) + 1)
    probability = hypergeom.pmf(shared, n, n_a, n_b)
    chance = float((probability * shared / (n_a + n_b - shared)).sum())
    p = float(min(1, hypergeom.sf(n_both - 1, n, n_a, n_b)))
    return SetOverlap(n, n_a, n_b, n_both, _jaccard(n_a, n_b, n_both), chance, p)


def stratified_overlap(
    a: np.ndarray, b: np.ndarray, strata: np.ndarray, *, n_permutations: int = 2000, seed: int = 0
) -> SetOverlap:
    """As `set_overlap`, against random sets that take as many features from each stratum (an integer per feature) as A and B do.

    What two treatments share only because both hit, say, rare features is chance here. The intersection is a sum of
    hypergeometric draws, one per stratum; p = (1 + #{drawn ≥ observed}) / (1 + n_permutations).
    Raises `MetricInputError` for arrays of different shapes.
    """
    n, n_a, n_b, n_both = _counts(a, b)
    if strata.shape != a.shape:
        raise MetricInputError(f"strata have shape {strata.shape} and the sets {a.shape}; expected one per feature")
    if n_a + n_b == 0:
        return SetOverlap(n, 0, 0, 0, math.nan, math.nan, 1.0)
    _, stratum = np.unique(strata, return_inverse=True)
    sizes, of_a, of_b = (np.bincount(stratum, weights=x).astype(int) for x in (np.ones(n), a, b))
    rng = np.random.default_rng(seed)
    drawn = rng.hypergeometric(of_a, sizes - of_a, of_b, size=(n_permutations, len(sizes))).sum(1)
    chance = float((drawn / (n_a + n_b - drawn)).mean())
    p = (1 + int((drawn >= n_both).sum())) / (1 + n_permutations)
    return SetOverlap(n, n_a, n_b, n_both, _jaccard(n_a, n_b, n_both), chance, p)


def spearman(x: np.ndarray, y: np.ndarray, *, n_resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Estimate:
    """Spearman rank correlation of two scores per feature, ties sharing their mean rank, in [−1, 1].

    The interval is a percentile bootstrap over features, ranked anew in each resample. NaN where either score does not vary.
    Raises `MetricInputError` for NaN and for scores of different lengths.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise MetricInputError(f"scores have shapes {x.shape} and {y.shape}; expected one score per feature in both")
    if np.isnan(x).any() or np.isnan(y).any():
        raise MetricInputError("scores hold NaN; drop features that have no score in either")
    if not len(x):
        return Estimate(math.nan, math.nan, math.nan, 0, "bootstrap")
    rng = np.random.default_rng(seed)
    value = float(_rank_correlation(x[None], y[None])[0])
    replicates, rows = [], max(1, _CHUNK // len(x))
    for start in range(0, n_resamples, rows):
        draws = rng.integers(0, len(x), size=(min(rows, n_resamples - start), len(x)))
        replicates.append(_rank_correlation(x[draws], y[draws]))
    kept = np.concatenate(replicates)
    kept = kept[~np.isnan(kept)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(kept, tails) if len(kept) and value == value else (math.nan, math.nan)
    return Estimate(value, float(low), float(high), len(x), "bootstrap")


def _counts(a: np.ndarray, b: np.ndarray) -> tuple[int, int, int, int]:
    if a.shape != b.shape or a.ndim != 1:
        raise MetricInputError(f"sets have shapes {a.shape} and {b.shape}; expected masks over the same features")
    return len(a), int(a.sum()), int(b.sum()), int((a & b).sum())


def _jaccard(n_a: int, n_b: int, n_both: int) -> float:
    return n_both / (n_a + n_b - n_both)


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row; NaN where either row is constant."""
    ranks = [rankdata(rows, axis=1) for rows in (x, y)]
    u, v = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return np.clip((u * v).sum(1) / np.sqrt((u * u).sum(1) * (v * v).sum(1)), -1, 1)
