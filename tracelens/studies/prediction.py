"""Is survival written in the reference? Cross-validated prediction of which features a precision damages (arXiv 2606.03002)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tracelens.audit_report import AuditReport
from tracelens.errors import MetricInputError
from tracelens.output import encode
from tracelens.stats import Estimate
from tracelens.studies.auc import auc
from tracelens.studies.reference_statistics import PREDICTORS, reference_statistics
from tracelens.studies.survival_model import SurvivalModel, varying

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Target = Literal["survived", "not damaged"]
_THRESHOLD: dict[str, str] = {"survived": "survived_at", "not damaged": "damaged_at"}


@dataclass(frozen=True, eq=False)
class SurvivalPrediction:
    """How well the reference alone tells which of its features one precision preserves.

    Attributes:
        label: of the precision.
        target: what is predicted: that ρ reaches `threshold`.
        threshold: of the correlation ρ.
        n, n_true: features, and those that reached it.
        auc: of probabilities that were given to each feature by a model fitted without it.
        single: predictor → AUC of the predictor itself, no model: above .5, features with more of it survive; below, fewer do.
        permuted: the same as `auc` where survival was shuffled over the features: mean and range that covers 95 % of the shuffles.
        p: share of the shuffles (observed one included) that did as well.
        brier: mean squared error of the probabilities.
        brier_constant: that of the share of survivors given to every feature: what a useful probability stays below.
        table: a row per feature: `reference_statistics`, rho, target (bool), probability.
        reason: why there is no AUC; empty where there is one.
    """

    label: str
    target: Target
    threshold: float
    n: int
    n_true: int
    auc: Estimate
    single: dict[str, Estimate]
    permuted: Estimate
    p: float
    brier: float
    brier_constant: float
    table: "pd.DataFrame"
    reason: str = ""

    @property
    def strongest(self) -> str | None:
        """The predictor that tells most alone, in either direction; None without an AUC."""
        known = {name: abs(e.value - 0.5) for name, e in self.single.items() if not math.isnan(e.value)}
        return max(known, key=known.__getitem__) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the table, as JSON can hold it."""
        names = [name for name in self.__dataclass_fields__ if name != "table"]
        return {name: encode(getattr(self, name)) for name in names}

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per predictor, the model of all first: AUC with its interval."""
        import pandas as pd

        rows = {"all, cross-validated": self.auc, "shuffled": self.permuted, **self.single}
        return pd.DataFrame(
            [{"predictor": name, "auc": e.value, "low": e.low, "high": e.high} for name, e in rows.items()]
        )

    def plot(self) -> "go.Figure":
        """AUC of the model, of its control and of each predictor alone."""
        from tracelens.views.survival_figures import prediction_figure

        return prediction_figure(self)


def predict_survival(
    report: AuditReport,
    saes: Any,
    *,
    target: Target = "survived",
    threshold: float | None = None,
    n_folds: int = 5,
    n_permutations: int = 20,
    seed: int = 0,
) -> SurvivalPrediction:
    """Predicts from the reference alone which live features survived in `report`, out of fold.

    A logistic regression on the logarithms of `PREDICTORS` (cosine and layer as they are), in `n_folds` folds with the same share of
    survivors. Where fewer features than folds survived, or failed to, there is no AUC, and `reason` says so.

    Args:
        report: what the precision did.
        saes: the SAEs of that audit.
        target: "survived" or "not damaged".
        threshold: of ρ; by default `survived_at` or `damaged_at` of the audit.
        n_permutations: shuffles of survival over the features; 0 leaves out that control.

    Raises `SAEError` for other SAEs, `MetricInputError` for fewer live features than two folds of each kind could hold.
    """
    threshold = threshold_of(report, target, threshold)
    table = with_survival(reference_statistics(report, saes), report, threshold)
    labels = table["target"].to_numpy(bool)
    if len(labels) < 2 * n_folds:
        raise MetricInputError(
            f"{len(labels)} live features are too few to predict from in {n_folds} folds; expected {2 * n_folds} or more: "
            "use more prompts, a lower min_active or fewer folds"
        )
    n, n_true = len(labels), int(labels.sum())
    nothing = Estimate(math.nan, math.nan, math.nan, n)
    share = n_true / n
    if reason := _too_few(n, n_true, n_folds, target, threshold):
        probability, permuted, p, single, brier = np.full(n, math.nan), nothing, math.nan, {}, math.nan
    else:
        names = varying(table, PREDICTORS)
        rng = np.random.default_rng(seed)
        probability = out_of_fold(table, labels, names, n_folds, seed)
        shuffled = [_shuffled_auc(table, labels, names, n_folds, rng) for _ in range(n_permutations)]
        observed = auc(probability, labels).value
        permuted = _spread(shuffled)
        p = (1 + sum(value >= observed for value in shuffled)) / (1 + n_permutations)
        single = {name: auc(table[name].to_numpy(np.float64), labels) for name in names}
        brier = float(np.mean((probability - labels) ** 2))
    return SurvivalPrediction(
        label=report.label,
        target=target,
        threshold=threshold,
        n=n,
        n_true=n_true,
        auc=nothing if reason else auc(probability, labels),
        single=single,
        permuted=permuted,
        p=p,
        brier=brier,
        brier_constant=share * (1 - share),
        table=table.assign(probability=probability),
        reason=reason,
    )


def threshold_of(report: AuditReport, target: Target, threshold: float | None = None) -> float:
    """The correlation that `target` asks for, by default the audit's own; raises `MetricInputError` for another target."""
    if target not in _THRESHOLD:
        raise MetricInputError(f"target is {target!r}; expected one of: {', '.join(map(repr, _THRESHOLD))}")
    return float(report.settings[_THRESHOLD[target]] if threshold is None else threshold)


def with_survival(statistics: "pd.DataFrame", report: AuditReport, threshold: float) -> "pd.DataFrame":
    """`reference_statistics` with columns rho and target (ρ ≥ threshold); features of which ρ is not defined are left out."""
    found = report.features.loc[:, ["site", "feature", "correlation"]].rename(columns={"correlation": "rho"}).dropna()
    table = statistics.merge(found, on=["site", "feature"])
    return table.assign(target=table["rho"] >= threshold)


def out_of_fold(
    table: "pd.DataFrame", labels: np.ndarray, names: list[str], n_folds: int = 5, seed: int = 0
) -> np.ndarray:
    """Probability of each row from the model that was fitted without its fold."""
    from sklearn.model_selection import StratifiedKFold

    probability = np.full(len(labels), math.nan)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    for train, test in folds.split(np.zeros(len(labels)), labels):
        model = SurvivalModel.fit(table.iloc[train], labels[train], names)
        probability[test] = model.probability(table.iloc[test])
    return probability


def _shuffled_auc(
    table: "pd.DataFrame", labels: np.ndarray, names: list[str], n_folds: int, rng: np.random.Generator
) -> float:
    shuffled = rng.permutation(labels)
    return auc(out_of_fold(table, shuffled, names, n_folds, int(rng.integers(2**31))), shuffled).value


def _spread(values: list[float]) -> Estimate:
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0, "permutation")
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(np.mean(values)), float(low), float(high), len(values), "permutation")


def _too_few(n: int, n_true: int, n_folds: int, target: Target, threshold: float) -> str:
    what = f"of {n} live features {n_true} are {target} (ρ ≥ {threshold:g})"
    if n_true in (0, n):
        return f"{what}: there is nothing to tell apart"
    if min(n_true, n - n_true) < n_folds:
        return f"{what}: each of {n_folds} folds needs one of either kind"
    return ""
