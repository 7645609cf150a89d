"""The study of arXiv 2606.03002 in one call: survival against bits, overlap with pruning and noise, prediction, perplexity beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tracelens.audit_report import AuditReport
from tracelens.audit_settings import AuditSettings
from tracelens.auditing.question import Question
from tracelens.auditing.running import Variant, model_name, run_audits
from tracelens.datasets import resolve_dataset
from tracelens.errors import PrecisionSpecError
from tracelens.features.saes import normalise_saes
from tracelens.optimization_auditor import OptimizationAuditor, SweepResult
from tracelens.pair import PrecisionPair
from tracelens.precision import QuantizationConfig, apply_precision, matched_noise
from tracelens.studies.forecast_check import ForecastCheck, check_forecasts
from tracelens.studies.overlap import DamageOverlap, damage_overlap, overlap_table
from tracelens.studies.prediction import SurvivalPrediction, predict_survival
from tracelens.studies.pruning import MatchBy, MatchedPruning, match_pruning
from tracelens.studies.survival import SurvivalCurve, survival_curve

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class FeatureDamage:
    """What quantization does to features, whether other damage hits the same ones, and whether it could be foretold.

    Attributes:
        sweep: the audits.
        curve: survival against bits.
        pruning: precision → the magnitude pruning that costs as much.
        overlaps: of the features that a precision and that pruning damage, and that it and matched noise damage, one after the other.
        predictions: for each precision, survival predicted from the reference alone.
        forecasts: each precision predicted from the others.
    """

    sweep: SweepResult
    curve: SurvivalCurve
    pruning: dict[str, MatchedPruning]
    overlaps: list[DamageOverlap]
    predictions: list[SurvivalPrediction]
    forecasts: ForecastCheck

    def overlap_table(self) -> "pd.DataFrame":
        """One row per overlap."""
        return overlap_table(self.overlaps)

    def prediction_table(self) -> "pd.DataFrame":
        """One row per precision: AUC of the model with its interval and control, and of each predictor alone."""
        import pandas as pd

        rows = []
        for p in self.predictions:
            row = {"label": p.label, "n": p.n, p.target: p.n_true, "auc": p.auc.value, "auc_low": p.auc.low}
            row |= {"auc_high": p.auc.high, "shuffled": p.permuted.value, "p": p.p, "brier": p.brier}
            rows.append(row | {name: e.value for name, e in p.single.items()} | {"reason": p.reason})
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """Four panels: survival against bits, perplexity below it; overlap of damaged sets, AUC of the prediction below it."""
        from tracelens.views.feature_damage_figures import feature_damage_figure

        return feature_damage_figure(self)


def feature_damage(
    model: Any,
    saes: Any,
    prompts: Any,
    precisions: Sequence[Any],
    *,
    matched: Sequence[Any] = (),
    by: MatchBy = "perplexity",
    tolerance: float = 0.1,
    baseline: Any = None,
    settings: AuditSettings | None = None,
    **changes: Any,
) -> FeatureDamage:
    """Sweeps the precisions, prunes to the cost of some of them, and predicts survival.

    Args:
        model, saes: the reference and its SAEs.
        prompts, baseline: as `Audit.trace_features` takes them.
        precisions: three or more, of weights only.
        matched: those of them that are compared with pruning and with noise.
        by, tolerance: what pruning is matched in, and how closely (`match_pruning`).
        settings, changes: an `AuditSettings`, and single fields of it by name.

    Raises `PrecisionSpecError` for a precision in `matched` that is not in `precisions`, and what the parts raise.
    """
    settings = replace(settings or AuditSettings(), **changes)
    auditor = OptimizationAuditor(model, saes)
    wanted = [QuantizationConfig.parse(spec) for spec in matched]
    if unknown := [str(config) for config in wanted if config not in map(QuantizationConfig.parse, precisions)]:
        raise PrecisionSpecError(f"{', '.join(unknown)} of matched=[...] is not among the precisions; add it to them")
    dataset = resolve_dataset(prompts, baseline=baseline)
    sweep = auditor.run_sweep(dataset, precisions, settings=settings)
    options = {"batch_size": settings.batch_size, "progress": settings.progress}
    pruning = {
        str(config): match_pruning(model, sweep[config], by=by, tolerance=tolerance, **options) for config in wanted
    }
    others = _other_damage(model, saes, dataset, sweep, pruning, settings)
    return FeatureDamage(
        sweep=sweep,
        curve=survival_curve(sweep),
        pruning=pruning,
        overlaps=[damage_overlap(sweep[spec], other) for spec, found in others.items() for other in found],
        predictions=[
            predict_survival(report, saes, seed=settings.seed)
            for _, report in sorted(sweep.reports.items(), key=lambda item: -_bits(item[0]))
        ],
        forecasts=check_forecasts(sweep, saes, model),
    )


def _bits(spec: str) -> float:
    return QuantizationConfig.parse(spec).bits_per_weight


def _other_damage(
    model: Any,
    saes: Any,
    dataset: Any,
    sweep: SweepResult,
    pruning: dict[str, MatchedPruning],
    settings: AuditSettings,
) -> dict[str, list[AuditReport]]:
    """For each precision, the audits of its pruning and of noise of its size, on one more pass of the reference."""
    if not pruning:
        return {}
    variants = []
    for spec, found in pruning.items():
        label = QuantizationConfig.parse(spec).label
        pruned = partial(apply_precision, model, found.config)
        variants.append(Variant(pruned, f"{found.sparsity:.0%} pruned", model_name(model), found.config))
        noise = partial(_noise_like, model, spec, settings.seed)
        variants.append(Variant(noise, f"noise like {label}", model_name(model), None))
    reports = run_audits(
        model,
        variants,
        normalise_saes(saes),
        Question.of(dataset, model.tokenizer, settings.chat),
        tokenizer=model.tokenizer,
        fingerprint=sweep[next(iter(pruning))].fingerprint,
        settings=replace(settings, controls=False),
        shared=PrecisionPair(model, model).settings,
    )
    return {spec: reports[2 * i : 2 * i + 2] for i, spec in enumerate(pruning)}


def _noise_like(model: Any, spec: str, seed: int) -> Any:
    return matched_noise(model, apply_precision(model, spec), seed=seed)
