"""Are forecasts of precisions that were not run any good? Each precision of a sweep, predicted from the others."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.errors import MetricInputError
from tracelens.optimization_auditor import SweepResult
from tracelens.output import encode
from tracelens.precision import QuantizationConfig
from tracelens.stats import wilson
from tracelens.studies.auc import auc
from tracelens.studies.prediction import Target, threshold_of
from tracelens.studies.survival_predictor import ERROR, SurvivalPredictor, pool_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class ForecastCheck:
    """Forecasts against what was measured.

    Attributes:
        target, threshold: what was predicted: that ρ reaches the threshold.
        table: a row per precision, most bits first: precision, label, bits, weight_error (of all blocks with an SAE), extrapolated (its
            error lies outside of those of the others), n; measured share with _low and _high (Wilson over features), forecast share,
            auc with _low and _high (NaN where all features fare alike), brier.
    """

    target: Target
    threshold: float
    table: "pd.DataFrame"

    def to_dataframe(self) -> "pd.DataFrame":
        return self.table.copy()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        rows = self.table.to_dict(orient="records")
        return {"target": self.target, "threshold": self.threshold, "table": encode(rows)}

    def plot(self) -> "go.Figure":
        """Measured and forecast shares by precision, with the AUC over the features of each."""
        from tracelens.views.survival_figures import forecast_figure

        return forecast_figure(self)


def check_forecasts(
    sweep: SweepResult, saes: Any, model: Any, *, target: Target = "survived", threshold: float | None = None
) -> ForecastCheck:
    """Leaves out one precision of a sweep at a time, fits `SurvivalPredictor` on the others and predicts it.

    The features are the same in all precisions: what is new to the predictor is the precision, as in use. Every precision counts the
    same, however many bits it has, so a sweep that is dense where survival changes makes the better predictor.
    Raises `MetricInputError` for fewer than three precisions, and as `SurvivalPredictor.fit`.
    """
    import pandas as pd

    if len(sweep.reports) < 3:
        raise MetricInputError(
            f"a sweep of {len(sweep.reports)} cannot tell how survival falls with one left out; give three or more"
        )
    first, pool = pool_of(sweep, saes, model, target, threshold)
    threshold = threshold_of(first, target, threshold)
    rows = []
    for spec in sorted(sweep.reports, key=lambda name: -QuantizationConfig.parse(name).bits_per_weight):
        held_out = (pool["precision"] == spec).to_numpy()
        others, here = pool.loc[~held_out], pool.loc[held_out]
        predictor = SurvivalPredictor.of_pool(others, here, target, threshold, first.reference)
        labels = here["target"].to_numpy(bool)
        probability = predictor.model.probability(here)
        measured, area = wilson(int(labels.sum()), len(labels)), auc(probability, labels)
        config = QuantizationConfig.parse(spec)
        rows.append(
            {
                "precision": spec,
                "label": config.label,
                "bits": config.bits_per_weight,
                "weight_error": float(here.loc[here["layer"].idxmax(), ERROR]),  # pyright: ignore[reportArgumentType]
                "extrapolated": predictor.extrapolates(here),
                "n": len(here),
                **{"measured": measured.value, "measured_low": measured.low, "measured_high": measured.high},
                "forecast": float(probability.mean()),
                **{"auc": area.value, "auc_low": area.low, "auc_high": area.high},
                "brier": float(np.mean((probability - labels) ** 2)),
            }
        )
    return ForecastCheck(target, threshold, pd.DataFrame(rows))
