"""Normalised effects: what they are by hand, and what they say where there is nothing to say."""

import math

import pytest
import torch

from tracelens.causal.effects import effects, per_prompt, versus
from tracelens.errors import MetricInputError


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_nothing_is_0_and_everything_1_whatever_the_signs():
    start, goal = rows(0.0, 1.0, 2.0), rows(1.0, -1.0, 2.5)
    found = effects(torch.stack([start, goal, (start + goal) / 2]), start, goal)
    assert [e.value for e in found.effect] == pytest.approx([0, 1, 0.5])
    for estimate, value in zip(found.effect, (0, 1, 0.5), strict=True):
        assert (estimate.low, estimate.high) == pytest.approx((value, value))
    assert [e.value for e in found.closed] == pytest.approx([0, 1, 0.75])
    assert found.change[1].value == pytest.approx((1 + 2 + 0.5) / 3)
    assert found.n_usable == found.n_prompts == 3


def test_going_too_far_and_moving_at_random_close_nothing():
    start, goal = rows(0.0, 0.0), rows(1.0, 1.0)
    found = effects(torch.stack([rows(3.0, 3.0), rows(2.0, 0.0)]), start, goal)
    assert [e.value for e in found.effect] == pytest.approx([3, 1])
    assert [e.value for e in found.closed] == pytest.approx([-3, 0])
    assert found.closed[1].low == found.closed[1].high == pytest.approx(0)


def test_weighted_by_the_square_of_the_difference():
    start, goal = rows(0.0, 0.0), rows(1.0, 3.0)
    found = effects(rows(1.0, 0.0)[None], start, goal)
    assert found.effect[0].value == pytest.approx(1 / 10)
    assert found.ratio_of_means[0].item() == pytest.approx(0.5 / 2)
    assert per_prompt(rows(1.0, 0.0)[None], start, goal).tolist() == [[1.0, 0.0]]


def test_a_denominator_near_zero_is_counted_and_not_divided_by():
    start, goal = rows(0.0, 5.0, 1.0), rows(2.0, 5.0 + 1e-6, 1.0)
    patched = rows(1.0, 9.0, -7.0)[None]
    found = effects(patched, start, goal)
    assert found.effect[0].value == pytest.approx(0.5)
    assert (found.n_usable, found.n_prompts) == (1, 3)
    alone = per_prompt(patched, start, goal)[0]
    assert alone[0].item() == 0.5
    assert alone[1:].isnan().all()


def test_equal_runs_have_no_effect_to_speak_of():
    same = rows(1.0, 2.0)
    found = effects(torch.stack([same, same + 1]), same, same)
    assert all(math.isnan(e.value) for e in found.effect + found.closed + found.change)
    assert found.p_value.isnan().all()
    assert found.n_usable == 0
    assert versus(same[None], same[None], same, same).isnan().all()


def test_a_mean_difference_near_zero_has_no_ratio_of_means():
    start, goal = rows(0.0, 0.0), rows(1.0, -1.0 + 1e-5)
    found = effects(torch.stack([goal, rows(1.0, 0.0)]), start, goal)
    assert found.ratio_of_means.isnan().all()
    assert found.effect[0].value == pytest.approx(1)


def test_p_and_interval_follow_the_prompts():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=generator, dtype=torch.float64)
    goal = start + torch.randn(200, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 200, generator=generator, dtype=torch.float64)
    patched = torch.stack([start + 0.3 * (goal - start) + 0.05 * noise[0], start + 0.2 * noise[1]])
    found = effects(patched, start, goal)
    assert found.effect[0].low < 0.3 < found.effect[0].high
    assert found.effect[1].low < 0 < found.effect[1].high
    assert found.p_value[0] < 1e-3 < 0.05 < found.p_value[1]
    p = versus(patched, patched.flip(0), start, goal)
    assert p[0] == p[1] < 1e-3


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(100):
        d = torch.randn(60, generator=generator, dtype=torch.float64)
        n = 0.5 * d + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64)
        found = effects(n[None], torch.zeros_like(d), d, n_resamples=200, n_permutations=10).effect[0]
        covered += found.low <= 0.5 <= found.high
    assert 85 <= covered <= 100


def test_no_arms_and_bad_numbers():
    start, goal = rows(0.0, 0.0), rows(1.0, 3.0)
    assert effects(torch.zeros(0, 2, dtype=torch.float64), start, goal).effect == []
    with pytest.raises(MetricInputError, match="goal metrics hold NaN or infinity"):
        effects(start[None], start, rows(1.0, math.nan))


def test_of_one_prompt_no_interval_can_be_said():
    found = effects(rows(1.0, 7.0)[None], rows(0.0, 7.0), rows(2.0, 7.0))
    assert found.effect[0].value == pytest.approx(0.5)
    for estimate in (*found.effect, *found.closed, *found.change):
        assert estimate.n == 1
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)


def test_nothing_is_never_divided_by():
    start, goal = rows(1.0, 2.0), rows(1.0, 3.0)
    patched = rows(5.0, 2.5)[None]
    found = effects(patched, start, goal, min_difference=0.0)
    assert found.n_usable == 1
    assert found.effect[0].value == pytest.approx(0.5)
    assert per_prompt(patched, start, goal, min_difference=0.0)[0].isnan().tolist() == [True, False]
    assert effects(patched, start, start, min_difference=0.0).p_value.isnan().all()


def test_a_placebo_is_compared_towards_the_goal_and_where_there_is_one():
    """As far towards goals of either sign, and a wild prompt of next to no difference, that must not count."""
    n = 12
    sign = torch.tensor([1.0, -1.0] * (n // 2), dtype=torch.float64)
    start = torch.zeros(n + 1, dtype=torch.float64)
    goal = torch.cat([sign, torch.full((1,), 1e-6, dtype=torch.float64)])
    patched = torch.cat([0.5 * sign, torch.full((1,), -100.0, dtype=torch.float64)])
    assert versus(patched[None], start[None], start, goal).item() < 0.01
    assert versus(patched[None], start[None], start, goal, min_difference=2.0).isnan().all()
