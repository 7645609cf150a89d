"""Metrics and statistics against scipy, scikit-learn and torch; sums are float64, logits float32."""

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from sklearn.metrics import jaccard_score, roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from tests.metrics.pairs import sparse_pair
from tracelens.metrics import (
    FeatureDrift,
    FeatureSmearing,
    MomentAccumulator,
    correlation,
    fidelity,
    nll,
    token_divergence,
)
from tracelens.metrics.divergence import DivergenceAccumulator
from tracelens.stats import (
    auroc,
    auroc_max_permutation,
    benjamini_hochberg,
    bootstrap_weights,
    percentile_interval,
    sign_flip_test,
    wilson,
)


@pytest.fixture
def pair():
    r, q = sparse_pair(500, 16)
    return r[:, 1:], q[:, 1:]


def test_correlation_is_pearson(pair):
    r, q = (x.double().numpy() for x in pair)
    expected = [scipy_stats.pearsonr(r[:, k], q[:, k]).statistic for k in range(r.shape[1])]
    np.testing.assert_allclose(FeatureDrift().compute(*pair).correlation.numpy(), expected, rtol=1e-10)


def test_drift_and_fidelity_are_the_formulas(pair):
    r, q = (x.double().numpy() for x in pair)
    expected = np.linalg.norm(r - q, axis=0) / np.linalg.norm(r, axis=0)
    np.testing.assert_allclose(FeatureDrift().compute(*pair).drift.numpy(), expected, rtol=1e-10)
    phi = fidelity(MomentAccumulator(r.shape[1]).update(*pair).finalize())[0].numpy()
    np.testing.assert_allclose(phi, (r * q).sum(0) / np.maximum((r**2).sum(0), (q**2).sum(0)), rtol=1e-12)


def test_jaccard_is_sklearn(pair):
    r, q = (x.numpy() > 0 for x in pair)
    expected = [jaccard_score(r[:, k], q[:, k]) for k in range(r.shape[1])]
    np.testing.assert_allclose(FeatureDrift().compute(*pair).jaccard.numpy(), expected, rtol=1e-12)


def test_smearing_cosines_are_sklearn(pair):
    before, after = (cosine_similarity(x.double().numpy().T) for x in pair)
    pairs = FeatureSmearing(tau=0.1, delta=0.01).detect_smearing(*pair).pairs
    assert len(pairs) == np.triu((after >= 0.1) & (after - before >= 0.01), 1).sum() > 0
    for p in pairs:
        assert (p.cos_ref, p.cos_quant) == pytest.approx((before[p.i, p.j], after[p.i, p.j]), abs=1e-10)


def test_auroc_is_sklearn(pair):
    labels = torch.arange(500) % 3 == 0
    expected = roc_auc_score(np.tile(labels.numpy()[:, None], (1, 15)), pair[0].numpy(), average=None)
    np.testing.assert_allclose(auroc(pair[0], labels).numpy(), expected, rtol=1e-12)


def test_sign_flip_is_the_scipy_permutation_test():
    d = np.random.default_rng(0).normal(0.3, 1, size=12)
    exact = scipy_stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_test(torch.from_numpy(d), 20_000) == pytest.approx(exact, abs=0.012)


def test_divergence_is_torch():
    g = torch.Generator().manual_seed(0)
    p, q = 3 * torch.randn(2, 50, 100, generator=g)
    targets = torch.randint(100, (50,), generator=g)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(token_divergence(p, q)[0].double(), expected, rtol=1e-5, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(p.double(), targets, reduction="none")
    torch.testing.assert_close(nll(p, targets), expected, rtol=1e-6, atol=1e-6)


def test_kl_by_hand():
    """KL(reference ‖ quantized), natural logarithm, summed over the vocabulary, mean over tokens; not the other way round."""
    reference = torch.tensor([[3 / 4, 1 / 4], [1 / 2, 1 / 2]]).log() + 5  # a constant is no difference
    quantized = torch.tensor([[1 / 2, 1 / 2], [1 / 2, 1 / 2]]).log() - 2
    there = 3 / 4 * np.log(3 / 2) + 1 / 4 * np.log(1 / 2)  # 0.1308
    back = 1 / 2 * np.log(2 / 3) + 1 / 2 * np.log(2)  # 0.1438
    kl, agree = token_divergence(reference, quantized)
    np.testing.assert_allclose(kl.numpy(), [there, 0], atol=1e-7)
    np.testing.assert_allclose(token_divergence(quantized, reference)[0].numpy(), [back, 0], atol=1e-7)
    assert agree.tolist() == [True, True]
    total = DivergenceAccumulator().update(reference, quantized, torch.tensor([0, -1])).finalize()
    assert total.kl().item() == pytest.approx(there / 2, abs=1e-7)
    assert total.perplexity_reference().item() == pytest.approx(4 / 3, rel=1e-6)  # one target, of probability 3/4
    assert total.perplexity_quantized().item() == pytest.approx(2, rel=1e-6)


def test_auroc_with_ties_is_sklearn(pair):
    scores, labels = pair[0].mul(2).round(), torch.arange(500) % 3 == 0
    expected = [roc_auc_score(labels.numpy(), scores[:, k].numpy()) for k in range(scores.shape[1])]
    np.testing.assert_allclose(auroc(scores, labels).numpy(), expected, rtol=1e-12)


def test_auroc_p_of_one_feature_is_the_scipy_permutation_test():
    g = torch.Generator().manual_seed(3)
    scores, labels = torch.randn(14, 1, generator=g), torch.arange(14) < 6
    scores[:6] += 0.8

    def rank_sum(a, b):
        return scipy_stats.rankdata(np.concatenate([a, b]))[: len(a)].sum()

    sides = (scores[labels, 0].numpy(), scores[~labels, 0].numpy())
    exact = scipy_stats.permutation_test(sides, rank_sum, alternative="greater", n_resamples=np.inf).pvalue
    assert auroc_max_permutation(scores, labels, n_permutations=20_000)[0].item() == pytest.approx(exact, abs=0.012)


@pytest.mark.parametrize(("successes", "n"), [(8, 10), (0, 20), (20, 20), (431, 1000)])
def test_wilson_by_hand(successes, n):
    """The roots p of |p̂ − p| = z sqrt(p (1 − p) / n)."""
    z, rate = scipy_stats.norm.ppf(0.975), successes / n
    roots = np.roots([1 + z**2 / n, -(2 * rate + z**2 / n), rate**2])
    interval = wilson(successes, n)
    np.testing.assert_allclose([interval.low, interval.high], np.sort(roots.real), atol=1e-9)


def test_bootstrap_intervals_are_scipys():
    """Of a ratio of sums over prompts: resamples differ, so the ends agree to a twentieth of the interval's width."""
    rng = np.random.default_rng(0)
    top, bottom = rng.gamma(2, size=80), rng.gamma(3, size=80)
    statistic = top.sum() / bottom.sum()
    expected = scipy_stats.bootstrap(
        (top, bottom),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    weights = bootstrap_weights(80, 20_000)
    draws = (weights @ torch.from_numpy(top)) / (weights @ torch.from_numpy(bottom))
    interval = percentile_interval(statistic, draws)
    width = expected.high - expected.low
    np.testing.assert_allclose([interval.low, interval.high], [expected.low, expected.high], atol=width / 20)
    np.testing.assert_allclose([interval.low, interval.high], np.percentile(draws.numpy(), [2.5, 97.5]), rtol=1e-12)


def test_intervals_of_pearson_cover_like_fishers():
    """The bootstrap over blocks of a feature's correlation, against Fisher's interval of independent normal tokens."""
    g = torch.Generator().manual_seed(5)
    a = torch.randn(1500, 1, generator=g)
    r, q = a + 4, (0.8 * a + 0.6 * torch.randn(1500, 1, generator=g)) + 4
    blocks = torch.arange(1500) % 64
    moments = MomentAccumulator(1, 64).update(r.clamp(min=0), q.clamp(min=0), blocks).finalize()
    draws = correlation(moments.resample(bootstrap_weights(64, 2000)))[:, 0]
    fisher = scipy_stats.pearsonr(r[:, 0].numpy(), q[:, 0].numpy())
    expected = fisher.confidence_interval()
    interval = percentile_interval(float(fisher.statistic), draws)
    width = expected.high - expected.low
    np.testing.assert_allclose([interval.low, interval.high], [expected.low, expected.high], atol=width / 4)


def test_benjamini_hochberg_by_hand():
    """p · n / rank, made monotone from the largest: .01·5/1, .04·5/3 (twice), .2·5/4, .5."""
    p = torch.tensor([0.04, 0.01, 0.5, 0.2, 0.03])
    np.testing.assert_allclose(benjamini_hochberg(p).numpy(), [0.2 / 3, 0.05, 0.5, 0.25, 0.2 / 3], rtol=1e-6)
