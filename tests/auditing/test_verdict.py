"""What the verdict calls significant, on moments whose truth is known."""

import math

import pytest
import torch
from torch import Tensor

from tracelens.auditing.preservation import bootstrap_cpfr
from tracelens.auditing.random_sets import matched_members, mean_of_members
from tracelens.auditing.replicates import Replicated, further_draw
from tracelens.auditing.verdict import (
    RANDOM_COMPARISONS,
    SINGLE_DRAW,
    UNMATCHED,
    Contrast,
    contrast,
    judge,
    two_sided_rank,
)
from tracelens.metrics.cpfr import cpfr, fidelity
from tracelens.metrics.moments import FeatureMoments, MomentAccumulator
from tracelens.stats import Estimate, bootstrap_weights

PROMPTS, TOKENS, FEATURES, SAFETY = 30, 8, 60, 15
WEIGHTS = bootstrap_weights(PROMPTS, 200, seed=0)
BLOCK = torch.arange(PROMPTS).repeat_interleave(TOKENS)


def reference(generator) -> Tensor:
    shape = (PROMPTS * TOKENS, FEATURES)
    return torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)


def disturbed(r: Tensor, generator, spread: float = 0.2) -> Tensor:
    """A draw of error: each feature is disturbed to a degree of its own, and loses some of its scale."""
    degree = spread * torch.rand(FEATURES, generator=generator)
    noise = 1 + degree * torch.randn(r.shape, generator=generator)
    return (r * (1 - degree * torch.rand(FEATURES, generator=generator)) * noise).clamp(min=0)


def moments(r: Tensor, q: Tensor) -> FeatureMoments:
    return MomentAccumulator(FEATURES, PROMPTS).update(r, q, BLOCK).finalize()


def labels(generator) -> dict[str, Tensor]:
    mask = torch.zeros(FEATURES, dtype=torch.bool)
    mask[torch.randperm(FEATURES, generator=generator)[:SAFETY]] = True
    return {"safety": mask, "capability": ~mask}


def compared(m: FeatureMoments, sets: dict[str, Tensor]) -> Contrast:
    runs = bootstrap_cpfr(m, sets, WEIGHTS, PROMPTS)
    total = m.total()
    site = torch.zeros(FEATURES, dtype=torch.long)
    members = matched_members(total.n_ref[0], site, sets["safety"], sets["capability"], with_own=True, n_sets=400)
    p = two_sided_rank(runs["safety"].value, mean_of_members(fidelity(total)[0], members))
    return contrast("capability", runs["safety"], runs["capability"], p)


def against_noise(variant: FeatureMoments, draws: list[FeatureMoments], sets: dict[str, Tensor]) -> Contrast:
    safety, *noise = (bootstrap_cpfr(m, sets, WEIGHTS, PROMPTS)["safety"] for m in (variant, *draws))
    return contrast("noise", safety, further_draw(noise, seed=0), n_comparisons=RANDOM_COMPARISONS)


def test_labels_at_random_are_seldom_called_significant():
    generator = torch.Generator().manual_seed(0)
    r = reference(generator)
    m = moments(r, disturbed(r, generator))
    called = sum(compared(m, labels(generator)).significant for _ in range(200))
    assert called <= 20  # 10 % of 200


@pytest.fixture(scope="module")
def simulated():
    """A reference, its sets, and 240 draws of error."""
    generator = torch.Generator().manual_seed(1)
    r = reference(generator)
    return labels(generator), [moments(r, disturbed(r, generator)) for _ in range(240)]


@pytest.mark.parametrize("k", [3, 5])
def test_one_more_draw_of_noise_is_seldom_called_significant(simulated, k):
    sets, pool = simulated
    generator = torch.Generator().manual_seed(2)
    runs = [bootstrap_cpfr(m, sets, WEIGHTS, PROMPTS)["safety"] for m in pool]
    alone, corrected = 0, 0
    for i in range(1000):
        variant, *draws = (runs[j] for j in torch.randperm(len(runs), generator=generator)[: k + 1].tolist())
        found = contrast("noise", variant, further_draw(draws, seed=i), n_comparisons=RANDOM_COMPARISONS)
        alone += found.p_prompts / RANDOM_COMPARISONS < 0.05
        corrected += found.significant
    # Alone each comparison keeps its 5 %; corrected for the three that a verdict makes, less than a third.
    assert alone <= 65, alone
    assert corrected <= 27, corrected


def test_of_40_verdicts_on_noise_at_most_2_are_something_else(simulated):
    sets, pool = simulated
    runs = [bootstrap_cpfr(m, sets, WEIGHTS, PROMPTS) for m in pool]
    relations = []
    for i in range(40):
        ours, *draws = runs[6 * i : 6 * i + 6]
        noise = further_draw([run["safety"] for run in draws], seed=i)
        relations.append(
            judge(
                contrast("capability", ours["safety"], ours["capability"], 1.0),
                contrast("noise", ours["safety"], noise, n_comparisons=RANDOM_COMPARISONS),
                ours["safety"].estimate,
                "INT4",
            ).relation
        )
    assert relations.count("like noise") >= 38, relations


def test_a_shuffle_is_compared_by_the_spread_of_noise(simulated):
    sets, pool = simulated
    generator = torch.Generator().manual_seed(3)
    runs = [bootstrap_cpfr(m, sets, WEIGHTS, PROMPTS)["safety"] for m in pool]
    called = 0
    for i in range(1000):
        variant, shuffle, *draws = (runs[j] for j in torch.randperm(len(runs), generator=generator)[:7].tolist())
        called += contrast(
            "permuted error", variant, further_draw([shuffle], seed=i, alike=draws), n_comparisons=RANDOM_COMPARISONS
        ).significant
    assert called <= 27, called


def test_damage_to_safety_features_is_called():
    generator = torch.Generator().manual_seed(2)
    r, sets = reference(generator), labels(generator)
    q = disturbed(r, generator)
    q[:, sets["safety"]] *= 0.5
    found = compared(moments(r, q), sets)
    assert found.significant
    assert found.difference.value < -0.3
    noise = against_noise(moments(r, q), [moments(r, disturbed(r, generator)) for _ in range(5)], sets)
    assert noise.significant
    verdict = judge(found, noise, Estimate(0.5, 0.4, 0.6), "INT4")
    assert verdict.safety_worse_than_capability
    assert verdict.safety_worse_than_noise
    assert verdict.headline == "To the safety features, INT4 is worse than noise of the same size"
    assert "Safety features suffered more than capability features in INT4." in verdict.text


def test_features_that_are_spared_are_better_off_than_under_noise():
    generator = torch.Generator().manual_seed(9)
    r, sets = reference(generator), labels(generator)
    q = disturbed(r, generator)
    q[:, sets["safety"]] = 0.999 * r[:, sets["safety"]]
    noise = against_noise(moments(r, q), [moments(r, disturbed(r, generator)) for _ in range(5)], sets)
    verdict = judge(compared(moments(r, q), sets), noise, Estimate(0.99, 0.98, 1.0), "INT4")
    assert verdict.relation == "better than noise"
    assert verdict.headline == "To the safety features, INT4 is better than noise"


def test_damage_to_capability_features_is_called_less():
    generator = torch.Generator().manual_seed(3)
    r, sets = reference(generator), labels(generator)
    q = disturbed(r, generator)
    q[:, sets["capability"]] *= 0.5
    found = compared(moments(r, q), sets)
    verdict = judge(found, None, Estimate(0.9, 0.8, 1.0), "INT4")
    assert found.significant
    assert not verdict.safety_worse_than_capability
    assert verdict.headline == "Safety features suffered less than capability features in INT4"


def replicated(value: float, spread: float = 0.001) -> Replicated:
    noise = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(round(value * 10_000)))
    return Replicated(value, value + spread * noise, 10)


@pytest.mark.parametrize(
    ("other", "p_features", "significant"),
    [(0.9, 0.01, True), (0.9, 0.2, False), (0.8005, 0.01, False), (0.9, None, True)],
)
def test_both_sources_of_chance_have_to_be_passed(other, p_features, significant):
    found = contrast("capability", replicated(0.8), replicated(other), p_features)
    assert found.significant == significant


def test_one_bad_feature_of_few_is_not_called():
    # Certain over prompts, and yet it may be luck which feature carries the label.
    generator = torch.Generator().manual_seed(4)
    r = reference(generator)
    q = r.clone()
    q[:, 0] *= 0.3
    sets = {"safety": torch.arange(FEATURES) < 1, "capability": torch.arange(FEATURES) >= 1}
    found = compared(moments(r, q), sets)
    assert found.p_prompts < 0.05
    assert found.p_features > 0.05
    assert not found.significant


def test_replicates_are_cpfrs_of_the_resampled_prompts():
    generator = torch.Generator().manual_seed(5)
    r = reference(generator)
    r[:, 7] = 0  # a feature that never fires, and one that some resamples miss
    r[:, 8] = 0
    r[0, 8] = 1
    m, sets = moments(r, disturbed(r, generator)), labels(generator)
    for name, run in bootstrap_cpfr(m, sets, WEIGHTS, PROMPTS).items():
        assert run.value == pytest.approx(cpfr(m.total(), mask=sets[name]).item(), rel=1e-12)
        expected = cpfr(m.resample(WEIGHTS), mask=sets[name])
        torch.testing.assert_close(run.replicates, expected, rtol=1e-12, atol=0)


def test_the_same_activations_give_exactly_1():
    r = reference(torch.Generator().manual_seed(6))
    for run in bootstrap_cpfr(moments(r, r), labels(torch.Generator().manual_seed(6)), WEIGHTS, PROMPTS).values():
        assert run.value == 1
        assert (run.replicates == 1).all()
        further = further_draw([run, run, run], seed=0)
        assert (further.value, further.estimate.low) == (1, 1)


def test_an_empty_set_has_no_cpfr_and_no_verdict():
    r = reference(torch.Generator().manual_seed(7))
    sets = {"safety": torch.zeros(FEATURES, dtype=torch.bool), "capability": torch.ones(FEATURES, dtype=torch.bool)}
    m = moments(r, 0.9 * r)
    runs = bootstrap_cpfr(m, sets, WEIGHTS, PROMPTS)
    assert math.isnan(runs["safety"].value)
    found = compared(m, sets)
    assert not found.significant
    verdict = judge(found, None, runs["safety"].estimate, "INT4")
    assert verdict.headline == "No safety features were found, so nothing can be said about them"


def test_two_sided_rank_by_hand():
    null = torch.arange(1, 100, dtype=torch.float64)
    assert two_sided_rank(0.0, null) == pytest.approx(2 / 100)
    assert two_sided_rank(3.0, null) == pytest.approx(2 * 4 / 100)
    assert two_sided_rank(50.0, null) == 1
    assert two_sided_rank(5.0, torch.full((99,), 5.0, dtype=torch.float64)) == 1


def test_sentences_begin_with_a_capital():
    c = contrast("capability", replicated(0.8), replicated(0.9), 0.5)
    bare = judge(c, None, Estimate(0.8, 0.7, 0.9), "the quantized model")
    assert (
        bare.headline
        == "No evidence that safety features suffered more than capability features in the quantized model"
    )
    assert bare.relation is None
    whole = judge(c, None, Estimate(1.0, 1.0, 1.0), "the quantized model")
    assert whole.text == "The quantized model left every safety feature as it was."


def test_every_contrast_has_its_sentence():
    c = contrast("capability", replicated(0.8), replicated(0.9), 0.01)
    worse = contrast("noise", replicated(0.8), replicated(0.9), n_comparisons=3)
    like = contrast("noise", replicated(0.8, 0.1), replicated(0.81, 0.1), n_comparisons=3)
    more = contrast("noise", replicated(0.3), replicated(0.1), n_comparisons=3)
    verdict = judge(
        c,
        worse,
        Estimate(0.8, 0.7, 0.9),
        "INT4",
        against_permuted=like,
        flips_against_noise=more,
        kl_against_noise=more,
    )
    assert verdict.text.startswith("To the safety features, INT4 is worse than noise of the same size. ")
    for said in (
        "Their CPFR minus that under noise: difference -0.100",
        "Safety features suffered more than capability features in INT4. Safety against capability features: difference -0.100",
        "The same error shuffled within rows does as much to them, as far as can be told",
        "INT4 flips more decisions than noise (+20.0 percentage points",
        "corrected for 3 comparisons",
    ):
        assert said in verdict.text
    assert verdict.safety_worse_than_noise


def test_without_a_fair_comparison_there_is_no_relation():
    c = contrast("capability", replicated(0.8), replicated(0.9), 0.01)
    single = contrast("noise", replicated(0.8), further_draw([replicated(0.9)], seed=0))
    found = judge(c, single, Estimate(0.8, 0.7, 0.9), "INT4")
    assert found.relation is None
    assert SINGLE_DRAW in found.text
    other = contrast("noise", replicated(0.8), replicated(0.9))
    found = judge(c, other, Estimate(0.8, 0.7, 0.9), "INT8-A8", flips_against_noise=other, noise_matches=False)
    assert found.relation is None
    assert UNMATCHED in found.text
    assert "flips" not in found.text


def test_correction_for_several_comparisons():
    one = contrast("noise", replicated(0.8, 0.05), replicated(0.9, 0.05))
    three = contrast("noise", replicated(0.8, 0.05), replicated(0.9, 0.05), n_comparisons=3)
    assert three.p_prompts == pytest.approx(min(1, 3 * one.p_prompts))
    assert three.difference == one.difference


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_few_prompts_prove_nothing_however_alike_they_are(n):
    safety, capability = (Replicated(x, torch.full((1000,), x, dtype=torch.float64), n) for x in (0.4, 0.9))
    found = contrast("capability", safety, capability, p_features=0.001)
    assert found.p_prompts == pytest.approx(max(2 / 1001, 2.0 ** (1 - n)), rel=0.01)
    assert found.significant == (n > 5)


def test_next_to_nothing_is_not_nothing():
    safety = Replicated(0.9995, torch.full((100,), 0.9995, dtype=torch.float64), 30)
    against = contrast("capability", safety, safety)
    assert "left every safety feature as it was" not in judge(against, None, safety.estimate, "INT8").headline
    assert judge(against, None, Estimate(1.0, 1.0, 1.0, 30, "bootstrap"), "INT8").headline == (
        "INT8 left every safety feature as it was"
    )
