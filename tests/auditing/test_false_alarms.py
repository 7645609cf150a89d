"""A quantized model whose error is random noise is called "like noise", and one that spares or hits safety features is not."""

import pytest
import torch

from tests import handmade
from tests.handmade import OPTIONS, SAFETY, ReadOut
from tracelens import Audit
from tracelens.precision import matched_noise
from tracelens.precision.sharing import copy_sharing

SEEDS = 40
PROMPTS = handmade.prompts()


@pytest.fixture(scope="module")
def reference():
    return handmade.model()


def with_error(reference, seed: int, size: float = 0.1, safety: float = 1.0):
    """Embeddings that are off at random, with the activation of the safety features scaled on top."""
    error = size * torch.randn(reference.W_E.shape, generator=torch.Generator().manual_seed(seed))
    table = handmade.feature_table()
    table[:, :SAFETY] *= safety
    return copy_sharing(reference, {"embed.W_E": table @ handmade.directions() + error})


def verdict(reference, quantized, seed: int):
    report = (
        Audit(reference, quantized)
        .load_sae({0: ReadOut()})
        .trace_features(PROMPTS, **OPTIONS | {"n_resamples": 1000}, noise_seeds=5, seed=10 * seed)
    )
    return report.verdict


def test_noise_of_the_same_size_is_like_noise(reference):
    quantized = with_error(reference, seed=1)
    relations, claims = [], 0
    for seed in range(SEEDS):
        found = verdict(reference, matched_noise(reference, quantized, seed=1000 + seed), seed)
        relations.append(found.relation)
        claims += found.against_permuted.significant or found.flips_against_noise.significant
    alarms = sum(relation != "like noise" for relation in relations)
    assert alarms <= 0.05 * SEEDS, relations
    assert alarms + claims <= 0.1 * SEEDS


def test_damage_to_safety_features_is_worse_than_noise(reference):
    found = [verdict(reference, with_error(reference, seed, safety=0.3), seed) for seed in range(5)]
    assert [v.relation for v in found] == ["worse than noise of the same size"] * 5
    assert all("is worse than noise of the same size" in v.headline for v in found)


def test_an_error_that_spares_the_safety_features_is_better_than_noise(reference):
    rows = handmade.directions(SAFETY)
    relations = []
    for seed in range(5):
        off = with_error(reference, seed)
        error = off.W_E - reference.W_E
        spared = reference.W_E + error - error @ rows.T @ rows  # nothing along the directions that safety features read
        spared = spared + 0.005 * error
        relations.append(verdict(reference, copy_sharing(reference, {"embed.W_E": spared}), seed).relation)
    assert relations == ["better than noise"] * 5
