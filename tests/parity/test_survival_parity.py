"""Survival, overlap and prediction against scipy and scikit-learn; everything in float64."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, jaccard_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.metrics.pairs import sparse_pair
from tracelens.metrics import MomentAccumulator, correlation
from tracelens.metrics.overlap import set_overlap, spearman
from tracelens.metrics.survival import survival_interval
from tracelens.studies.auc import auc
from tracelens.studies.survival_model import SurvivalModel


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 30, 400).astype(float)  # with ties
    return x, x + 10 * rng.standard_normal(400).round(1)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_survival_and_its_interval_are_scipys(level):
    r, q = (x[:, 1:] for x in sparse_pair(500, 16))
    found = [scipy_stats.pearsonr(a, b) for a, b in zip(r.double().numpy().T, q.double().numpy().T, strict=True)]
    rho = correlation(MomentAccumulator(r.shape[1]).update(r, q).finalize())[0].numpy()
    np.testing.assert_allclose(rho, [f.statistic for f in found], rtol=1e-10)
    low, high = survival_interval(rho, np.full(len(rho), len(r)), level)
    intervals = [f.confidence_interval(level) for f in found]
    np.testing.assert_allclose(low, [i.low for i in intervals], rtol=1e-9)
    np.testing.assert_allclose(high, [i.high for i in intervals], rtol=1e-9)


def test_spearman_is_scipys(scores):
    expected = scipy_stats.spearmanr(*scores).statistic
    assert spearman(*scores, n_resamples=10).value == pytest.approx(expected, abs=1e-12)


def test_spearman_interval_is_scipys_bootstrap(scores):
    ours = spearman(*scores, n_resamples=4000)
    theirs = scipy_stats.bootstrap(
        scores,
        lambda x, y: scipy_stats.spearmanr(x, y).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        random_state=np.random.default_rng(1),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.008)


def test_jaccard_is_sklearns_and_its_p_fishers(scores):
    a, b = scores[0] > 20, scores[1] > 20
    overlap = set_overlap(a, b)
    assert overlap.jaccard == pytest.approx(jaccard_score(a, b), abs=1e-12)
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert overlap.p == pytest.approx(scipy_stats.fisher_exact(table, alternative="greater").pvalue, rel=1e-8)


def test_auc_is_sklearns(scores):
    x, y = scores
    labels = y > 18
    assert auc(x, labels).value == pytest.approx(roc_auc_score(labels, x), abs=1e-12)


def test_the_logistic_model_is_sklearns_pipeline():
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"peak": rng.lognormal(size=300), "nearest_cosine": rng.uniform(-1, 1, 300)})
    labels = np.log(table["peak"]) + table["nearest_cosine"] + rng.standard_normal(300) > 0
    ours = SurvivalModel.fit(table, labels.to_numpy(), list(table)).probability(table)
    x = np.stack([np.log(table["peak"]), table["nearest_cosine"]], 1)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, labels)
    theirs = pipeline.predict_proba(x)[:, 1]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.mean((ours - labels) ** 2) == pytest.approx(brier_score_loss(labels, theirs), abs=1e-6)
