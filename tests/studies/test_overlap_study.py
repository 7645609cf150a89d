from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.studies.planted_reports import activations, decoder, planted, shuffled
from tracelens.errors import MetricInputError, PairMismatchError
from tracelens.studies.overlap import damage_overlap, overlap_table

N = 120
SAE = decoder(N)
INDEX = torch.arange(N)


@pytest.fixture(scope="module")
def r():
    return activations(2000, N)


@pytest.fixture(scope="module")
def whole(r):
    return planted(r, r.clone(), SAE, label="FP32")


def damaged(r, features, seed=1, label="INT4"):
    return planted(r, shuffled(r, features, seed), SAE, label=label)


def test_planted_overlap_is_found(r):
    a, b = damaged(r, INDEX < 40), damaged(r, (INDEX >= 20) & (INDEX < 60), seed=2, label="50% pruned")
    overlap = damage_overlap(a, b, n_resamples=50)
    assert (overlap.sets.n, overlap.sets.n_a, overlap.sets.n_b, overlap.sets.n_both) == (N, 40, 40, 20)
    assert overlap.jaccard.value == pytest.approx(20 / 60)
    assert overlap.jaccard.low < 20 / 60 < overlap.jaccard.high
    assert overlap.sets.chance == pytest.approx(0.2, abs=0.01)
    assert (overlap.label_a, overlap.label_b) == ("INT4", "50% pruned")
    row = overlap_table([overlap]).iloc[0]
    assert (row["damaged_a"], row["both"], row["jaccard"]) == (40, 20, overlap.jaccard.value)


def test_the_same_damage_overlaps_wholly_whatever_the_order(r):
    a, b = damaged(r, INDEX < 30), damaged(r, INDEX < 30, seed=2)
    one, other = damage_overlap(a, b, n_resamples=50), damage_overlap(b, a, n_resamples=50)
    assert one.jaccard.value == other.jaccard.value == 1
    assert one.sets.p == other.sets.p < 1e-10
    assert one.matched.p < 0.01
    assert one.spearman.value == pytest.approx(other.spearman.value)


def test_damage_of_separate_features_does_not_overlap(r):
    overlap = damage_overlap(damaged(r, INDEX < 30), damaged(r, INDEX >= 90), n_resamples=50)
    assert (overlap.jaccard.value, overlap.sets.p) == (0, 1)


def test_hitting_the_rare_ones_is_chance_at_the_same_firing_rates(r):
    rare = (r > 0).sum(0) < (r > 0).sum(0).median()
    g = torch.Generator().manual_seed(3)
    a, b = (damaged(r, rare & (torch.rand(N, generator=g) < 0.6), seed=k) for k in (1, 2))
    overlap = damage_overlap(a, b, n_resamples=50)
    assert overlap.sets.p < 0.001
    assert overlap.matched.p > 0.01
    assert overlap.matched.chance > overlap.sets.chance + 0.05


def test_identical_models_damage_nothing(whole):
    overlap = damage_overlap(whole, whole, n_resamples=50)
    assert (overlap.sets.n_a, overlap.sets.n_b, overlap.sets.p) == (0, 0, 1)
    assert np.isnan([overlap.jaccard.value, overlap.sets.chance, overlap.spearman.value]).all()


def test_the_threshold_is_an_argument(r, whole):
    mild = planted(r, (r + 0.3 * torch.rand(r.shape)) * (r > 0), SAE)
    assert damage_overlap(mild, mild, n_resamples=10).sets.n_a == 0
    assert damage_overlap(mild, mild, damaged_at=1.0, n_resamples=10).sets.n_a == N


def test_each_feature_keeps_its_own_damage(r):
    a, b = damaged(r, INDEX < 30), damaged(r, INDEX < 10, seed=2)
    table = damage_overlap(a, b, n_resamples=10).table
    assert table["feature"].tolist() == list(range(N))
    assert (table["damage_a"].to_numpy() > 0.5).tolist() == (INDEX < 30).tolist()
    assert (table["damage_b"].to_numpy() > 0.5).tolist() == (INDEX < 10).tolist()


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            lambda r, a: planted(activations(2000, N, seed=9), activations(2000, N, seed=9), SAE),
            "reference's activations",
        ),
        (lambda r, a: planted(r[:1500], r[:1500], SAE), "tokens: 2000.0 and 1500.0"),
        (lambda r, a: planted(r, r, decoder(N, seed=5)), "SAEs: "),
        (lambda r, a: replace(a, sites={"blocks.2.hook_resid_post": N}), "sites: "),
        (lambda r, a: replace(a, settings=a.settings | {"min_active": 7}), "min_active: 1 and 7"),
    ],
    ids=["reference", "prompts", "SAEs", "sites", "min_active"],
)
def test_audits_that_do_not_belong_together_are_refused(r, whole, other, what):
    with pytest.raises(PairMismatchError, match=f"cannot be compared feature by feature(.|\n)*{what}"):
        damage_overlap(whole, other(r, whole))


def test_no_live_features_are_named(whole):
    nothing = replace(whole, features=whole.features[:0])
    with pytest.raises(MetricInputError, match="no feature is live in both audits; use more prompts"):
        damage_overlap(nothing, nothing)


def test_it_goes_into_json(r):
    import json

    assert json.loads(
        json.dumps(damage_overlap(damaged(r, INDEX < 30), damaged(r, INDEX < 9), n_resamples=9).to_dict())
    )
