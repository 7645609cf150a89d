"""The area under a ROC curve with its interval: how well a score tells two kinds of features apart."""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from tracelens.errors import MetricInputError
from tracelens.stats import Estimate

_EDGE = 1e-12


def auc(scores: np.ndarray, labels: np.ndarray, level: float = 0.95) -> Estimate:
    """P(score of a True feature > that of a False one), ties counting half, in [0, 1], with Newcombe's interval.

    Newcombe (Statistics in Medicine 2006, method 5): the values θ with |θ − AUC| ≤ z·SE(θ), where SE is Hanley and McNeil's for equal
    group sizes. Like Wilson's interval of a rate it stays in [0, 1] and has width at 0 and 1. NaN unless both labels occur.
    Raises `MetricInputError` for NaN scores and arrays of different shapes.
    """
    if scores.shape != labels.shape or scores.ndim != 1:
        raise MetricInputError(f"scores have shape {scores.shape} and labels {labels.shape}; expected one per feature")
    if np.isnan(scores).any():
        raise MetricInputError("scores hold NaN; drop features without a score")
    n_true = int(labels.sum())
    n_false = len(labels) - n_true
    if not n_true or not n_false:
        return Estimate(math.nan, math.nan, math.nan, len(labels), "newcombe")
    rank_sum = rankdata(scores)[labels.astype(bool)].sum()
    value = float((rank_sum - n_true * (n_true + 1) / 2) / (n_true * n_false))
    z = float(norm.ppf(0.5 + level / 2))

    def excess(theta: float) -> float:
        return (theta - value) ** 2 - z**2 * _variance(theta, n_true, n_false)

    # At the value itself the excess is at most 0, at the ends of [0, 1] at least 0; an AUC of 0 or 1 is a root of its own,
    # and the other root is meant.
    low = float(brentq(excess, 0, min(value, 1 - _EDGE))) if value > 0 else 0.0  # pyright: ignore[reportArgumentType]
    high = float(brentq(excess, max(value, _EDGE), 1)) if value < 1 else 1.0  # pyright: ignore[reportArgumentType]
    return Estimate(value, low, high, len(labels), "newcombe")


def _variance(theta: float, n_true: int, n_false: int) -> float:
    """Hanley and McNeil's variance of an AUC of theta, with both groups' terms at their mean size."""
    mean_size = (n_true + n_false) / 2 - 1
    spread = 1 + mean_size * (1 - theta) / (2 - theta) + mean_size * theta / (1 + theta)
    return theta * (1 - theta) * spread / (n_true * n_false)
