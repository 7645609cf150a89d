import math

import numpy as np
import pandas as pd
import pytest
import torch

from tests.studies.planted_reports import SITE, activations, decoder, planted, shuffled
from tracelens.errors import MetricInputError, SAEError
from tracelens.studies.auc import auc
from tracelens.studies.prediction import predict_survival
from tracelens.studies.reference_statistics import nearest_cosine, reference_statistics
from tracelens.studies.survival_model import SurvivalModel

N = 300
SAE = decoder(N)
SAES = {SITE: SAE}


@pytest.fixture(scope="module")
def r():
    return activations(1500, N)


@pytest.fixture(scope="module")
def by_peak(r):
    """Survival follows the peak activation, a few features aside."""
    low = r.amax(0) < r.amax(0).median()
    low[:10] = ~low[:10]
    return planted(r, shuffled(r, low), SAE, safety=5)


def test_statistics_are_what_they_say(r):
    table = reference_statistics(planted(r, torch.zeros_like(r), SAE, safety=5), SAES)
    fired = r > 0
    expected = {
        "peak": r.amax(0),
        "mean": r.double().mean(0),
        "mean_active": r.double().sum(0) / fired.sum(0),
        "firing_rate": fired.double().mean(0),
        "decoder_norm": SAE.W_dec.norm(dim=1),
    }
    for name, column in expected.items():
        np.testing.assert_allclose(table[name], column.numpy(), rtol=1e-6)
    unit = torch.nn.functional.normalize(SAE.W_dec, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-1).amax(1)
    np.testing.assert_allclose(table["nearest_cosine"], cosines.numpy(), atol=1e-6)
    assert (table["layer"] == 1).all()
    assert table["feature"].tolist() == list(range(N))
    assert table["behaviour"].value_counts().to_dict() == {"capability": N - 5, "refusal": 5}


def test_nearest_cosine_does_not_depend_on_the_chunk(monkeypatch):
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    whole = nearest_cosine(rows, torch.arange(50))
    monkeypatch.setattr("tracelens.studies.reference_statistics._CHUNK", 130)
    torch.testing.assert_close(nearest_cosine(rows, torch.arange(50)), whole)
    torch.testing.assert_close(nearest_cosine(rows, torch.tensor([7, 3])), whole[[7, 3]])
    assert nearest_cosine(rows[:1], torch.tensor([0])).tolist() == [-1]


def test_survival_by_peak_is_predicted_and_the_peak_named(by_peak):
    prediction = predict_survival(by_peak, SAES)
    assert (prediction.n, prediction.reason) == (N, "")
    assert prediction.auc.low > 0.85
    assert prediction.strongest == "peak"
    assert prediction.single["peak"].value > 0.9 > prediction.single["mean_active"].value
    assert prediction.permuted.low <= 0.5 <= prediction.permuted.high
    assert prediction.p == pytest.approx(1 / 21)
    assert prediction.brier < 0.5 * prediction.brier_constant
    assert auc(prediction.table["probability"].to_numpy(), prediction.table["target"].to_numpy()) == prediction.auc


def test_survival_by_chance_is_not_predicted(r):
    covered = 0
    for seed in range(10):
        lost = torch.rand(N, generator=torch.Generator().manual_seed(100 + seed)) < 0.4
        prediction = predict_survival(planted(r, shuffled(r, lost), SAE), SAES, n_permutations=0)
        covered += prediction.auc.low <= 0.5 <= prediction.auc.high
        assert prediction.brier > 0.9 * prediction.brier_constant
    assert covered >= 8


def test_probabilities_are_of_features_the_model_has_not_seen(r):
    """A model that saw its test features could learn noise; out of fold, random labels give no more than chance."""
    lost = torch.rand(N, generator=torch.Generator().manual_seed(3)) < 0.5
    table = predict_survival(planted(r, shuffled(r, lost), SAE), SAES, n_folds=10, n_permutations=0).table
    names = ["peak", "mean", "mean_active", "firing_rate", "nearest_cosine", "decoder_norm"]
    labels = table["target"].to_numpy()
    in_sample = SurvivalModel.fit(table, labels, names).probability(table)
    assert auc(in_sample, labels).value > auc(table["probability"].to_numpy(), labels).value


def test_the_target_and_its_threshold_are_arguments(by_peak):
    other = predict_survival(by_peak, SAES, target="not damaged", n_permutations=0)
    assert (other.target, other.threshold) == ("not damaged", 0.5)
    assert predict_survival(by_peak, SAES, threshold=0.7, n_permutations=0).threshold == 0.7


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        (torch.zeros(N, dtype=torch.bool), f"of {N} live features {N} are survived"),
        (torch.ones(N, dtype=torch.bool), f"of {N} live features 0 are survived"),
        (torch.arange(N) < 3, "each of 5 folds needs one of either kind"),
    ],
    ids=["all survive", "none survives", "three do not"],
)
def test_without_two_kinds_there_is_no_auc_but_a_reason(r, lost, why):
    prediction = predict_survival(planted(r, shuffled(r, lost), SAE), SAES)
    assert why in prediction.reason
    assert math.isnan(prediction.auc.value)
    assert prediction.strongest is None
    assert prediction.table["probability"].isna().all()
    assert prediction.to_dict()["auc"]["value"] is None


def test_too_few_features_are_named(r):
    few = planted(r[:, :9], r[:, :9], decoder(9))
    with pytest.raises(MetricInputError, match="9 live features are too few to predict from in 5 folds; expected 10"):
        predict_survival(few, {SITE: decoder(9)})


def test_other_saes_are_refused(by_peak):
    with pytest.raises(SAEError, match="another SAE"):
        predict_survival(by_peak, {SITE: decoder(N, seed=8)})


def test_few_features_make_wide_intervals():
    labels = np.array([True, False] * 4)
    perfect = auc(labels.astype(float), labels)
    assert perfect.value == perfect.high == 1
    assert perfect.low < 0.75
    assert auc(1 - labels.astype(float), labels).high > 0.25
    assert math.isnan(auc(np.ones(3), np.ones(3, bool)).value)
    with pytest.raises(MetricInputError, match="scores hold NaN"):
        auc(np.array([np.nan, 1]), np.array([True, False]))
    with pytest.raises(MetricInputError, match="expected one per feature"):
        auc(np.ones(2), np.ones(3, bool))


@pytest.mark.parametrize(("shift", "n_true", "n_false"), [(0.0, 30, 30), (1.0, 40, 60), (2.0, 15, 60)])
def test_the_interval_of_an_auc_covers(shift, n_true, n_false):
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    truth = norm.cdf(shift / np.sqrt(2))
    labels = np.arange(n_true + n_false) < n_true
    found = [auc(rng.standard_normal(len(labels)) + shift * labels, labels) for _ in range(400)]
    assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.92


def test_constant_columns_are_left_out():
    rows = torch.nn.functional.normalize(torch.randn(N, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    table = pd.DataFrame({"decoder_norm": rows.norm(dim=1).numpy(), "peak": np.arange(1.0, N + 1)})
    from tracelens.studies.survival_model import varying

    assert varying(table, ["decoder_norm", "peak"]) == ["peak"]


def test_an_audit_without_live_features_says_so():
    nothing = torch.zeros(20, N)
    with pytest.raises(MetricInputError, match="no feature is live in the audit"):
        predict_survival(planted(nothing, nothing, SAE), SAES)
