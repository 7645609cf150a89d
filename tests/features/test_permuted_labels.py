import pytest
import torch

from tracelens.features.maxima import Maxima
from tracelens.features.permuted_labels import permuted_fingerprints
from tracelens.features.selection import check_prompts, half, select_features
from tracelens.sites import Site
from tracelens.stats import auroc

SITES = [Site(0), Site(2)]
N, FEATURES = 60, 50
LABELS = ["refusal"] * N + ["warning"] * N + [None] * N
IDS = [f"prompt {i}" for i in range(3 * N)]


@pytest.fixture(scope="module")
def maxima():
    generator = torch.Generator().manual_seed(0)
    values = {site: torch.rand(3 * N, FEATURES, generator=generator) for site in SITES}
    values[SITES[0]][:N, :4] += (
        2  # four features of refusal, one of warning, at the first site; one of refusal at the second
    )
    values[SITES[0]][N : 2 * N, 9] += 2
    values[SITES[1]][:N, 0] += 2
    return values


@pytest.fixture(scope="module")
def features(maxima):
    return select_features(maxima, LABELS, ids=IDS)


ALL = {site: torch.ones(FEATURES, dtype=torch.bool) for site in SITES}


def permuted(maxima, features, among=ALL, n=50, seed=0):
    return permuted_fingerprints(maxima, LABELS, ids=IDS, features=features, among=among, n_permutations=n, seed=seed)


def test_as_many_features_of_each_site_as_the_true_fingerprint_holds(maxima, features):
    assert len(features) == 6
    for found in permuted(maxima, features):
        # A feature that is chosen for both behaviours comes once.
        assert 4 <= len(found[SITES[0]]) <= 5
        assert len(found[SITES[1]]) == 1
        assert len(set(found[SITES[0]].tolist())) == len(found[SITES[0]])


def test_shuffled_labels_find_no_safety_features_more_often_than_others(maxima, features):
    chosen = torch.cat([found[SITES[0]] for found in permuted(maxima, features, n=200)])
    share = torch.isin(chosen, torch.tensor([0, 1, 2, 3])).double().mean().item()
    assert share < 3 * 4 / FEATURES


def test_what_is_chosen_is_what_the_same_selection_puts_first(maxima, features):
    """Labels that are not shuffled at all, as a permutation may leave them, give the true features."""
    refusal = [row for row in features if row.behaviour == "refusal" and row.site == SITES[0]]
    baseline, sides = check_prompts(LABELS, IDS)
    reached = torch.stack(
        [
            auroc(maxima[SITES[0]][rows], is_safety)
            for rows, is_safety in (half(sides["refusal"], baseline, 0.5, h) for h in (False, True))
        ]
    ).amin(0)
    assert set(reached.topk(4).indices.tolist()) == {row.feature for row in refusal} == {0, 1, 2, 3}


def test_only_live_features_are_counted_and_chosen(maxima, features):
    live = {site: torch.arange(FEATURES) % 2 == 0 for site in SITES}
    for found in permuted(maxima, features, live):
        # Of the five at the first site two of refusal are live, and that of warning is not.
        assert len(found[SITES[0]]) == 2
        assert (found[SITES[0]] % 2 == 0).all()


def test_sparse_maxima_and_the_seed(maxima, features):
    sparse = {site: Maxima.of(values) for site, values in maxima.items()}

    def plain(found):
        return [{site: members.tolist() for site, members in one.items()} for one in found]

    assert plain(permuted(sparse, features)) == plain(permuted(maxima, features))
    assert plain(permuted(maxima, features, seed=1)) != plain(permuted(maxima, features))


@pytest.mark.parametrize("fault", ["one half only", "rounding"])
def test_a_feature_must_tell_them_apart_on_both_halves_by_more_than_rounding(fault, monkeypatch):
    """With labels left as they are: feature 1 tells most prompts apart, feature 0 all of them, but only on one half or by rounding."""
    generator = torch.Generator().manual_seed(0)
    refusal = torch.tensor([label == "refusal" for label in LABELS])
    values = torch.rand(3 * N, 3, generator=generator)
    baseline, sides = check_prompts(LABELS, IDS)
    rows, _ = half(sides["refusal"], baseline, 0.5, held_out=False)
    values[:, 0] = 1
    values[rows, 0] += refusal[rows].float() * (1e-6 if fault == "rounding" else 1)
    if fault == "rounding":
        values[:, 0] = 1 + 1e-6 * refusal.float()
    values[:, 1] += 0.8 * refusal
    monkeypatch.setattr("tracelens.features.permuted_labels._shuffled", lambda labels, n, rng: labels.expand(n, -1))
    clear = {SITES[0]: values.clone()}
    clear[SITES[0]][:, 2] += 2 * refusal
    (truth,) = [row for row in select_features(clear, LABELS, ids=IDS) if row.feature == 2]
    found = permuted_fingerprints(
        {SITES[0]: values},
        LABELS,
        ids=IDS,
        features=[truth],
        among={SITES[0]: torch.ones(3, dtype=torch.bool)},
        n_permutations=1,
    )
    assert found[0][SITES[0]].tolist() == [1]
