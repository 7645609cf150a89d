import json

import pytest
import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from tracelens.errors import NonFiniteError, SAEError, SAENotFoundError
from tracelens.features import check_saes, encode, load_saes, normalise_saes, sae_hash
from tracelens.sites import Site

D_IN, D_SAE = 32, 64


def make_sae(hook="blocks.1.hook_resid_post", *, kind=StandardSAE, config=StandardSAEConfig, d_in=D_IN, seed=0, **cfg):
    sae = kind(config(d_in=d_in, d_sae=D_SAE, metadata=SAEMetadata(hook_name=hook), **cfg))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


class Duck:
    """The least that counts as an SAE."""

    def __init__(self):
        self.W_dec = torch.eye(D_IN)

    def encode(self, x):
        return x.relu()


@pytest.fixture
def folder(tmp_path):
    """SAEs of layers 2 and 0, whose folders' names and order say nothing."""
    make_sae("blocks.2.hook_resid_post", seed=2).save_model(tmp_path / "a")
    make_sae("blocks.0.hook_mlp_out", seed=0).save_model(tmp_path / "b")
    (tmp_path / "figures").mkdir()
    return tmp_path


def test_a_folder_of_saes_opens_by_the_hook_names_inside(folder, no_network):
    saes = load_saes(folder)
    assert list(saes) == [Site(0, "mlp_out"), Site(2)]
    assert torch.equal(saes[Site(2)].W_enc, make_sae(seed=2).W_enc)
    assert not any(p.requires_grad for p in saes[Site(2)].parameters())


def test_a_single_sae_opens_too_in_the_dtype_asked_for(folder):
    (sae,) = load_saes(str(folder / "a"), dtype=torch.bfloat16).values()
    assert sae.W_enc.dtype == torch.bfloat16


@pytest.mark.parametrize("in_wheel", [True, False])
@pytest.mark.parametrize("name", ["organism", "saes/organism"])
def test_organism_means_the_packaged_saes(folder, monkeypatch, tmp_path_factory, name, in_wheel):
    root = tmp_path_factory.mktemp("install")
    home = root / ("tracelens/_saes/organism" if in_wheel else "saes/organism")
    home.parent.mkdir(parents=True)
    folder.rename(home)
    monkeypatch.setattr(
        "tracelens.features.sae_folders.__file__", str(root / "tracelens" / "features" / "sae_folders.py")
    )
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert list(load_saes(name)) == [Site(0, "mlp_out"), Site(2)]


def test_an_existing_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    make_sae().save_model(tmp_path / "saes" / "organism")
    monkeypatch.chdir(tmp_path)
    assert list(load_saes("saes/organism")) == [Site(1)]


def test_missing_folder(tmp_path):
    with pytest.raises(SAENotFoundError, match=r"no folder '.*nowhere'.*cfg\.json and sae_weights\.safetensors") as e:
        load_saes(tmp_path / "nowhere")
    assert isinstance(e.value, SAEError | FileNotFoundError)


def test_folder_without_sae(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(SAEError, match=r"no SAE in .*: neither it nor a sub-folder holds"):
        load_saes(tmp_path)


def test_file_instead_of_folder(folder):
    with pytest.raises(SAEError, match="is a file; give the folder that holds"):
        load_saes(folder / "a" / "cfg.json")


@pytest.mark.parametrize("missing", ["cfg.json", "sae_weights.safetensors"])
def test_half_an_sae(folder, missing):
    (folder / "a" / missing).unlink()
    with pytest.raises(SAEError, match=rf"a is not an SAE in SAELens' format: {missing} is missing"):
        load_saes(folder)


@pytest.mark.parametrize(
    ("file", "content"), [("cfg.json", "{"), ("cfg.json", "{}"), ("sae_weights.safetensors", "no tensors")]
)
def test_files_that_are_no_sae(folder, file, content):
    (folder / "a" / file).write_text(content)
    with pytest.raises(SAEError, match="a is not an SAE that SAELens can read"):
        load_saes(folder)


@pytest.mark.parametrize(
    ("hook", "message"), [("layers.3.mlp", "hook name 'layers.3.mlp' is no site"), (None, "names no hook point")]
)
def test_hook_name_that_is_no_site(folder, hook, message):
    cfg = json.loads((folder / "a" / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = hook
    (folder / "a" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(SAEError, match=f"SAE in .*a: .*{message}"):
        load_saes(folder)


def test_two_saes_for_one_site(folder):
    make_sae("blocks.2.hook_resid_post").save_model(folder / "c")
    with pytest.raises(SAEError, match=r"two SAEs for blocks\.2\.hook_resid_post: .*a and .*c"):
        load_saes(folder)


def test_nan_in_an_sae_is_named(tmp_path):
    sae = make_sae()
    sae.b_enc.data[3] = torch.nan
    sae.save_model(tmp_path)
    with pytest.raises(NonFiniteError, match="'b_enc' holds NaN"):
        load_saes(tmp_path)


def test_keys_may_be_sites_hook_names_or_layers():
    one, two, three = make_sae(), make_sae("blocks.2.hook_mlp_out"), Duck()
    saes = normalise_saes({2: two, "blocks.1.hook_resid_post": one, 0: three, Site(0, "attn_out"): three})
    assert saes == {Site(0, "attn_out"): three, Site(0): three, Site(1): one, Site(2, "mlp_out"): two}
    assert list(saes) == sorted(saes)
    assert normalise_saes(two) == {Site(2, "mlp_out"): two}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no SAEs given"),
        (Duck(), "names no hook point"),
        ("saes/organism", "the SAE is a str, not an SAE"),
        ({0: "saes"}, "the value of 0 is a str, not an SAE"),
        ({"layer 3": Duck()}, "key 'layer 3' of the SAEs is no site"),
        ({0: make_sae()}, r"key 0 is not the layer of its SAE, which belongs at blocks\.1\.hook_resid_post"),
        ({1: make_sae(), Site(1): make_sae()}, r"two SAEs for blocks\.1\.hook_resid_post"),
    ],
)
def test_saes_that_cannot_be_placed(given, message):
    with pytest.raises(SAEError, match=message):
        normalise_saes(given)


def test_saes_that_fit_the_model(tiny_model):
    check_saes(
        {Site(2): make_sae(), Site(0, "z"): make_sae(), Site(0, "v"): make_sae(d_in=16), Site(1): Duck()}, tiny_model
    )


def test_everything_that_does_not_fit_is_listed(tiny_model):
    saes = {Site(0): make_sae(d_in=16), Site(3): make_sae(), Site(1, "mlp_post"): make_sae(), Site(2): make_sae()}
    with pytest.raises(SAEError) as e:
        check_saes(saes, tiny_model)
    assert "blocks.0.hook_resid_post: the SAE's d_in is 16, but the model is 32 wide there" in str(e.value)
    assert "blocks.3.hook_resid_post: the model has only 3 layers (0 to 2)" in str(e.value)
    assert "blocks.1.mlp.hook_post: the SAE's d_in is 32, but the model is 40 wide there" in str(e.value)
    assert "blocks.2" not in str(e.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "config", "cfg"),
    [
        (StandardSAE, StandardSAEConfig, {}),
        (StandardSAE, StandardSAEConfig, {"apply_b_dec_to_input": False}),
        (StandardSAE, StandardSAEConfig, {"normalize_activations": "layer_norm"}),
        (StandardSAE, StandardSAEConfig, {"normalize_activations": "constant_norm_rescale"}),
        (JumpReLUSAE, JumpReLUSAEConfig, {}),
        (JumpReLUSAE, JumpReLUSAEConfig, {"normalize_activations": "layer_norm"}),
        (TopKSAE, TopKSAEConfig, {"k": 5}),
        (GatedSAE, GatedSAEConfig, {}),
    ],
)
def test_encoding_is_saelens_encoding(kind, config, cfg, dtype):
    sae = make_sae(kind=kind, config=config, dtype=dtype, **cfg)
    x = 2 * torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1)) + 0.5
    before = x.clone()
    features, expected = encode(sae, x), sae.encode(x).float()
    assert features.dtype == torch.float32
    assert features.min() == 0
    assert features.max() > 0
    assert torch.equal(x, before)
    assert torch.equal(features > 0, expected > 0)
    torch.testing.assert_close(features, expected, atol=1e-5 if dtype == "float32" else 0, rtol=1e-5)


def test_negative_thresholds_of_jumprelu_do_not_let_negatives_through():
    sae = make_sae(kind=JumpReLUSAE, config=JumpReLUSAEConfig)
    assert (sae.threshold < 0).any()
    assert encode(sae, torch.randn(50, D_IN)).min() == 0


def test_heads_are_flattened():
    sae = make_sae("blocks.1.attn.hook_z", reshape_activations="hook_z")
    z = torch.randn(7, 4, 8)
    torch.testing.assert_close(encode(sae, z), sae.encode(z), atol=1e-6, rtol=1e-5)
    topk = make_sae("blocks.1.attn.hook_z", kind=TopKSAE, config=TopKSAEConfig, k=5, reshape_activations="hook_z")
    torch.testing.assert_close(encode(topk, z), topk.encode(z))


def test_an_overridden_encoder_is_used():
    class Doubled(StandardSAE):
        def encode(self, x):
            return 2 * super().encode(x)

    x = torch.randn(5, D_IN)
    torch.testing.assert_close(encode(make_sae(kind=Doubled), x), 2 * encode(make_sae(), x), atol=1e-6, rtol=1e-5)
    assert torch.equal(encode(Duck(), x), x.relu())


def test_negative_activations_are_refused():
    duck = Duck()
    duck.encode = lambda x: x
    with pytest.raises(SAEError, match="Duck gives negative activations"):
        encode(duck, torch.tensor([[1.0, -1.0]]))


def test_hash_follows_the_values_only(tmp_path):
    sae = make_sae(dtype="bfloat16")
    sae.save_model(tmp_path)
    assert sae_hash(sae) == sae_hash(SAE.load_from_disk(tmp_path, dtype="float32"))
    assert len(sae_hash(sae)) == 64
    changed = make_sae(dtype="bfloat16")
    changed.b_dec.data[0] += 1
    assert sae_hash(sae) != sae_hash(changed)
    assert sae_hash(Duck()) == sae_hash(Duck())
