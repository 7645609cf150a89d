"""SAEs of models with processed weights: what is made up for is exact, and what cannot be is refused."""

import copy
import logging

import pytest
import torch

from tests.features.test_saes import Duck, make_sae
from tests.tiny import TEXTS, write_checkpoint
from tracelens import load
from tracelens.errors import SAEError
from tracelens.features import check_saes, encode, provenance_of
from tracelens.features.sae_processing import WRITTEN, processing_of
from tracelens.features.saes import reconstruct, splice
from tracelens.sites import HOOKS, Site

SITES = [Site(1, name) for name in HOOKS if name not in ("pattern", "attn_scores")]
OFF = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


@pytest.fixture(scope="module", params=["GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def layer_norm_model(request, tmp_path_factory):
    return load(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", request.param))


def processed(model, **changes):
    model = copy.deepcopy(model)
    model.load_and_process_state_dict(model.state_dict(), **OFF | changes)
    return model


def activations(model):
    _, cache = model.run_with_cache(model.to_tokens(TEXTS[1]))
    return {site: cache[str(site)][0].flatten(1) for site in SITES if str(site) in cache}


def trained_on(site, d_in=32, **kwargs):
    sae = make_sae(str(site), d_in=d_in)
    sae.cfg.metadata.model_from_pretrained_kwargs = kwargs
    return sae


@pytest.fixture(scope="module")
def plain(layer_norm_model):
    return activations(layer_norm_model)


def test_centring_takes_the_mean_of_what_is_written_and_nothing_else(layer_norm_model, plain):
    centred = activations(processed(layer_norm_model, center_writing_weights=True))
    for site, x in plain.items():
        expected = x - x.mean(-1, keepdim=True) if site.name in WRITTEN else x
        torch.testing.assert_close(centred[site], expected, atol=2e-5, rtol=1e-5)
        if site.name.startswith("resid"):
            assert not torch.allclose(centred[site], x, atol=1e-2)


def test_folding_norms_and_centring_the_unembedding_change_no_site(layer_norm_model, plain):
    folded = activations(processed(layer_norm_model, fold_ln=True, center_unembed=True))
    for site, x in plain.items():
        torch.testing.assert_close(folded[site], x, atol=2e-5, rtol=1e-5)


def test_folding_value_biases_changes_values_and_what_heads_read_of_them(layer_norm_model, plain):
    folded = activations(processed(layer_norm_model, fold_value_biases=True))
    changed = {site.name for site, x in plain.items() if not torch.allclose(folded[site], x, atol=1e-4)}
    assert changed == {"v", "z"}


def test_an_sae_of_the_centred_model_reads_the_plain_one_as_it_read_that(layer_norm_model, plain):
    centred = processed(layer_norm_model, center_writing_weights=True)
    read_there = activations(centred)
    for site in (site for site in plain if site.name in WRITTEN):
        sae, same = trained_on(site, center_writing_weights=True), make_sae(str(site))
        check_saes({site: sae}, layer_norm_model)
        assert processing_of(sae) == "centre"
        expected = same.encode(read_there[site])
        torch.testing.assert_close(encode(sae, plain[site]), expected, atol=5e-5, rtol=1e-4)
        assert not torch.allclose(encode(same, plain[site]), expected, atol=1e-2)
        check_saes({site: sae}, centred)  # where taking the mean away changes nothing
        torch.testing.assert_close(encode(sae, read_there[site]), expected, atol=5e-5, rtol=1e-4)


def test_what_is_spliced_into_the_plain_model_keeps_its_mean(layer_norm_model, plain):
    """Splicing into the plain model is splicing into the centred one: the logits are the same."""
    site = Site(1)
    sae = trained_on(site, center_writing_weights=True)
    x = plain[site]
    mean = x.mean(-1, keepdim=True)
    _, read, output = reconstruct(sae, x)
    torch.testing.assert_close(read, x - mean)
    torch.testing.assert_close(splice(sae, x), output + mean)
    centred = processed(layer_norm_model, center_writing_weights=True)
    hooks = [(str(site), lambda value, hook: splice(sae, value.flatten(0, 1)).view_as(value))]
    ids = layer_norm_model.to_tokens(TEXTS[1])
    ours, theirs = (model.run_with_hooks(ids, fwd_hooks=hooks) for model in (layer_norm_model, centred))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["q", "z", "mlp_pre"])
def test_where_centring_changes_nothing_nothing_is_done(name):
    sae = trained_on(Site(1, name), center_writing_weights=True)
    assert processing_of(sae) == "none"
    x = torch.randn(9, 32) + 2
    torch.testing.assert_close(encode(sae, x), sae.encode(x), atol=1e-5, rtol=1e-5)


def test_centring_that_was_skipped_in_training_is_refused(tiny_model):
    with pytest.raises(
        SAEError, match=r"blocks\.1\.hook_resid_post: center_writing_weights=True, but .*norm is RMS.*= \{\}"
    ):
        check_saes({Site(1): trained_on(Site(1), center_writing_weights=True)}, tiny_model)
    check_saes({Site(1, "z"): trained_on(Site(1, "z"), center_writing_weights=True)}, tiny_model)


def test_a_centred_model_is_refused_by_saes_of_the_plain_one(layer_norm_model):
    centred = processed(layer_norm_model, center_writing_weights=True)
    sae = trained_on(Site(1), center_writing_weights=False)
    with pytest.raises(
        SAEError, match=r"trained without center_writing_weights.*load the model without weight processing"
    ):
        check_saes({Site(1): sae}, centred)
    check_saes({Site(1): sae}, layer_norm_model)
    check_saes({Site(1, "z"): trained_on(Site(1, "z"))}, centred)
    sae.cfg.normalize_activations = "layer_norm"  # which takes the mean away itself
    check_saes({Site(1): sae}, centred)
    check_saes({Site(1): make_sae(), Site(0): Duck()}, centred)  # which say nothing of processing


@pytest.mark.parametrize(
    ("kwarg", "name", "fix"),
    [
        ("fold_value_biases", "z", "folded into b_O"),
        ("refactor_factored_attn_matrices", "q", "refactored in the same way"),
    ],
)
def test_processing_that_cannot_be_made_up_for_is_refused(layer_norm_model, kwarg, name, fix):
    site = Site(1, name)
    with pytest.raises(SAEError, match=rf"attn\.hook_{name}: {kwarg}=True: .*{fix}.*'attn_out'"):
        check_saes({site: trained_on(site, **{kwarg: True})}, layer_norm_model)
    check_saes({Site(1): trained_on(Site(1), **{kwarg: True})}, layer_norm_model)
    if kwarg == "fold_value_biases":
        check_saes({site: trained_on(site, **{kwarg: True})}, processed(layer_norm_model, fold_value_biases=True))


def test_all_contradictions_are_listed_at_once(tiny_model):
    wrong = {
        Site(layer): trained_on(Site(layer), d_in=d_in, center_writing_weights=True)
        for layer, d_in in ((0, 32), (1, 16))
    }
    with pytest.raises(SAEError, match=r"(?s)blocks\.0.*center_writing_weights.*blocks\.1.*d_in is 16"):
        check_saes(wrong, tiny_model)


def test_an_sae_of_a_centred_model_that_names_no_place_is_refused():
    with pytest.raises(SAEError, match=r"names no hook point.*set sae\.cfg\.metadata\.hook_name"):
        encode(trained_on("", center_writing_weights=True), torch.randn(3, 32))


def test_means_are_taken_in_float32():
    sae = trained_on(Site(1), center_writing_weights=True)
    x = (100 + torch.randn(50, 32)).bfloat16()
    expected = sae.encode((x.float() - x.float().mean(-1, keepdim=True)).bfloat16().float())
    torch.testing.assert_close(encode(sae, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("said", "warning"),
    [
        ({"model_name": "org/other"}, r"trained on 'org/other'; the model is called 'tiny'"),
        ({"prepend_bos": False}, "trained on prompts without BOS, but the tokenizer adds it"),
        ({"model_from_pretrained_kwargs": {"checkpoint_index": 3}}, "trained on checkpoint_index=3 of its model"),
        ({"model_name": "org/Tiny", "prepend_bos": True, "model_from_pretrained_kwargs": {}}, None),
        ({}, None),
    ],
)
def test_differences_without_contradiction_are_logged(tiny_model, caplog, said, warning):
    sae = make_sae()
    for key, value in said.items():
        setattr(sae.cfg.metadata, key, value)
    with caplog.at_level(logging.WARNING):
        check_saes({Site(1): sae}, tiny_model)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("tracelens")]
    assert len(messages) == (warning is not None)
    if warning:
        assert "blocks.1.hook_resid_post was " + warning in messages[0]


def test_provenance_says_what_is_honoured():
    record = provenance_of({Site(1): trained_on(Site(1), center_writing_weights=True), Site(0): Duck()})
    assert record["blocks.1.hook_resid_post"]["processing"] == "centre"
    assert record["blocks.1.hook_resid_post"]["architecture"] == "standard"
    assert record["blocks.1.hook_resid_post"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert record["blocks.0.hook_resid_post"]["architecture"] == "Duck"
    assert record["blocks.0.hook_resid_post"]["processing"] == "none"
