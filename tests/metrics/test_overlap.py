from itertools import combinations

import numpy as np
import pytest

from tracelens.errors import MetricInputError
from tracelens.metrics.overlap import set_overlap, spearman, stratified_overlap


def masks(n, first, second):
    a, b = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    a[list(first)], b[list(second)] = True, True
    return a, b


def test_chance_is_the_mean_over_all_random_sets():
    n, size_a, size_b = 7, 3, 4
    found, at_least_two = [], []
    for first in combinations(range(n), size_a):
        shared = len(set(first) & set(range(size_b)))
        found.append(shared / (size_a + size_b - shared))
        at_least_two.append(shared >= 2)
    overlap = set_overlap(*masks(n, (0, 1, 6), range(size_b)))
    assert (overlap.n_both, overlap.jaccard) == (2, 2 / 5)
    assert overlap.chance == pytest.approx(np.mean(found))
    assert overlap.p == pytest.approx(np.mean(at_least_two))


def test_overlap_is_symmetric_and_bounded():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 40)) < rng.random((2, 1))
        one, other = set_overlap(a, b), set_overlap(b, a)
        assert one.jaccard == other.jaccard or (not a.any() and not b.any())
        assert one.chance == pytest.approx(other.chance, nan_ok=True)
        assert one.p == pytest.approx(other.p)
        assert not one.jaccard < 0
        assert not one.jaccard > 1


def test_equal_sets_overlap_wholly_and_disjoint_ones_not_at_all():
    a, b = masks(100, range(10), range(10, 20))
    assert set_overlap(a, a).jaccard == 1
    assert set_overlap(a, a).p < 1e-10
    assert (set_overlap(a, b).jaccard, set_overlap(a, b).p) == (0, 1)


def test_empty_sets_have_no_overlap_to_speak_of():
    a, b = masks(10, (), (1,))
    for overlap in (set_overlap(a, a), stratified_overlap(a, a, np.zeros(10, int))):
        assert np.isnan([overlap.jaccard, overlap.chance]).all()
        assert overlap.p == 1
    assert set_overlap(a, b).jaccard == 0


def test_random_sets_are_called_significant_as_rarely_as_promised():
    rng = np.random.default_rng(1)
    ps = [set_overlap(*(rng.permutation(60) < 15 for _ in range(2))).p for _ in range(400)]
    assert np.mean(np.array(ps) <= 0.05) <= 0.05 + 0.025


def test_one_stratum_is_no_stratum():
    a, b = masks(50, range(12), range(6, 20))
    plain, stratified = set_overlap(a, b), stratified_overlap(a, b, np.zeros(50, int), n_permutations=20_000)
    assert stratified.jaccard == plain.jaccard
    assert stratified.chance == pytest.approx(plain.chance, abs=0.005)
    assert stratified.p == pytest.approx(plain.p, abs=0.01)


def test_what_both_share_by_their_strata_is_chance():
    rng = np.random.default_rng(2)
    rare = np.arange(400) < 100
    # Both hit half of the rare features, whichever they are, and no others.
    a, b = (rare & (rng.random(400) < 0.5) for _ in range(2))
    assert set_overlap(a, b).p < 1e-4
    stratified = stratified_overlap(a, b, rare.astype(int))
    assert stratified.p > 0.05
    assert stratified.chance == pytest.approx(stratified.jaccard, abs=0.1)


def test_agreement_within_strata_is_seen():
    rng = np.random.default_rng(3)
    a = rng.random(400) < 0.2
    assert stratified_overlap(a, a, np.arange(400) % 8, n_permutations=999).p == 1 / 1000


def test_spearman_sees_order_only():
    x = np.random.default_rng(4).random(200)
    assert spearman(x, np.exp(5 * x), n_resamples=50).value == pytest.approx(1)
    assert spearman(x, -(x**3), n_resamples=50).value == pytest.approx(-1)
    independent = spearman(x, np.random.default_rng(5).random(200))
    assert independent.low < 0 < independent.high


def test_spearman_interval_covers():
    rng = np.random.default_rng(6)
    truth = 6 / np.pi * np.arcsin(0.5 / 2)  # of a bivariate normal with correlation .5
    hits = 0
    for seed in range(100):
        x = rng.standard_normal(120)
        y = 0.5 * x + np.sqrt(0.75) * rng.standard_normal(120)
        e = spearman(x, y, n_resamples=300, seed=seed)
        hits += e.low <= truth <= e.high
    assert hits >= 88


def test_scores_that_do_not_vary_have_no_order():
    e = spearman(np.ones(20), np.arange(20.0), n_resamples=20)
    assert np.isnan([e.value, e.low, e.high]).all()
    assert np.isnan(spearman(np.zeros(0), np.zeros(0)).value)


def test_misuse_is_named():
    with pytest.raises(MetricInputError, match="expected masks over the same features"):
        set_overlap(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(MetricInputError, match="expected one per feature"):
        stratified_overlap(np.ones(3, bool), np.ones(3, bool), np.zeros(2, int))
    with pytest.raises(MetricInputError, match="NaN; drop features"):
        spearman(np.array([1, np.nan]), np.array([1.0, 2.0]))
    with pytest.raises(MetricInputError, match="expected one score per feature"):
        spearman(np.ones(3), np.ones(4))
