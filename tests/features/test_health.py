"""Health of SAEs: numbers by hand, planted breakages on one side or both, and what is not a breakage."""

import json
import math
import re

import pytest
import torch

from tests import handmade
from tests.features.test_saes import Duck, make_sae
from tests.tiny import TEXTS
from tracelens import Site, load, load_saes
from tracelens.errors import PairMismatchError, ResultFileError, SAEError, UnknownNameError
from tracelens.features import HealthThresholds, SAEHealth, sae_health
from tracelens.features.sae_fit import Spliced, measure_fit
from tracelens.organism.sae_card import heldout_texts
from tracelens.pair import stream_aligned
from tracelens.precision import apply_precision
from tracelens.precision.sharing import copy_sharing

SITES = (Site(1), Site(3))


@pytest.fixture(scope="module")
def saes() -> dict:
    return load_saes("organism", sites=SITES)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return heldout_texts(60)


def scaled(model, factor: float):
    """The same model to all that its norms read and to its logits: what is written to the residual stream is larger."""
    changes = {"embed.W_E": model.W_E * factor}
    for i in range(model.cfg.n_layers):
        block = dict(model.blocks[i].named_parameters())
        names = [name for name in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out") if name in block]
        changes |= {f"blocks.{i}.{name}": block[name].detach() * factor for name in names}
    return copy_sharing(model, changes)


def rotated(sae):
    """An SAE whose features read and write other directions."""
    turn = torch.linalg.qr(
        torch.randn(sae.W_dec.shape[1], sae.W_dec.shape[1], generator=torch.Generator().manual_seed(0))
    )[0]
    other = type(sae)(sae.cfg)
    other.load_state_dict({**sae.state_dict(), "W_enc": turn @ sae.W_enc, "W_dec": sae.W_dec @ turn.T})
    return other.eval().requires_grad_(False)


class ReadOut(handmade.ReadOut):
    def decode(self, features):
        return features @ self.W_dec


@pytest.fixture(scope="module")
def by_hand():
    model = handmade.model()
    prompts = [" ".join(handmade.PLAIN[i : i + 3 + i % 3]) for i in range(12)]
    return model, prompts


def test_numbers_by_hand(by_hand):
    """The residual stream holds the embeddings, which the SAE reconstructs but for what lies outside its directions."""
    model, prompts = by_hand
    health = sae_health((model, model), {Site(0): ReadOut()}, prompts)
    fit = health.sites["blocks.0.hook_resid_post"].reference
    words = [handmade.TOKEN[word] for prompt in prompts for word in prompt.split()]
    table = handmade.feature_table()[words]
    x = model.W_E[words].double()
    output = table.double() @ handmade.directions().double()
    expected = 1 - (x - output).square().sum() / (x - x.mean(0)).square().sum()
    assert fit.explained_variance.value == pytest.approx(expected.item(), abs=1e-6)
    assert fit.l0.value == pytest.approx((table > 0).sum(1).double().mean().item())
    assert fit.dead == pytest.approx((table == 0).all(0).double().mean().item())
    assert health.tokens == len(words)
    logits = model(torch.tensor([[2, *words[:3]]]))[0, 1:3].log_softmax(-1)
    first = -logits[torch.arange(2), torch.tensor(words[1:3])].sum()
    (alone,) = measure_fit(model, {Site(0): ReadOut()}, prompts[:1]).values()
    assert alone.nll.sum().item() == pytest.approx(first.item(), rel=1e-5)
    assert alone.n_targets.sum() == 2


def test_zero_ablation_leaves_the_unembedding_of_nothing(by_hand):
    model, prompts = by_hand
    (fit,) = measure_fit(model, {Site(1): ReadOut()}, prompts).values()
    uniform = -model.b_U.double().log_softmax(-1)
    targets = [handmade.TOKEN[word] for prompt in prompts for word in prompt.split()[1:]]
    assert fit.nll_ablated.sum().item() == pytest.approx(uniform[targets].sum().item(), rel=1e-5)


def test_healthy_saes_have_the_numbers_of_their_card(organism, saes, texts):
    health = sae_health((organism, organism), saes, texts, n_resamples=200)
    card = {"blocks.1.hook_resid_post": (0.994, 35.5), "blocks.3.hook_resid_post": (0.998, 35.4)}
    assert health.ok()
    assert health.ok(Site(1))
    assert health.broken == []
    for site, (variance, l0) in card.items():
        fit = health.sites[site].reference
        assert fit.explained_variance.value == pytest.approx(variance, abs=0.003)
        assert fit.l0.value == pytest.approx(l0, abs=3)
        assert fit.cross_entropy_recovered.value == pytest.approx(1, abs=0.01)
        assert fit.bias.value == pytest.approx(1, abs=0.02)
        assert fit.explained_variance.low <= fit.explained_variance.value <= fit.explained_variance.high
        same = health.sites[site]
        assert same.reference == same.quantized
        assert (same.l0_change.low, same.l0_change.value, same.l0_change.high) == (0, 0, 0)


def test_a_ruler_that_broke_is_not_a_model_that_did(organism, saes, texts):
    """A residual stream three times as large is the same model to every norm, and another to the SAE."""
    other = scaled(organism, 3.0)
    health = sae_health((organism, other), saes, texts, names=("the reference", "INT2"), n_resamples=200)
    assert not health.ok()
    for site in map(str, SITES):
        before, after = health.sites[site].reference, health.sites[site].quantized
        assert before.explained_variance.value > 0.98
        assert after.cross_entropy == pytest.approx(before.cross_entropy, abs=1e-3)
        assert health.sites[site].explained_variance_change.high < 0
        assert after.l0.low > 2 * before.l0.high
    assert len(health.broken) == len(SITES)
    assert re.search(
        r"the SAE at blocks\.1\.\S+ fires 1\d\d\.\d features a token in INT2 against 3\d\.\d in", health.broken[0]
    )
    assert health.broken[0].endswith("drift there is the ruler's as well as the model's")


def test_a_model_that_writes_beside_the_saes_directions(organism, saes, texts):
    """Noise in what one layer writes: the SAEs there and after it explain less, the one before is as it was."""
    weight = organism.blocks[2].mlp.W_out.detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 20 * weight.std()
    other = copy_sharing(organism, {"blocks.2.mlp.W_out": weight + noise})
    health = sae_health((organism, other), saes, texts, n_resamples=200)
    assert (health.ok(Site(1)), health.ok(Site(3))) == (True, False)
    untouched = health.sites["blocks.1.hook_resid_post"].explained_variance_change
    assert (untouched.low, untouched.high) == (0, 0)
    assert health.sites["blocks.3.hook_resid_post"].explained_variance_change.high < -0.1
    assert "of the variance in the quantized model against 0.99" in health.broken[0].replace("1.00", "0.99")


def test_an_sae_of_something_else_fits_neither(organism, saes, texts):
    mixed = {Site(1): rotated(saes[Site(1)]), Site(3): saes[Site(3)]}
    health = sae_health((organism, apply_precision(organism, "int8")), mixed, texts, n_resamples=200)
    assert not health.ok(Site(1))
    assert health.ok("blocks.3.hook_resid_post")
    (sentence,) = health.broken
    assert "the SAE at blocks.1.hook_resid_post explains" in sentence
    assert sentence.endswith("it does not fit the reference itself, so it measures neither model")


def test_padding_and_batches_do_not_count(organism, saes, texts):
    some = texts[:13]
    runs = [
        measure_fit(organism, saes, some, batch_size=size, padding_side=side)
        for size, side in ((13, "right"), (13, "left"), (1, None))
    ]
    lengths = sum(len(organism.tokenizer(text)["input_ids"]) - 1 for text in some)
    for site in saes:
        first, *others = [run[site] for run in runs]
        assert first.reconstruction.n.sum() == lengths
        for other in others:
            for name in ("nll", "nll_spliced", "nll_ablated", "n_targets"):
                torch.testing.assert_close(getattr(other, name), getattr(first, name), rtol=1e-4, atol=1e-4)
            ours, theirs = first.reconstruction, other.reconstruction
            torch.testing.assert_close(ours.sum_error2, theirs.sum_error2, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours.n, theirs.n)


@pytest.mark.parametrize("side", ["left", "right"])
def test_bos_and_padding_are_left_as_they_are(tiny_model, side):
    seen = {}
    site = Site(1)
    model = Spliced(tiny_model, site, lambda x: torch.full_like(x, 7.0), tiny_model.tokenizer)
    batch = tiny_model.tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def keep(value, hook):
        seen.setdefault(hook.name, value.clone())

    options = {"attention_mask": mask, "return_type": "logits"}
    tiny_model.run_with_hooks(ids, fwd_hooks=[(str(site), keep)], **options)
    before = seen.pop(str(site))
    model.run_with_hooks(ids, fwd_hooks=[("blocks.2.hook_resid_pre", keep)], **options)
    after = seen["blocks.2.hook_resid_pre"]
    replaced = mask.bool() & (ids != tiny_model.tokenizer.bos_token_id)
    assert (after[replaced] == 7).all()
    assert torch.equal(after[~replaced], before[~replaced])
    assert replaced.sum() == sum(len(text.split()) for text in TEXTS)


def test_splicing_the_truth_changes_nothing(tiny_model):
    model = Spliced(tiny_model, Site(1), lambda x: x, tiny_model.tokenizer)
    (ours,), (theirs,) = (list(stream_aligned({"m": each}, TEXTS, sites=[Site(2)])) for each in (tiny_model, model))
    assert torch.equal(ours.logits["m"], theirs.logits["m"])
    assert torch.equal(ours.activations["m"][Site(2)], theirs.activations["m"][Site(2)])


def test_many_sites_of_many_kinds_at_once(tiny_model):
    several = {
        Site(0, "z"): make_sae("blocks.0.attn.hook_z", reshape_activations="hook_z"),
        Site(0, "v"): make_sae("blocks.0.attn.hook_v", d_in=16),
        Site(1, "mlp_out"): make_sae("blocks.1.hook_mlp_out"),
        Site(1, "mlp_post"): make_sae("blocks.1.mlp.hook_post", d_in=40),
        Site(2, "resid_pre"): make_sae("blocks.2.hook_resid_pre", normalize_activations="layer_norm"),
    }
    health = sae_health(
        (tiny_model, apply_precision(tiny_model, "int4")), several, TEXTS, n_resamples=50, ablation="mean"
    )
    assert list(health.sites) == [str(site) for site in sorted(several)]
    assert health.ablation == "mean"
    for site in health.sites.values():
        assert site.quantized.explained_variance.value < 0.5
        assert site.quantized != site.reference


def test_bridges_have_the_same_numbers(tiny_folder, tiny_model):
    bridge = load(tiny_folder, wrapper="bridge", device="cpu")
    saes = {Site(1): make_sae()}
    (ours,), (theirs,) = (measure_fit(model, saes, TEXTS, batch_size=3).values() for model in (tiny_model, bridge))
    for name in ("nll", "nll_spliced", "nll_ablated", "n_targets"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.reconstruction.sum_error2, theirs.reconstruction.sum_error2, rtol=1e-4, atol=1e-4)


def test_mean_ablation_puts_the_mean_there(by_hand):
    model, prompts = by_hand
    (fit,) = measure_fit(model, {Site(1): ReadOut()}, prompts, ablation="mean").values()
    words = [[handmade.TOKEN[word] for word in prompt.split()] for prompt in prompts]
    mean = model.W_E[[token for prompt in words for token in prompt]].mean(0)
    logits = (mean @ model.W_U + model.b_U).double().log_softmax(-1)
    targets = [token for prompt in words for token in prompt[1:]]
    assert fit.nll_ablated.sum().item() == pytest.approx(-logits[targets].sum().item(), rel=1e-5)


def test_where_ablation_costs_nothing_there_is_nothing_to_recover(by_hand):
    """The blocks write nothing, so what they write may be ablated for free; that is held against nobody."""
    model, prompts = by_hand
    fit = measure_fit(model, {Site(0): ReadOut()}, prompts)[Site(0)]
    free = type(fit)(fit.reconstruction, fit.nll, fit.nll_spliced, fit.nll, fit.n_targets)
    assert math.isnan(free.cross_entropy_recovered(torch.ones(1, len(fit.nll))).item())


def test_thresholds_are_arguments(organism, saes, texts):
    strict = HealthThresholds(min_explained_variance=0.993)
    health = sae_health((organism, organism), saes, texts[:20], thresholds=strict, n_resamples=50)
    assert (health.ok(Site(1)), health.ok(Site(3))) == (True, False)
    loose = sae_health(
        (organism, scaled(organism, 3.0)),
        {Site(1): saes[Site(1)]},
        texts[:20],
        thresholds=HealthThresholds(-10.0, -10.0, 10.0, 100.0),
        n_resamples=50,
    )
    assert loose.ok()


def test_what_cannot_be_measured_is_refused(organism, tiny_model, saes, texts):
    with pytest.raises(UnknownNameError, match=r"site of these SAEs 'blocks.0.hook_resid_post'"):
        sae_health((organism, organism), saes, texts[:3], n_resamples=10).ok(Site(0))
    with pytest.raises(SAEError, match=r"Duck has no .decode"):
        sae_health((tiny_model, tiny_model), {Site(1): Duck()}, TEXTS)
    transcoder = make_sae()
    transcoder.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with pytest.raises(SAEError, match=r"is a transcoder from blocks\.1\.hook_resid_post to blocks\.1\.hook_mlp_out"):
        sae_health((tiny_model, tiny_model), transcoder, TEXTS)
    with pytest.raises(PairMismatchError):
        sae_health((organism, tiny_model), saes, texts[:3])


def test_results_are_saved_shown_and_drawn(organism, saes, texts, tmp_path):
    health = sae_health((organism, apply_precision(organism, "int2")), saes, texts[:20], n_resamples=50)
    health.save(tmp_path / "health.json")
    assert SAEHealth.load(tmp_path / "health.json") == health
    table = health.to_dataframe()
    assert list(table["model"]) == ["reference", "quantized"] * 2
    assert (table["explained_variance_low"] <= table["explained_variance"]).all()
    figure = health.plot()
    assert [len(trace.y) for trace in figure.data] == [2] * 6
    assert figure.data[1].y[0] == health.sites[str(SITES[0])].quantized.explained_variance.value
    text = health.summary()
    assert all(str(site) in text for site in SITES)
    assert all(sentence in text for sentence in health.broken)
    (tmp_path / "other.json").write_text(json.dumps({"tracelens_sae_health": 0}))
    with pytest.raises(ResultFileError, match="of version 0; this Tracelens reads 1"):
        SAEHealth.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ResultFileError, match=r"is not a health that SAEHealth.save wrote"):
        SAEHealth.load(tmp_path / "other.json")
