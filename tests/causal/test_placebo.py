"""Placebos: as large as the patch, in no particular direction, and the same whatever the batches."""

import pytest
import torch

import tracelens
from tests.tiny import TEXTS, write_checkpoint
from tracelens.causal.arms import ArmRunner, OtherRun
from tracelens.causal.patching import cross_precision_patching
from tracelens.causal.placebo import Placebo
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import Function
from tracelens.causal.rerun import Rerunner
from tracelens.errors import UnknownNameError
from tracelens.features.sae_encode import encode
from tracelens.sites import Site

PLAIN = [Site(1, "resid_post"), Site(1, "z"), Site(1, "attn_out")]
SQUARE = [Site(1, "pattern"), Site(2, "attn_scores")]
NEURONS = Site(0, "mlp_post")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models that have nothing in common but their shape."""
    folders = [write_checkpoint(tmp_path_factory.mktemp("placebo") / str(seed), seed=seed) for seed in (0, 1)]
    return [tracelens.load(folder, device="cpu") for folder in folders]


def drawn(pair, texts, sites, kind="displacement", seed=0, which=0):
    """Values of (placebo, source, target) for one batch of prompts."""
    target, other = pair
    prompts = PromptSet.of(texts, target, chat="never")
    batch = prompts.batches(8)[which]
    with torch.no_grad():
        own = Rerunner(target).run(batch.tokens, keep=sites)[1]
        source = OtherRun(Rerunner(other))
        return Placebo(source, kind, seed).values(batch, sites, own), source.values(batch, sites, own), own


@pytest.mark.parametrize("site", PLAIN, ids=str)
def test_a_displacement_of_the_same_length_elsewhere(pair, site):
    random, new, own = (values[site] for values in drawn(pair, TEXTS[:1], [site]))
    torch.testing.assert_close((random - own).norm(dim=-1), (new - own).norm(dim=-1))
    alike = torch.cosine_similarity(random - own, new - own, dim=-1)
    assert alike.mean().abs() < 0.2
    assert alike.abs().max() < 0.95


@pytest.mark.parametrize("site", PLAIN, ids=str)
def test_an_activation_of_the_same_length(pair, site):
    random, new, _ = (values[site] for values in drawn(pair, TEXTS[:1], [site], "activation"))
    torch.testing.assert_close(random.norm(dim=-1), new.norm(dim=-1))
    assert torch.cosine_similarity(random, new, dim=-1).abs().max() < 0.95


@pytest.mark.parametrize("kind", ["displacement", "activation"])
def test_rows_of_patterns_stay_rows(pair, kind):
    random, new, own = drawn(pair, TEXTS[:1], SQUARE, kind)
    pattern = random[SQUARE[0]]
    n = pattern.shape[-1]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    hidden = torch.ones(n, n).triu(1).bool()
    assert (pattern[..., hidden] == 0).all()
    scores = random[SQUARE[1]]
    assert not scores.isnan().any()
    assert torch.equal(scores[..., hidden], own[SQUARE[1]][..., hidden])
    assert scores[..., ~hidden].isfinite().all()
    if kind == "activation":
        torch.testing.assert_close(pattern.sort(-1)[0], new[SQUARE[0]].sort(-1)[0])
        assert not torch.allclose(pattern, new[SQUARE[0]])
    else:
        moved, far = ((values[SQUARE[0]] - own[SQUARE[0]]).norm(dim=-1) for values in (random, new))
        torch.testing.assert_close(moved, far)


def test_a_neuron_is_moved_as_far_as_another_would_be(pair):
    target, other = pair
    random, new, own = (values[NEURONS] for values in drawn(pair, TEXTS[:1], [NEURONS]))
    placebo = Placebo(OtherRun(Rerunner(other)))
    arms = [(Place(NEURONS, None, neuron), Place(Site(1, "z"), None, 2)) for neuron in range(40)]
    moved = placebo.arms(arms, target)
    units = [arm[0].unit for arm in moved]
    assert sorted(units) == list(range(40))
    assert all(unit != neuron for neuron, unit in enumerate(units))
    assert all(arm[1] == arms[0][1] for arm in moved)
    torch.testing.assert_close((random - own).abs()[..., units], (new - own).abs())


def test_noise_depends_on_seed_and_prompt_and_not_on_batches(pair):
    texts = ["the cat sat", "a dog ran", "she heard it"]
    together = drawn(pair, texts, PLAIN)[0]
    for i, site in enumerate(PLAIN):
        assert torch.equal(drawn(pair, texts, PLAIN)[0][site], together[site])
        assert not torch.allclose(drawn(pair, texts, PLAIN, seed=1)[0][site], together[site])
        assert not torch.allclose(together[site], drawn(pair, texts[::-1], PLAIN)[0][site].flip(0))
        assert torch.equal(drawn(pair, texts, [PLAIN[i]])[0][site], together[site])
    metric = lambda logits: logits[:, 5]  # noqa: E731
    options = {"sites": "z", "by": ("head", "position"), "metric": metric, "chat": "never"}
    found = [
        cross_precision_patching(tracelens.PrecisionPair(*pair), [*TEXTS, *texts], batch_size=size, **options)
        for size in (1, 8)
    ]
    torch.testing.assert_close(found[0].placebo, found[1].placebo, rtol=0, atol=1e-5)
    assert (found[0].placebo - found[0].patched).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["displacement", "activation"])
def test_where_nothing_is_moved_neither_is_the_placebo(pair, kind):
    same = (pair[0], pair[0])
    sites = [*PLAIN, *SQUARE, NEURONS]
    random, new, own = drawn(same, TEXTS[:1], sites, kind)
    for site in sites:
        if kind == "displacement":
            torch.testing.assert_close(random[site], own[site])
        else:
            torch.testing.assert_close(random[site].nan_to_num(neginf=0).norm(), new[site].nan_to_num(neginf=0).norm())


def test_a_feature_goes_as_far_along_another_direction(pair):
    target, other = pair
    site = Site(1)
    sae = Sae(torch.randn(12, 32, generator=torch.Generator().manual_seed(0)))
    placebo = Placebo(OtherRun(Rerunner(other)), by_feature=frozenset([site]))
    (astray,) = placebo.saes({site: sae}).values()
    torch.testing.assert_close(astray.W_dec.norm(dim=-1), sae.W_dec.norm(dim=-1))
    assert torch.cosine_similarity(astray.W_dec, sae.W_dec, dim=-1).abs().max() < 0.9
    x = torch.randn(5, 32)
    assert torch.equal(encode(astray, x), encode(sae, x))
    prompts = PromptSet.of(TEXTS[:1], target, chat="never")
    (batch,) = prompts.batches(1)
    with torch.no_grad():
        own = Rerunner(target).run(batch.tokens, keep=[site])[1]
    assert torch.equal(placebo.values(batch, [site], own)[site], placebo.source.values(batch, [site], own)[site])
    arms = [(Place(site, None, feature=i),) for i in range(12)]
    runs = [
        ArmRunner(target, prompts, Function(lambda logits: logits[:, 5]), saes={site: one}).run(arms, source)[1]
        for one, source in ((sae, placebo.source), (astray, placebo))
    ]
    assert (runs[0] - runs[1]).abs().amax(1).gt(1e-4).any()


class Sae:
    def __init__(self, rows):
        self.W_dec = rows

    def encode(self, x):
        return (x @ self.W_dec.T).relu()


def test_unknown_kind(pair):
    with pytest.raises(UnknownNameError, match=r"unknown placebo 'noise'. Known: displacement, activation"):
        Placebo(OtherRun(Rerunner(pair[1])), "noise")


def test_the_placebo_of_a_feature_is_another_move(pair):
    sae = Sae(torch.randn(12, 32, generator=torch.Generator().manual_seed(0)))
    options = {"by": "feature", "saes": {Site(1): sae}, "layers": [1], "chat": "never"}
    found = cross_precision_patching(tracelens.PrecisionPair(*pair), TEXTS, metric=lambda x: x[:, 5], **options)
    assert found.placebo is not None
    patch, placebo = (values - found.start for values in (found.patched, found.placebo))
    moved = patch.abs().amax(1) > 1e-4
    assert moved.any()
    assert (placebo.abs().amax(1)[moved] > 1e-6).all()
    assert ((placebo - patch).abs().amax(1)[moved] > 1e-6).all()
