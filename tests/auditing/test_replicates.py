"""What one more draw of a random error would give, on each scale."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from tracelens.auditing.replicates import Replicated, further_draw
from tracelens.auditing.verdict import contrast


def drawn(*values: float, n: int = 400, resamples: int = 4000) -> list[Replicated]:
    return [Replicated(float(v), torch.full((resamples,), v, dtype=torch.float64), n) for v in values]


def test_a_further_draw_by_hand():
    """k losses with standard deviation s of their logs: t with k − 1 degrees of freedom × s √(1 + 1/k) around the mean log."""
    losses = np.array([0.05, 0.06, 0.04])
    found = further_draw(drawn(*(1 - losses)), seed=0).estimate
    logs = np.log(losses)
    reach = student.ppf(0.975, 2) * logs.std(ddof=1) * math.sqrt(4 / 3)
    assert found.value == pytest.approx(1 - math.exp(logs.mean()))
    assert found.low == pytest.approx(1 - math.exp(logs.mean() + reach), abs=2e-3)
    assert found.high == pytest.approx(1 - math.exp(logs.mean() - reach), abs=2e-3)


def test_one_draw_alone_tells_no_spread_but_with_others_like_it_does():
    single = further_draw(drawn(0.9), seed=0)
    assert single.value == pytest.approx(0.9)
    assert math.isnan(single.estimate.low)
    alike = drawn(0.8, 0.82, 0.84, 0.83)
    found = further_draw(drawn(0.9), seed=0, alike=alike).estimate
    spread = np.log(1 - np.array([run.value for run in alike])).std(ddof=1) * math.sqrt(2)
    assert found.value == pytest.approx(0.9)
    assert found.low == pytest.approx(1 - 0.1 * math.exp(student.ppf(0.975, 3) * spread), abs=2e-3)


def test_what_was_exactly_preserved_comes_back_so():
    found = further_draw(drawn(1, 1, 1), seed=0)
    assert found.value == 1
    assert (found.replicates == 1).all()
    same = further_draw(drawn(0, 0, 0), seed=0, scale="positive")
    assert same.value == 0
    assert (same.replicates == 0).all()


@pytest.mark.parametrize("scale", ["fidelity", "share", "count"])
def test_shares_stay_shares(scale):
    found = further_draw(drawn(0.99, 0.7, 0.2), seed=0, scale=scale).replicates
    assert 0 <= found.min() < found.max() <= 1


def test_counts_that_never_differed_may_still_differ():
    # No flip in any draw: one flip of 400 is no more than chance, twenty are.
    none = further_draw(drawn(0, 0, 0, 0, 0), seed=0, scale="count")
    assert contrast("noise", drawn(1 / 400)[0], none).p_prompts > 0.3
    assert contrast("noise", drawn(20 / 400)[0], none).p_prompts < 0.05


def test_a_count_without_trials_is_no_number():
    nothing = [Replicated(math.nan, torch.full((10,), torch.nan, dtype=torch.float64), 0)] * 3
    assert math.isnan(further_draw(nothing, seed=0, scale="count").value)


def test_coverage_on_the_scale_of_losses():
    """Losses whose logs are normal: one more lies in the 95 % interval 95 times of 100."""
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(600):
        *values, one_more = 1 - 0.03 * np.exp(0.3 * rng.standard_normal(6))
        found = further_draw(drawn(*values, resamples=500), seed=i).estimate
        inside += found.low <= one_more <= found.high
    assert inside / 600 == pytest.approx(0.95, abs=0.02)
