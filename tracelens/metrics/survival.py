"""Survival of features (arXiv 2606.03002): Pearson correlation across precisions, in three classes."""

from typing import Literal, get_args

import numpy as np
from scipy.stats import norm

from tracelens.errors import MetricInputError

SurvivalClass = Literal["survived", "blurred", "damaged"]
CLASSES: tuple[SurvivalClass, ...] = get_args(SurvivalClass)


def survival_class(rho: np.ndarray, survived_at: float = 0.9, damaged_at: float = 0.5) -> np.ndarray:
    """Class of each feature by its Pearson correlation ρ: "survived" from `survived_at` on, "damaged" below `damaged_at`,
    "blurred" between, and "" where ρ is NaN (the reference does not vary).

    Raises `MetricInputError` unless damaged_at ≤ survived_at.
    """
    if not damaged_at <= survived_at:
        raise MetricInputError(
            f"damaged_at is {damaged_at} and survived_at {survived_at}; expected damaged_at ≤ survived_at"
        )
    classes = np.select([rho >= survived_at, rho >= damaged_at, rho < damaged_at], CLASSES, default="")
    return classes.astype(object)


def survival_interval(rho: np.ndarray, n: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the confidence interval of correlations ρ over n tokens, elementwise, in [−1, 1]; NaN where ρ is.

    Fisher's z = atanh ρ is normal with variance 1 / (n − 3). It takes tokens for independent draws from a normal
    distribution, which sparse activations are not: read it as the least uncertainty there is, and bootstrap over prompts for
    more. With three tokens or fewer nothing is known: [−1, 1]; ρ = ±1 has no width.
    """
    free = np.maximum(np.asarray(n, dtype=np.float64) - 3, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        z, half = np.arctanh(rho), norm.ppf(0.5 + level / 2) / np.sqrt(free)
        ends = [np.where(free > 0, np.tanh(z + sign * half), sign) for sign in (-1.0, 1.0)]
    low, high = (np.where(np.isnan(rho), np.nan, end) for end in ends)
    return low, high
