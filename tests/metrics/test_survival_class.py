import numpy as np
import pytest

from tracelens.errors import MetricInputError
from tracelens.metrics.survival import CLASSES, survival_class, survival_interval

RHO = np.array([1.0, 0.9, 0.8999, 0.5, 0.4999, 0.0, -1.0, np.nan])


def test_thresholds_belong_to_the_better_class():
    expected = ["survived", "survived", "blurred", "blurred", "damaged", "damaged", "damaged", ""]
    assert survival_class(RHO).tolist() == expected


def test_thresholds_are_arguments():
    assert survival_class(RHO, 0.95, 0.95).tolist() == ["survived", *["damaged"] * 6, ""]
    assert set(survival_class(np.linspace(-1, 1, 50), 0.2, -0.2)) == set(CLASSES)


def test_every_feature_has_one_class_and_more_damage_is_never_a_better_one():
    rho = np.sort(np.random.default_rng(0).uniform(-1, 1, 200))
    order = {"damaged": 0, "blurred": 1, "survived": 2}
    ranks = [order[name] for name in survival_class(rho)]
    assert ranks == sorted(ranks)


def test_thresholds_that_cross_are_refused():
    with pytest.raises(MetricInputError, match=r"damaged_at is 0\.9 and survived_at 0\.5; expected damaged_at ≤"):
        survival_class(RHO, 0.5, 0.9)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, n, runs = 0.6, 50, 2000
    x = rng.standard_normal((runs, n))
    y = truth * x + np.sqrt(1 - truth**2) * rng.standard_normal((runs, n))
    rho = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)])
    low, high = survival_interval(rho, np.full(runs, n))
    assert ((low <= truth) & (truth <= high)).mean() == pytest.approx(0.95, abs=0.02)


def test_intervals_of_little_and_of_perfection():
    low, high = survival_interval(np.array([0.5, 0.5, 1.0, np.nan]), np.array([3, 4, 100, 100]))
    assert (low[0], high[0]) == (-1, 1)
    assert low[1] < 0 < 0.9 < high[1]
    assert (low[2], high[2]) == (1, 1)
    assert np.isnan([low[3], high[3]]).all()
