"""A logistic model of which features survive: fitted by scikit-learn, kept as plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tracelens.metrics.result import Result

if TYPE_CHECKING:
    import pandas as pd

LOGARITHMIC = ("peak", "mean", "mean_active", "firing_rate", "decoder_norm", "weight_error")
"""Columns that count by their ratios: their logarithm is what the model sees."""
SMALLEST = {"weight_error": 1e-6}
"""Below this a column is taken to be this: an error of none has no logarithm."""
SMALLEST_SPREAD = 1e-4
"""Standard deviation (of the logarithm) below which a column is taken for constant: decoder norms of 1 differ by rounding."""


@dataclass(frozen=True)
class SurvivalModel(Result):
    """P(survived) = 1 / (1 + exp(−intercept − Σ coefficient · (x − mean) / scale)), x the logarithm where columns are `LOGARITHMIC`."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    """Log-odds per standard deviation."""
    intercept: float

    @classmethod
    def fit(cls, table: "pd.DataFrame", labels: np.ndarray, names: Sequence[str]) -> "SurvivalModel":
        """L2-regularised (C = 1) maximum likelihood over the rows of `table`; both labels must occur."""
        from sklearn.linear_model import LogisticRegression

        x = design(table, names)
        mean, scale = x.mean(0), x.std(0)
        logistic = LogisticRegression(max_iter=1000).fit((x - mean) / scale, labels.astype(bool))
        return cls(
            names=tuple(names),
            mean=tuple(mean.tolist()),
            scale=tuple(scale.tolist()),
            coefficients=tuple(logistic.coef_[0].tolist()),
            intercept=float(logistic.intercept_[0]),
        )

    def probability(self, table: "pd.DataFrame") -> np.ndarray:
        """P(survived) of each row, in [0, 1]."""
        x = (design(table, self.names) - np.array(self.mean)) / np.array(self.scale)
        return 1 / (1 + np.exp(-(self.intercept + x @ np.array(self.coefficients))))


def design(table: "pd.DataFrame", names: Sequence[str]) -> np.ndarray:
    """The columns as the model sees them [row, name]."""
    columns = [table[name].to_numpy(np.float64) for name in names]
    tiny = float(np.finfo(np.float64).tiny)
    seen = [
        np.log(np.maximum(x, SMALLEST.get(name, tiny))) if name in LOGARITHMIC else x
        for name, x in zip(names, columns, strict=True)
    ]
    return np.stack(seen, 1) if seen else np.zeros((len(table), 0))


def varying(table: "pd.DataFrame", names: Sequence[str]) -> list[str]:
    """The columns that tell rows apart."""
    return [name for name in names if design(table, [name]).std() > SMALLEST_SPREAD]
