from dataclasses import replace

import pytest
import torch

from tests.studies.planted_reports import SITE, activations, decoder, noisy_sweep, planted, shuffled
from tracelens.audit_report import Control
from tracelens.auditing.preservation import Shares
from tracelens.optimization_auditor import SweepResult
from tracelens.stats import Estimate
from tracelens.studies.feature_damage import FeatureDamage
from tracelens.studies.forecast_check import ForecastCheck
from tracelens.studies.overlap import damage_overlap
from tracelens.studies.prediction import predict_survival
from tracelens.studies.survival import survival_curve
from tracelens.views import survival_figures
from tracelens.views.survival_figures import SURVIVAL

N = 60
SAE = decoder(N)


@pytest.fixture(scope="module")
def r():
    return activations(1000, N)


@pytest.fixture(scope="module")
def sweep(r):
    return noisy_sweep(r, SAE, {"int2": 12.0, "int8": 0.5, "int4": 5.0})


@pytest.fixture(scope="module")
def study(r, sweep):
    curve = survival_curve(sweep)
    table = curve.of("all")[["precision", "label", "bits", "n", "survived", "survived_low", "survived_high"]]
    table = table.rename(columns=lambda name: name.replace("survived", "measured"))
    check = ForecastCheck("survived", 0.9, table.assign(forecast=[0.99, 0.6, 0.2], extrapolated=[True, False, True]))
    lost = planted(r, shuffled(r, torch.arange(N) < 20), SAE, label="30% pruned")
    overlaps = [damage_overlap(sweep["int2"], lost, n_resamples=20)]
    predictions = [predict_survival(sweep[spec], {SITE: SAE}, n_permutations=3) for spec in ("int8", "int4", "int2")]
    return FeatureDamage(sweep, curve, {}, overlaps, predictions, check)


def named(figure, name):
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def test_shares_fill_each_bar_from_many_bits_to_few(study):
    figure = study.curve.plot()
    bars = [named(figure, name) for name in SURVIVAL]
    assert [sum(shares) for shares in zip(*(bar.y for bar in bars), strict=True)] == pytest.approx([1, 1, 1])
    assert [text.split("<br>")[0] for text in figure.layout.xaxis2.ticktext] == ["INT8", "INT4", "INT2"]
    assert bars[0].marker.color == SURVIVAL["survived"]
    assert list(named(figure, "quantized").y) == [4.5] * 3
    assert "60 live features" in figure.layout.title.subtitle.text
    assert "ρ ≥ 0.9" in figure.layout.title.subtitle.text


def test_controls_are_drawn_where_there_are_some(r, study):
    assert not [trace for trace in study.curve.plot().data if "noise" in trace.name]
    part = Estimate(0.4, 0.3, 0.5)
    noise = Control("noise", {}, None, shares={"capability": Shares(part, part, part, part, part)})
    report = replace(planted(r, r, SAE), controls={"noise": noise})
    drawn = named(survival_curve(SweepResult({"int4": report})).plot(), "survived, matched noise")
    assert (drawn.y[0], drawn.error_y.array[0]) == (0.4, pytest.approx(0.1))


def test_an_overlap_shows_every_feature_once(study):
    figure = study.overlaps[0].plot()
    assert sum(len(trace.x) for trace in figure.data) == N
    both = study.overlaps[0].sets.n_both
    assert [len(trace.x) for trace in figure.data if trace.name.startswith("damaged by both")] == [both]
    assert f"Jaccard {study.overlaps[0].jaccard}" in figure.layout.title.subtitle.text


def test_a_prediction_shows_model_control_and_predictors(study):
    prediction = study.predictions[1]
    bars = study.predictions[1].plot().data[0]
    assert [bars.y[0], bars.y[1]] == ["all together, out of fold", "survival shuffled"]
    assert bars.y[2] == survival_figures.PREDICTORS[prediction.strongest]
    assert bars.x[0] + bars.base == pytest.approx(prediction.auc.value)


def test_why_there_is_no_prediction_is_written(r):
    figure = predict_survival(planted(r, r, SAE), {SITE: SAE}).plot()
    assert "nothing to tell apart" in figure.layout.annotations[0].text


def test_a_forecast_beyond_what_was_seen_is_hollow(study):
    figure = study.forecasts.plot()
    symbols = named(figure, "forecast from the others").marker.symbol
    assert list(symbols) == ["circle-open", "circle", "circle-open"]
    assert list(named(figure, "measured").y) == list(study.curve.of("all")["survived"])


def test_the_study_has_four_panels_with_titles(study):
    figure = study.plot()
    titles = {annotation.text for annotation in figure.layout.annotations}
    assert {"Survival", "Perplexity", "Damaged sets: Jaccard"} <= titles
    assert named(figure, "all predictors").y[1] == study.predictions[1].auc.value
    overlap = study.overlaps[0]
    assert list(named(figure, "by chance").x) == [overlap.sets.chance]
    assert list(named(figure, "by chance at equal firing rates").x) == [overlap.matched.chance]
    assert replace(study, overlaps=[], predictions=[]).plot().to_json()


def test_every_axis_has_a_title(study):
    for figure in (study.curve.plot(), study.overlaps[0].plot(), study.forecasts.plot()):
        assert all(axis.title.text for axis in figure.select_yaxes())
        assert any(axis.title.text for axis in figure.select_xaxes())


def test_labels_are_escaped(r, study):
    label = "<script>INT4"
    report = planted(r, shuffled(r, torch.arange(N) < 20), SAE, label=label)
    curve = survival_curve(SweepResult({"int4": report}))
    overlap, prediction = (
        damage_overlap(report, report, n_resamples=5),
        predict_survival(report, {SITE: SAE}, n_permutations=0),
    )
    whole = replace(study, curve=curve, overlaps=[overlap], predictions=[prediction])
    for figure in (curve.plot(), overlap.plot(), prediction.plot(), whole.plot()):
        assert label not in str(figure.to_dict())


def test_many_features_are_drawn_by_webgl(monkeypatch, study):
    monkeypatch.setattr(survival_figures, "GL_FROM", N)
    assert {trace.type for trace in study.overlaps[0].plot().data} == {"scattergl"}
