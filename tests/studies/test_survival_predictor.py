import json

import pandas as pd
import pytest
import torch

from tests.studies.planted_reports import SITE, activations, decoder, noisy_sweep, planted
from tracelens.errors import MetricInputError, PairMismatchError, ResultFileError
from tracelens.optimization_auditor import SweepResult
from tracelens.precision import apply_precision
from tracelens.studies.forecast_check import check_forecasts
from tracelens.studies.survival_predictor import SurvivalPredictor, weight_error

N = 200
SAE = decoder(N)
SAES = {SITE: SAE}
SPECS = ["int8", "int6", "int5", "int4", "int3", "int2"]


@pytest.fixture(scope="module")
def model(tiny_folder):
    from tracelens import load

    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="module")
def sweep(model):
    """Noise in proportion to the error of the weights: what a feature suffers is known from both."""
    noise = {spec: 20 * weight_error(model, spec)[1] for spec in SPECS}
    return noisy_sweep(activations(2000, N), SAE, noise)


def test_weight_error_is_of_all_blocks_so_far(model):
    quantized = apply_precision(model, "int3")
    errors = weight_error(model, quantized)
    ours, theirs = dict(model.named_parameters()), dict(quantized.named_parameters())
    names = [n for n in ours if n.startswith(("blocks.0.", "blocks.1.")) and ".W_" in n.replace("._W", ".W")]
    noise = sum((ours[n] - theirs[n]).double().square().sum() for n in names)
    size = sum(ours[n].double().square().sum() for n in names)
    assert errors[1] == pytest.approx(float((noise / size).sqrt()))
    assert errors == weight_error(model, "int3")
    assert weight_error(model, model) == {0: 0.0, 1: 0.0, 2: 0.0}


def test_weight_error_grows_with_fewer_bits(model):
    errors = [weight_error(model, spec)[2] for spec in SPECS]
    assert errors == sorted(errors)


def test_a_precision_left_out_is_forecast(sweep, model):
    check = check_forecasts(sweep, SAES, model)
    table = check.table.set_index("precision")
    assert table.index.tolist() == SPECS
    assert table["extrapolated"].tolist() == [True, False, False, False, False, True]
    inside = table[~table["extrapolated"]]
    assert (inside["forecast"] - inside["measured"]).abs().max() < 0.1
    assert inside["auc"].min() > 0.9
    assert set(json.loads(json.dumps(check.to_dict()))) == {"target", "threshold", "table"}


def test_a_forecast_needs_no_run(sweep, model, monkeypatch):
    predictor = SurvivalPredictor.fit(sweep, SAES, model)

    def forbidden(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model), "forward", forbidden)
    forecasts = [predictor.forecast(model, spec) for spec in ("int7", "int4-g8", "int3", "int2")]
    shares = [forecast.share for forecast in forecasts]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    table = forecasts[2].to_dataframe()
    assert (len(table), table["probability"].is_monotonic_increasing) == (N, True)
    assert predictor.forecast(model, apply_precision(model, "int3")).share == shares[2]


def test_less_error_than_ever_seen_is_called_extrapolation(sweep, model):
    some = SweepResult({spec: sweep.reports[spec] for spec in ("int5", "int4", "int3")})
    predictor = SurvivalPredictor.fit(some, SAES, model)
    assert predictor.forecast(model, "int8").extrapolated
    assert predictor.forecast(model, "int2").extrapolated
    assert not predictor.forecast(model, "int4").extrapolated
    unchanged = predictor.forecast(model, "fp32")
    assert unchanged.weight_error == 0
    assert unchanged.share > 0.95


def test_saved_and_loaded_it_forecasts_the_same(sweep, model, tmp_path):
    predictor = SurvivalPredictor.fit(sweep, SAES, model)
    loaded = SurvivalPredictor.load(predictor.save(tmp_path / "predictor.json"))
    pd.testing.assert_frame_equal(loaded.forecast(model, "int4").table, predictor.forecast(model, "int4").table)
    assert (loaded.model, loaded.seen, loaded.target) == (predictor.model, predictor.seen, "survived")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ResultFileError, match=r"not a predictor that SurvivalPredictor\.save wrote"):
        SurvivalPredictor.load(tmp_path / "other.json")


def test_where_all_survive_there_is_nothing_to_learn(model):
    r = activations(500, N)
    sweep = SweepResult({spec: planted(r, r.clone(), SAE) for spec in ("int8", "int6", "int4")})
    with pytest.raises(MetricInputError, match=r"every feature is survived.*sweep over lower precisions too"):
        SurvivalPredictor.fit(sweep, SAES, model)


def test_what_weights_do_not_tell_is_refused(sweep, model):
    with pytest.raises(MetricInputError, match=r"also rounds activations.*leave out \+a and \+kv"):
        SurvivalPredictor.fit(SweepResult({"int4+a8": sweep.reports["int4"]}), SAES, model)
    with pytest.raises(MetricInputError, match="a sweep of 2 cannot tell"):
        check_forecasts(SweepResult({s: sweep.reports[s] for s in ("int4", "int3")}), SAES, model)
    other = planted(activations(2000, N, seed=7), activations(2000, N, seed=7), SAE)
    with pytest.raises(PairMismatchError, match="cannot be compared feature by feature"):
        SurvivalPredictor.fit(SweepResult({"int4": sweep.reports["int4"], "int3": other}), SAES, model)


def test_another_models_weights_are_refused(model):
    narrower = torch.nn.Module()
    with pytest.raises(PairMismatchError, match="is missing in the quantized model or has another shape"):
        weight_error(model, narrower)
