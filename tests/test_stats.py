import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracelens.errors import MetricInputError
from tracelens.stats import (
    Estimate,
    auroc,
    auroc_max_permutation,
    auroc_under_permutation,
    benjamini_hochberg,
    bootstrap_weights,
    percentile_interval,
    sign_flip_test,
    sign_flip_tests,
    wilson,
    wilson_low,
)


def test_estimate_prints_and_round_trips_through_strict_json():
    estimate = Estimate(0.9341, 0.9211, 0.9449, 120, "bootstrap")
    assert str(estimate) == "0.934 [0.921, 0.945]"
    assert Estimate.from_dict(json.loads(json.dumps(estimate.to_dict()))) == estimate
    missing = Estimate(math.nan, math.nan, math.nan)
    assert str(missing) == "nan [nan, nan]"
    back = Estimate.from_dict(json.loads(json.dumps(missing.to_dict(), allow_nan=False)))
    assert math.isnan(back.value)
    assert back.n is None


@given(n=st.integers(1, 300), data=st.data())
def test_wilson_is_the_closed_form_and_contains_the_rate(n, data):
    k = data.draw(st.integers(0, n))
    estimate, z = wilson(k, n), 1.959963984540054
    p = k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert estimate.low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert estimate.high == pytest.approx(min(1, centre + half), abs=1e-9)
    assert estimate.low - 1e-12 <= estimate.value <= estimate.high + 1e-12


def test_wilson_without_trials_and_without_sense():
    assert math.isnan(wilson(0, 0).value)
    with pytest.raises(MetricInputError, match="3 successes of 2 trials"):
        wilson(3, 2)


def test_bootstrap_weights_rows_sum_to_the_blocks_and_depend_on_the_seed_only():
    weights = bootstrap_weights(7, 50, seed=1)
    assert weights.shape == (50, 7)
    assert weights.sum(1).eq(7).all()
    assert weights.equal(bootstrap_weights(7, 50, seed=1))
    assert not weights.equal(bootstrap_weights(7, 50, seed=2))
    with pytest.raises(MetricInputError, match="at least one block"):
        bootstrap_weights(0)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    g = torch.Generator().manual_seed(0)
    weights = bootstrap_weights(60, 400) / 60
    hits = 0
    for _ in range(300):
        x = torch.randn(60, generator=g, dtype=torch.float64)
        interval = percentile_interval(x.mean().item(), weights @ x, n=60)
        hits += interval.low <= 0 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


def test_percentile_interval_leaves_nan_out_and_keeps_a_constant_exact():
    interval = percentile_interval(1.0, torch.tensor([1.0, math.nan, 1.0]), n=3)
    assert (interval.low, interval.high, interval.n, interval.method) == (1.0, 1.0, 3, "bootstrap")
    assert math.isnan(percentile_interval(math.nan, torch.full((4,), math.nan)).low)


def test_sign_flip_of_equal_differences_has_the_exact_p():
    # All ten of one sign: only the two unanimous flips of 1024 are as extreme.
    assert sign_flip_test(torch.full((10,), 0.3), 50_000) == pytest.approx(2 / 1024, rel=0.25)


def test_sign_flip_bounds():
    assert sign_flip_test(torch.zeros(5)) == 1.0
    assert sign_flip_test(torch.zeros(0)) == 1.0
    assert sign_flip_test(torch.arange(1.0, 101), 99) == 1 / 100
    with pytest.raises(MetricInputError, match=r"differences hold NaN, first at index \(1,\)"):
        sign_flip_test(torch.tensor([0.0, math.nan]))


def test_sign_flip_is_symmetric_and_uniform_under_the_null():
    g = torch.Generator().manual_seed(1)
    d = torch.randn(30, generator=g)
    assert sign_flip_test(d, 500) == sign_flip_test(-d, 500)
    p = torch.tensor([sign_flip_test(torch.randn(20, generator=g), 199, seed=k) for k in range(200)])
    assert (p <= 0.1).float().mean() == pytest.approx(0.1, abs=0.07)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_pair_count_with_ties_half(rows):
    scores, labels = torch.tensor([[float(s)] for s, _ in rows]), torch.tensor([b for _, b in rows])
    if labels.all() or not labels.any():
        with pytest.raises(MetricInputError, match="prompts of both labels"):
            auroc(scores, labels)
        return
    gap = scores[labels, 0][:, None] - scores[~labels, 0]
    assert auroc(scores, labels).item() == pytest.approx(((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item())


def test_max_permutation_finds_the_planted_feature_and_no_other():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) < 30
    scores = torch.randn(60, 200, generator=g)
    scores[:, 17] += 3 * labels
    scores[:, 18] -= 3 * labels  # lower where the label is True: the test is one-sided
    p = auroc_max_permutation(scores, labels, 200)
    assert p[17] == pytest.approx(1 / 201)
    assert (p < 0.05).nonzero().flatten().tolist() == [17]
    assert p[18] == 1.0


def test_max_permutation_controls_the_family_wise_error():
    g = torch.Generator().manual_seed(3)
    labels = torch.arange(20) < 10
    false = [
        bool((auroc_max_permutation(torch.randn(20, 50, generator=g), labels, 99, seed=k) <= 0.1).any())
        for k in range(150)
    ]
    assert sum(false) / 150 <= 0.18


def test_max_permutation_counts_ties_as_exceeding():
    # A constant feature has the same rank sum under every permutation.
    p = auroc_max_permutation(torch.zeros(6, 1), torch.arange(6) < 3, 50)
    assert p.tolist() == [1.0]


def test_nan_scores_are_refused():
    with pytest.raises(MetricInputError, match=r"scores hold NaN, first at index \(0, 1\)"):
        auroc(torch.tensor([[0.0, math.nan], [1.0, 1.0]]), torch.tensor([True, False]))


def test_benjamini_hochberg_by_hand():
    adjusted = benjamini_hochberg(torch.tensor([0.01, 0.04, 0.03, 0.5], dtype=torch.float64))
    torch.testing.assert_close(adjusted, torch.tensor([0.04, 0.16 / 3, 0.16 / 3, 0.5], dtype=torch.float64))


def test_wilson_low_is_the_low_end_of_wilson():
    n, successes = np.array([10, 10, 10, 400]), np.array([0, 3, 10, 399])
    expected = [wilson(int(k), int(m)).low for k, m in zip(successes, n, strict=True)]
    assert wilson_low(successes / n, n) == pytest.approx(expected, abs=1e-12)


def test_wilson_low_puts_evidence_before_totality():
    few, many, half = wilson_low(np.array([1.0, 0.99, 0.5]), np.array([10, 800, 800]))
    assert many > few > half


def test_sign_flips_of_many_features_are_those_of_each():
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(20, 6, generator=generator, dtype=torch.float64) + torch.linspace(0, 1.5, 6)
    together = sign_flip_tests(d, n_permutations=20_000)
    alone = torch.tensor([sign_flip_test(column, n_permutations=20_000) for column in d.T])
    torch.testing.assert_close(together, alone.double(), atol=0.01, rtol=0)
    assert together[-1] == 1 / 20_001


def test_sign_flips_by_hand():
    # Three blocks that agree in sign: of 8 signings 2 reach the sum. A feature that does not move, and scales that do not matter.
    d = torch.tensor([[1.0, 0.0, 1e-9], [1.0, 0.0, 1e-9], [1.0, 0.0, 1e-9]], dtype=torch.float64)
    p = sign_flip_tests(d, n_permutations=40_000)
    assert p[0].item() == pytest.approx(0.25, abs=0.01)
    assert p[1] == 1
    assert p[2] == p[0]
    with pytest.raises(MetricInputError, match="differences hold NaN, first at index"):
        sign_flip_tests(torch.tensor([[1.0, math.nan]]))


def test_sign_flips_of_nothing_are_uniform():
    d = torch.randn(40, 2000, generator=torch.Generator().manual_seed(1))
    p = sign_flip_tests(d, n_permutations=2000)
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).double().mean().item() == pytest.approx(level, abs=4 * math.sqrt(level / 2000))
    assert (benjamini_hochberg(p) > 0.05).all()


def test_no_p_values_adjust_to_none():
    assert len(benjamini_hochberg(torch.zeros(0))) == 0


def test_areas_of_many_labelings_are_those_of_each():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 5, (12, 7), generator=generator).double()
    labels = torch.stack([torch.randperm(12, generator=generator) < 5 for _ in range(4)])
    expected = torch.stack([auroc(scores, row) for row in labels])
    torch.testing.assert_close(auroc_under_permutation(scores, labels), expected, rtol=1e-12, atol=0)
