"""Every figure function of `tracelens.views` with a made-up result: name → a function that draws it."""

from dataclasses import replace

import torch

from tests.causal.test_fragility import made_up as made_up_importance
from tests.studies import planted_reports as planted
from tests.views import made_up_studies as studies
from tests.views import test_attribution_figures as attribution
from tests.views import test_fragility_figures as fragility
from tests.views import test_patching_figures as patching
from tests.views import test_repair_figures as repair
from tests.views.made_up import made_up_report, made_up_sweep
from tests.views.made_up_looks import made_up_look
from tests.views.made_up_plans import made_up_plan
from tracelens.causal.attribution_check import AttributionCheck
from tracelens.causal.bound_result import DriftBounds
from tracelens.causal.fragility import associate
from tracelens.causal.fragility_result import Fragility
from tracelens.stats import Estimate
from tracelens.studies.feature_damage import FeatureDamage
from tracelens.studies.forecast_check import ForecastCheck
from tracelens.studies.overlap import damage_overlap
from tracelens.studies.prediction import predict_survival
from tracelens.studies.survival import survival_curve
from tracelens.views import (
    attribution_figures,
    decomposition_figures,
    drift_figures,
    feature_damage_figures,
    figures,
    fragility_figures,
    health_figures,
    muting_figures,
    patching_figures,
    pathway_figures,
    plan_figures,
    prompt_figures,
    repair_figures,
    smearing_figures,
    survival_figures,
)

N = 40


def damage() -> FeatureDamage:
    """A sweep of three precisions, and all that a study makes of it."""
    r, sae = planted.activations(400, N), planted.decoder(N)
    sweep = planted.noisy_sweep(r, sae, {"int2": 12.0, "int8": 0.5, "int4": 5.0})
    curve = survival_curve(sweep)
    table = curve.of("all")[["precision", "label", "bits", "n", "survived", "survived_low", "survived_high"]]
    table = table.rename(columns=lambda name: name.replace("survived", "measured"))
    check = ForecastCheck("survived", 0.9, table.assign(forecast=[0.99, 0.6, 0.2], extrapolated=[True, False, True]))
    lost = planted.planted(r, planted.shuffled(r, torch.arange(N) < 12), sae, label="30% pruned")
    overlaps = [damage_overlap(sweep["int2"], lost, n_resamples=20)]
    predictions = [
        predict_survival(sweep[spec], {planted.SITE: sae}, n_permutations=3) for spec in ("int8", "int4", "int2")
    ]
    return FeatureDamage(sweep, curve, {}, overlaps, predictions, check)


def fragile() -> Fragility:
    ours, drift = made_up_importance()
    drifts = {"int4": drift, "int3": replace(drift, relative=2 * drift.relative)}
    noise = {label: (made_up_importance(seed=0, spread=0.06)[1],) for label in drifts}
    return Fragility(ours, drifts, noise, associate(ours, drifts, noise, n_resamples=20, n_permutations=50))


def checked() -> AttributionCheck:
    one = attribution.attribution()
    shared = {name: getattr(one, name) for name in ("layers", "metric", "unit", "reference", "quantized", "prompts")}
    return AttributionCheck(
        names=attribution.NAMES,
        how="alone",
        at="reference",
        predicted=one.first_order,
        exact=one.first_order * 0.5,
        **shared,
    )


E3 = Estimate(0.3, 0.2, 0.4)
FIGURES = {
    "audit_figure": lambda d: figures.audit_figure(made_up_report()),
    "drift_figure": lambda d: drift_figures.drift_figure(made_up_report()),
    "sweep_figure": lambda d: figures.sweep_figure(made_up_sweep()),
    "pathways_figure": lambda d: pathway_figures.pathways_figure(studies.pathways_of_one()),
    "smearing_figure": lambda d: smearing_figures.smearing_figure(studies.smearing()),
    "thresholds_figure": lambda d: muting_figures.thresholds_figure(studies.thresholds(0.5, safety=3)),
    "causes_figure": lambda d: muting_figures.causes_figure(studies.muting(2)),
    "health_figure": lambda d: health_figures.health_figure(studies.health(Estimate(0.9, 0.8, 0.95))),
    "decomposition_figure": lambda d: decomposition_figures.decomposition_figure(studies.decomposition(E3)),
    "survival_figure": lambda d: survival_figures.survival_figure(d.curve),
    "overlap_figure": lambda d: survival_figures.overlap_figure(d.overlaps[0]),
    "prediction_figure": lambda d: survival_figures.prediction_figure(d.predictions[1]),
    "forecast_figure": lambda d: survival_figures.forecast_figure(d.forecasts),
    "feature_damage_figure": lambda d: feature_damage_figures.feature_damage_figure(d),
    "plan_figure": lambda d: plan_figures.plan_figure(made_up_plan()),
    "curve_figure": lambda d: repair_figures.curve_figure(repair.made_curve()),
    "direction_figure": lambda d: repair_figures.direction_figure(repair.made_direction()),
    "fragility_figure": lambda d: fragility_figures.fragility_figure(fragile()),
    "importance_figure": lambda d: fragility_figures.importance_figure(fragility.everything()),
    "bound_figure": lambda d: attribution_figures.bound_figure(DriftBounds({"int4": attribution.bound()})),
    "carriers_figure": lambda d: attribution_figures.carriers_figure(attribution.bound()),
    "attribution_figure": lambda d: attribution_figures.attribution_figure(attribution.attribution()),
    "check_figure": lambda d: attribution_figures.check_figure(checked()),
    "next_tokens_figure": lambda d: prompt_figures.next_tokens_figure(made_up_look()),
    "margins_figure": lambda d: prompt_figures.margins_figure(made_up_look()),
    "look_figure": lambda d: prompt_figures.look_figure(made_up_look()),
    **{
        f"patching_figure of {name}": lambda d, make=make: patching_figures.patching_figure(make())
        for name, make in patching.KINDS.items()
    },
}
"""Drawn with the result of `damage`, which several share."""
