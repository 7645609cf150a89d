"""What a precision will do to each feature, before it is run: the reference's statistics and the size of the weight error."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tracelens.errors import MetricInputError, PairMismatchError, ResultFileError
from tracelens.optimization_auditor import SweepResult
from tracelens.output import decode, encode, reading, write_atomically
from tracelens.precision import QuantizationConfig, QuantizationType, apply_precision
from tracelens.precision.weights import weight_matrices
from tracelens.studies.comparable import check_same_reference
from tracelens.studies.prediction import Target, threshold_of, with_survival
from tracelens.studies.reference_statistics import PREDICTORS, reference_statistics
from tracelens.studies.survival_model import SurvivalModel, varying

if TYPE_CHECKING:
    import pandas as pd

KIND = "tracelens_survival_predictor"
VERSION = 1
ERROR = "weight_error"


@dataclass(frozen=True, eq=False)
class SurvivalForecast:
    """What is expected of a precision that was not run.

    Attributes:
        label: of the precision.
        share: of the live features that are expected to reach the threshold: the mean of their probabilities.
        weight_error: relative error of the weights up to the last layer with an SAE.
        extrapolated: whether an error lies outside of those that the predictor has seen at its layer.
        table: a row per live feature: site, feature, behaviour, weight_error (up to its layer), probability.
    """

    label: str
    share: float
    weight_error: float
    extrapolated: bool
    table: "pd.DataFrame"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per live feature, the most endangered first."""
        return self.table.sort_values("probability", kind="stable").reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class SurvivalPredictor:
    """Probability that a feature survives a precision, from the reference's statistics and the relative error of the weights.

    Attributes:
        model: the fitted logistic model.
        target, threshold: what is predicted: that ρ reaches the threshold.
        reference: the reference's name.
        seen: layer → smallest and largest weight error that it was fitted on.
        statistics: `reference_statistics` of the features that it speaks of.
    """

    model: SurvivalModel
    target: Target
    threshold: float
    reference: str
    seen: dict[int, tuple[float, float]]
    statistics: "pd.DataFrame"

    @classmethod
    def fit(
        cls, sweep: SweepResult, saes: Any, model: Any, *, target: Target = "survived", threshold: float | None = None
    ) -> "SurvivalPredictor":
        """Fits all precisions of a sweep together.

        Args:
            sweep: of precisions that round weights only; their errors are computed anew, nothing is run. Ready-made builds in it
                are left out.
            saes, model: those of the sweep.
            target, threshold: as for `predict_survival`.

        Raises `MetricInputError` if a precision rounds activations, or if every feature survives everywhere or none anywhere;
        `SAEError` for other SAEs; `PairMismatchError` if the sweep's audits are not of one reference.
        """
        first, pool = pool_of(sweep, saes, model, target, threshold)
        threshold = threshold_of(first, target, threshold)
        return cls.of_pool(pool, reference_statistics(first, saes), target, threshold, first.reference)

    @classmethod
    def of_pool(
        cls, pool: "pd.DataFrame", statistics: "pd.DataFrame", target: Target, threshold: float, reference: str
    ) -> "SurvivalPredictor":
        """Fits the rows of `pool_of`; raises as `fit`."""
        labels = pool["target"].to_numpy(bool)
        if labels.all() or not labels.any():
            which = "every" if labels.all() else "no"
            raise MetricInputError(
                f"{which} feature is {target} (ρ ≥ {threshold:g}) in each of the precisions: there is nothing to learn from; "
                f"sweep over {'lower' if labels.all() else 'higher'} precisions too"
            )
        fitted = SurvivalModel.fit(pool, labels, varying(pool, (*PREDICTORS, ERROR)))
        seen = {
            int(layer): (float(rows[ERROR].min()), float(rows[ERROR].max()))  # pyright: ignore[reportArgumentType]
            for layer, rows in pool.groupby("layer")
        }
        return cls(fitted, target, threshold, reference, seen, statistics)

    def extrapolates(self, table: "pd.DataFrame") -> bool:
        """Whether a row's weight error lies outside of those that were seen at its layer."""
        error, layer = table[ERROR], table["layer"].astype(int)
        low, high = ({k: ends[side] for k, ends in self.seen.items()} for side in (0, 1))
        return bool(((error < layer.map(low) * (1 - 1e-9)) | (error > layer.map(high) * (1 + 1e-9))).any())

    def forecast(self, model: Any, precision: Any) -> SurvivalForecast:
        """What to expect of a precision ("int5-g32") or of a quantized model, from its weights alone: no forward pass.

        `model` is the reference. Raises `MetricInputError` for a precision that also rounds activations, `PairMismatchError` for a
        model with other weights' shapes.
        """
        label, errors = _errors(model, precision)
        table = _with_error(self.statistics, errors)
        probability = self.model.probability(table)
        return SurvivalForecast(
            label=label,
            share=float(probability.mean()),
            weight_error=errors[max(self.seen)],
            extrapolated=self.extrapolates(table),
            table=table[["site", "feature", "behaviour", ERROR]].assign(probability=probability),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; the statistics as columns."""
        names = ("target", "threshold", "reference")
        return {KIND: VERSION, **{name: getattr(self, name) for name in names}} | {
            "model": encode(self.model),
            "seen": {str(layer): list(ends) for layer, ends in self.seen.items()},
            "statistics": {str(name): column.tolist() for name, column in self.statistics.items()},
        }

    def save(self, path: str | Path) -> Path:
        """Writes coefficients and statistics as one JSON file; `SurvivalPredictor.load` reads it back."""
        return write_atomically(Path(path), json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SurvivalPredictor":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        import pandas as pd

        with reading(path, "a predictor that SurvivalPredictor.save wrote"):
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop(KIND) != VERSION:
                raise ResultFileError(f"{path} was written by another version of Tracelens; this one reads {VERSION}")
            fitted = decode(SurvivalModel, data.pop("model"))
            seen = {int(layer): (float(low), float(high)) for layer, (low, high) in data.pop("seen").items()}
            statistics = pd.DataFrame(data.pop("statistics"))
            return cls(model=fitted, seen=seen, statistics=statistics, **data)


def weight_error(reference: Any, quantized: Any) -> dict[int, float]:
    """Layer → ‖W − Ŵ‖ / ‖W‖ over all weight matrices of the blocks up to that layer, Frobenius, ≥ 0.

    `quantized`: a model, or a precision, which is applied to the reference's weights. Nothing is run.
    Raises `PairMismatchError` for matrices that differ in name or shape.
    """
    if isinstance(quantized, str | QuantizationConfig | QuantizationType):
        quantized = apply_precision(reference, QuantizationConfig.parse(quantized).weights_only)
    others = {weight.name: weight.parameter for weight in weight_matrices(quantized)}
    noise: dict[int, float] = {}
    size: dict[int, float] = {}
    for weight in weight_matrices(reference):
        other = others.get(weight.name)
        if other is None or other.shape != weight.parameter.shape:
            raise PairMismatchError(f"{weight.name} is missing in the quantized model or has another shape there")
        ours = weight.parameter.detach().double()
        layer = int(weight.name.split(".")[1])
        noise[layer] = noise.get(layer, 0.0) + float((other.detach().to(ours) - ours).square().sum())
        size[layer] = size.get(layer, 0.0) + float(ours.square().sum())
    layers = sorted(size)
    sums = [np.cumsum([part[layer] for layer in layers]) for part in (noise, size)]
    return dict(
        zip(layers, np.sqrt(sums[0] / np.maximum(sums[1], torch.finfo(torch.float64).tiny)).tolist(), strict=True)
    )


def _errors(model: Any, precision: Any) -> tuple[str, dict[int, float]]:
    """Label of a precision or quantized model, and its weight errors; raises `MetricInputError` where they are not all it does."""
    if not isinstance(precision, str | QuantizationConfig | QuantizationType):
        config = getattr(precision, "precision", None)
        label = config.label if config else "the quantized model"
    else:
        config = QuantizationConfig.parse(precision)
        label = config.label
    if config is not None and (config.activations or config.kv_cache):
        raise MetricInputError(
            f"{label} also rounds activations, and its damage does not follow from the weights; leave out +a and +kv"
        )
    return label, weight_error(model, precision)


def _with_error(statistics: "pd.DataFrame", errors: dict[int, float]) -> "pd.DataFrame":
    return statistics.assign(**{ERROR: statistics["layer"].astype(int).map(errors)})


def pool_of(
    sweep: SweepResult, saes: Any, model: Any, target: Target, threshold: float | None
) -> tuple[Any, "pd.DataFrame"]:
    """The first report, and the features of all precisions one below the other, with their survival and weight errors."""
    import pandas as pd

    if not sweep.configs:
        raise MetricInputError(
            "the sweep holds no simulated precision, whose weight errors could be computed; add some, such as 'int4'"
        )
    reports = [sweep[config] for config in sweep.configs]
    check_same_reference(reports)
    threshold = threshold_of(reports[0], target, threshold)
    statistics = reference_statistics(reports[0], saes)
    tables = []
    for spec, report in zip(map(str, sweep.configs), reports, strict=True):
        _, errors = _errors(model, spec)
        tables.append(_with_error(with_survival(statistics, report, threshold), errors).assign(precision=spec))
    return reports[0], pd.concat(tables, ignore_index=True)
