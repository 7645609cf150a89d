"""Features against `SAE.encode` and `SAE.decode`, for every architecture that SAELens registers, saved and loaded by it.

Equal to the bit where SAELens computes; within 1e-6 (float32, of activations of size 1 to 10) where Tracelens does, which adds
the bias before rounding: standard and JumpReLU. A feature may then fire or not only if it is that close to its threshold.
"""

import warnings

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from tracelens.errors import SAEError
from tracelens.features import encode, load_saes
from tracelens.features.saes import reconstruct
from tracelens.sites import Site

D_IN, D_SAE = 24, 96
SITE = Site(1)
OPTIONS = {
    "topk": {"k": 7, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 7},
    "transcoder": {"d_out": 16, "apply_b_dec_to_input": False},
    "matching_pursuit": {"max_iterations": 6},
    "batchtopk": {"k": 7},
    "matryoshka_batchtopk": {"k": 7, "matryoshka_widths": [32, D_SAE]},
    "temporal": {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 7},
}
OPTIONS |= {name: OPTIONS["transcoder"] for name in SAE_CLASS_REGISTRY if "transcoder" in name}
REFUSED = {"abstopk": "fire in both directions", "temporal": "reads a prompt's tokens together"}
OURS = ("standard", "jumprelu")
"""Architectures whose encoder is computed here."""


def random_sae(kind, config, *, seed=0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metadata = SAEMetadata(hook_name=str(SITE), hook_name_out=None)
        sae = kind(config(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7)
    return sae


def activations(n=200):
    return 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1)) + 0.5


def assert_same(features, sae, x, *, ours):
    expected = sae.encode(x)
    expected = (expected.to_dense() if expected.is_sparse else expected).float()
    assert 0 < (expected > 0).float().mean() < 0.9
    if not ours or sae.W_dec.dtype != torch.float32:
        assert torch.equal(features, expected)
        return
    fires = (features > 0) == (expected > 0)
    threshold = getattr(sae, "threshold", torch.zeros(()))
    at_threshold = (torch.maximum(features, expected) - threshold).abs() < 1e-6
    assert (fires | at_threshold).all()
    torch.testing.assert_close(features[fires], expected[fires], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(SAE_CLASS_REGISTRY))
def test_every_architecture_from_disk(name, dtype, tmp_path, no_network):
    kind, config = SAE_CLASS_REGISTRY[name]
    random_sae(kind, config, **OPTIONS.get(name, {})).save_model(tmp_path)
    if name in REFUSED:
        with pytest.raises(SAEError, match=REFUSED[name]):
            load_saes(tmp_path)
        return
    sae = load_saes(tmp_path, dtype=dtype)[SITE]
    x = activations()
    if dtype == torch.float32:
        assert_same(encode(sae, x), SAE.load_from_disk(tmp_path), x, ours=name in OURS)
    assert_same(encode(sae, x), sae, x.to(dtype), ours=name in OURS)


@pytest.mark.parametrize("form", ["inference", "checkpoint of training"])
@pytest.mark.parametrize("name", sorted(set(SAE_TRAINING_CLASS_REGISTRY) - set(REFUSED)))
def test_every_trained_architecture(name, form, tmp_path):
    sae = random_sae(*SAE_TRAINING_CLASS_REGISTRY[name], **OPTIONS.get(name, {}))
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "checkpoint of training")
    (loaded,) = load_saes(tmp_path / form).values()
    expected = SAE.load_from_disk(tmp_path / "inference")
    x = activations()
    assert type(loaded) is type(expected)
    # A checkpoint keeps the decoder's norms, which SAELens folds into the encoder of what it saves for use.
    rounded = form == "checkpoint of training" or type(expected).__name__ in ("StandardSAE", "JumpReLUSAE")
    assert_same(encode(loaded, x), expected, x, ours=rounded)


NORMALISATIONS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu", "gated", "matching_pursuit"])
def test_reconstruction_is_saelens_forward(name, normalisation):
    """Normalisation and its undoing use the same tokens' scale, whatever was encoded in between."""
    sae = random_sae(*SAE_CLASS_REGISTRY[name], normalize_activations=normalisation, **OPTIONS.get(name, {}))
    x = activations()
    expected = sae(x).detach()
    encode(sae, 3 * activations(17))
    features, read, output = reconstruct(sae, x)
    assert torch.equal(read, x)
    torch.testing.assert_close(features, sae.encode(x).detach(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu", "gated"])
def test_heads_are_read_flat_and_the_sae_is_left_as_it_was(name):
    sae = random_sae(*SAE_CLASS_REGISTRY[name], reshape_activations="none", **OPTIONS.get(name, {}))
    flat = random_sae(*SAE_CLASS_REGISTRY[name], **OPTIONS.get(name, {}))
    sae.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    sae.turn_on_forward_pass_hook_z_reshaping()
    z = activations().view(-1, 4, D_IN // 4)
    features, read, output = reconstruct(sae, z)
    assert torch.equal(read, z.flatten(1))
    torch.testing.assert_close(features, flat.encode(z.flatten(1)), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(output, flat(z.flatten(1)), atol=1e-5, rtol=1e-6)
    assert sae(z).shape == z.shape
    torch.testing.assert_close(encode(sae, z), features)


def test_thresholds_stay_in_float32_where_bfloat16_would_move_the_firing_set(tmp_path):
    kind, config = SAE_CLASS_REGISTRY["jumprelu"]
    sae = kind(config(d_in=1, d_sae=2, metadata=SAEMetadata(hook_name=str(SITE))))
    with torch.no_grad():
        sae.W_enc.copy_(torch.ones(1, 2))
        sae.b_enc.zero_(), sae.b_dec.zero_()
        sae.threshold.copy_(torch.tensor([0.999, 1.001]))  # 1.0 both, in bfloat16
    sae.save_model(tmp_path)
    assert torch.equal(sae.threshold.bfloat16().float(), torch.ones(2))
    loaded = load_saes(tmp_path, dtype=torch.bfloat16)[SITE]
    assert (loaded.W_enc.dtype, loaded.threshold.dtype) == (torch.bfloat16, torch.float32)
    assert encode(loaded, torch.tensor([[1.0]])).tolist() == [[1.0, 0.0]]
    rounded = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert encode(rounded, torch.tensor([[1.0]])).tolist() == [[0.0, 0.0]]


def test_a_scale_that_training_had_not_folded_in_yet_is_folded_in(tmp_path):
    sae = random_sae(*SAE_TRAINING_CLASS_REGISTRY["batchtopk"], normalize_activations="expected_average_only_in", k=7)
    sae.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 2.5}')
    trained = TrainingSAE.load_from_disk(tmp_path)
    trained.fold_activation_norm_scaling_factor(2.5)
    trained.save_inference_model(tmp_path / "finished")
    x = activations() / 2.5
    assert_same(encode(load_saes(tmp_path)[SITE], x), SAE.load_from_disk(tmp_path / "finished"), x, ours=True)


def test_whitening_that_is_not_folded_in_is_refused(tmp_path):
    random_sae(*SAE_CLASS_REGISTRY["standard"], normalize_activations="covariance_whitening").save_model(tmp_path)
    with pytest.raises(SAEError, match=r"trained on whitened activations.*not folded into its weights"):
        load_saes(tmp_path)
