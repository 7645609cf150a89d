"""SAEs from releases, repositories and folders of other layouts; the hub is a cache made by hand, without a network."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup
from safetensors.torch import load_file, save_file

from tests.features.test_saes import D_IN, D_SAE, make_sae
from tracelens.errors import NonFiniteError, SAEError, SAENotFoundError
from tracelens.features import encode, load_saes
from tracelens.features.saes import reconstruct
from tracelens.sites import Site

RES = {layer: f"blocks.{layer}.hook_resid_pre" for layer in (6, 7, 8)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def into_cache(cache: Path, repository: str, files: dict[str, Path]) -> None:
    """Puts files into the hub's cache under the names given, as huggingface_hub lays them."""
    home = cache / ("models--" + repository.replace("/", "--"))
    for made in (home / "blobs", home / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for name, file in files.items():
        blob = home / "blobs" / f"{COMMIT[:8]}-{name.replace('/', '-')}"
        blob.write_bytes(file.read_bytes())
        link = home / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


def saved(folder: Path, name: str, sae) -> dict[str, Path]:
    sae.save_model(folder / name)
    # SAELens asks for it; a cache without it and without a network could not say that the repository has none.
    save_file({"sparsity": torch.zeros(D_SAE)}, folder / name / "sparsity.safetensors")
    return {f"{name}/{file.name}": file for file in (folder / name).iterdir()}


def lookup(release: str, saes: dict[str, str], **cfg) -> PretrainedSAELookup:
    return PretrainedSAELookup(release, "org/saes", "tiny", None, saes, {}, {}, {}, {}, cfg or None)


@pytest.fixture
def hub(tmp_path, monkeypatch, no_network):
    """Two releases over one cached repository: an SAE per layer, and two widths at layer 12."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files: dict[str, Path] = {}
    for layer, hook in RES.items():
        files |= saved(tmp_path / "made", hook, make_sae(hook, seed=layer))
    for width in ("16k", "65k"):
        name = f"layer_12/width_{width}"
        files |= saved(tmp_path / "made", name, make_sae("blocks.12.hook_resid_post", seed=len(width)))
    files |= saved(tmp_path / "made", "layer_3/in", make_sae("blocks.3.hook_mlp_in"))
    into_cache(tmp_path / "cache", "org/saes", files)
    known = {
        "tiny-res": lookup("tiny-res", {hook: hook for hook in RES.values()}),
        "tiny-centred": lookup(
            "tiny-centred", {RES[6]: RES[6]}, model_from_pretrained_kwargs={"center_writing_weights": True}
        ),
        "tiny-widths": lookup("tiny-widths", {f"layer_12/width_{w}": f"layer_12/width_{w}" for w in ("16k", "65k")}),
        "tiny-mlp-in": lookup("tiny-mlp-in", {"layer_3/in": "layer_3/in"}),
        "tiny-lost": lookup("tiny-lost", {"blocks.0.hook_resid_pre": "nowhere"}),
    }
    for module in ("saes.sae", "loading.pretrained_saes_directory", "loading.pretrained_sae_loaders"):
        monkeypatch.setattr(f"sae_lens.{module}.get_pretrained_saes_directory", lambda: known)
    return tmp_path / "made"


def test_a_release_by_name(hub):
    saes = load_saes("tiny-res")
    assert list(saes) == [Site(layer, "resid_pre") for layer in (6, 7, 8)]
    assert torch.equal(saes[Site(7, "resid_pre")].W_enc, make_sae(seed=7).W_enc)
    assert not any(p.requires_grad for p in saes[Site(7, "resid_pre")].parameters())


def test_layers_and_sites_choose(hub):
    assert list(load_saes("tiny-res", layers=[6, 8])) == [Site(6, "resid_pre"), Site(8, "resid_pre")]
    assert list(load_saes("tiny-res", layers=[6, 8], sites=[RES[8], RES[7]])) == [Site(8, "resid_pre")]
    assert list(load_saes(hub, sites=[Site(7, "resid_pre")])) == [Site(7, "resid_pre")]
    with pytest.raises(SAEError, match="no SAE of 'tiny-res' is at layers 1; leave out layers="):
        load_saes("tiny-res", layers=[1])


def test_what_is_not_chosen_is_not_downloaded(hub, monkeypatch):
    from sae_lens import SAE

    asked = []
    original = SAE.from_pretrained
    monkeypatch.setattr(SAE, "from_pretrained", lambda r, i, **k: asked.append(i) or original(r, i, **k))
    load_saes("tiny-res", layers=[7])
    assert asked == [RES[7]]


@pytest.mark.parametrize("source", [("tiny-widths", "layer_12/width_65k"), "tiny-widths/layer_12/width_65k"])
def test_one_sae_of_a_release(hub, source):
    (site,) = load_saes(source)
    assert site == Site(12)


def test_several_sources_are_put_together(hub):
    folder = hub / "blocks.6.hook_resid_pre"
    saes = load_saes([folder, ("tiny-widths", "layer_12/width_16k"), ("org/saes", RES[8])])
    assert list(saes) == [Site(6, "resid_pre"), Site(8, "resid_pre"), Site(12)]
    with pytest.raises(SAEError, match=r"two SAEs for blocks\.6\.hook_resid_pre: .*made.* and tiny-res/blocks\.6"):
        load_saes([folder, "tiny-res"])


def test_a_release_with_several_saes_of_a_site_asks_which(hub):
    with pytest.raises(
        SAEError, match=r"'tiny-widths' has 2 SAEs for blocks\.12.*\('tiny-widths', 'layer_12/width_16k'"
    ):
        load_saes("tiny-widths")


def test_a_release_of_places_that_are_no_sites(hub):
    with pytest.raises(SAEError, match=r"'tiny-mlp-in' read blocks\.3\.hook_mlp_in, which are no sites"):
        load_saes("tiny-mlp-in")


def test_a_repository_laid_out_as_folders(hub, monkeypatch):
    assert list(load_saes("org/saes", layers=[6, 7])) == [Site(6, "resid_pre"), Site(7, "resid_pre")]


def test_what_the_release_says_of_the_model_is_kept_and_saelens_advice_is_not_repeated(hub, recwarn):
    (sae,) = load_saes("tiny-centred").values()
    assert sae.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    assert not [w for w in recwarn if "model_from_pretrained_kwargs" in str(w.message)]
    x = torch.randn(20, D_IN) + 3
    torch.testing.assert_close(encode(sae, x), sae.encode(x - x.mean(-1, keepdim=True)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tiny-ress", "no SAELens release is called 'tiny-ress'. Alike are: 'tiny-res'"),
        (("tiny-ress", "x"), "no SAELens release is called 'tiny-ress'. Alike are: 'tiny-res'"),
        (
            ("tiny-res", "blocks.9.hook_resid_pre"),
            r"'tiny-res' has no SAE 'blocks.9.hook_resid_pre'. Alike are: 'blocks",
        ),
        ("tiny-res/blocks.9.hook_resid_pre", "has no SAE 'blocks.9.hook_resid_pre'"),
        ("tiny-lost", "tiny-lost/blocks.0.hook_resid_pre is not in the hub's cache, and the hub cannot be reached"),
        ("org/none", "org/none is not in the hub's cache, and the hub cannot be reached .*give a local folder"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(hub, source, message):
    with pytest.raises(SAENotFoundError, match=message):
        load_saes(source)


def test_a_tuple_is_a_release_and_an_id(hub):
    with pytest.raises(SAEError, match=r"a tuple means \(release, sae_id\)"):
        load_saes(("a", "b", "c"))


def test_what_saelens_cannot_convert_is_named(hub, monkeypatch):
    from sae_lens import SAE

    def broken(*args, **kwargs):
        raise ValueError("scaling factor is present")

    monkeypatch.setattr(SAE, "from_pretrained", broken)
    with pytest.raises(SAEError, match=r"tiny-res/blocks.*is not an SAE that SAELens can read: ValueError: scaling"):
        load_saes("tiny-res")


@pytest.fixture
def sparsify(tmp_path):
    """A folder as Sparsify writes it, and the SAE whose tensors are in it: `encoder` is a Linear, `W_dec` is [latent, d_in]."""
    sae = make_sae(seed=3)
    home = tmp_path / "layers.4"
    home.mkdir()
    cfg = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": 5, "d_in": D_IN, "signed": False}
    (home / "cfg.json").write_text(json.dumps(cfg))
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, home / "sae.safetensors")
    return tmp_path, sae


def test_sparsify_folders(sparsify):
    folder, sae = sparsify
    (loaded,) = (saes := load_saes(folder)).values()
    assert list(saes) == [Site(4)]
    x = torch.randn(30, D_IN)
    latents = torch.nn.functional.linear(x - sae.b_dec, sae.W_enc.T, sae.b_enc).relu().detach()
    top = latents.topk(5)
    torch.testing.assert_close(
        encode(loaded, x), torch.zeros_like(latents).scatter(1, top.indices, top.values), atol=1e-5, rtol=1e-5
    )
    decoded = torch.einsum("tk,tkd->td", top.values, sae.W_dec[top.indices]) + sae.b_dec
    torch.testing.assert_close(reconstruct(loaded, x)[2], decoded.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", [{"activation": "groupmax"}, {"signed": True}, {"transcode": True}])
def test_other_coders_of_sparsify_are_refused(sparsify, other):
    folder, _ = sparsify
    cfg = folder / "layers.4" / "cfg.json"
    cfg.write_text(json.dumps(json.loads(cfg.read_text()) | other))
    ((key, value),) = other.items()
    with pytest.raises(SAEError, match=f"Sparsify coder with {key}={value!r}; only"):
        load_saes(folder)


@pytest.mark.parametrize(("file", "whose"), [("params.npz", "Gemma Scope's"), ("ae.pt", "dictionary_learning's")])
def test_layouts_that_only_the_hub_gives_are_named(tmp_path, file, whose):
    (tmp_path / "layer_3").mkdir()
    (tmp_path / "layer_3" / file).write_bytes(b"")
    with pytest.raises(SAEError, match=rf"{whose} layout \({file}\).*load_saes\(\(release, sae_id\)\).*Sparsify's"):
        load_saes(tmp_path)


def test_hugging_face_names_of_blocks_are_sites(tmp_path):
    make_sae("model.layers.5").save_model(tmp_path)
    assert list(load_saes(tmp_path)) == [Site(5)]


def test_a_release_that_saelens_converts(hub, monkeypatch):
    """dictionary_learning's layout: a config of the training run, and a state dict whose layers are Linear."""
    home, sae_id, sae = hub / "ae", "run/resid_post_layer_3/trainer_0", make_sae(seed=5)
    home.mkdir()
    trainer = {"layer": 3, "dict_class": "AutoEncoderTopK", "k": 5, "activation_dim": D_IN, "dict_size": D_SAE}
    config = {"trainer": trainer | {"lm_name": "org/tiny"}, "buffer": {"ctx_len": 128}}
    (home / "config.json").write_text(json.dumps(config))
    tensors = {
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T,
        "b_dec": sae.b_dec,
    }
    torch.save({name: tensor.detach().clone() for name, tensor in tensors.items()}, home / "ae.pt")
    into_cache(hub.parent / "cache", "org/ae", {f"{sae_id}/{file.name}": file for file in home.iterdir()})
    known = {
        "tiny-ae": PretrainedSAELookup(
            "tiny-ae", "org/ae", "tiny", "dictionary_learning_1", {sae_id: sae_id}, {}, {}, {}, {}, None
        )
    }
    for module in ("saes.sae", "loading.pretrained_saes_directory", "loading.pretrained_sae_loaders"):
        monkeypatch.setattr(f"sae_lens.{module}.get_pretrained_saes_directory", lambda: known)
    (loaded,) = (saes := load_saes("tiny-ae", layers=[3])).values()
    assert list(saes) == [Site(3)]
    x = torch.randn(20, D_IN)
    top = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu().detach().topk(5)
    torch.testing.assert_close(
        encode(loaded, x), torch.zeros(20, D_SAE).scatter(1, top.indices, top.values), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(SAEError, match="no SAE of 'tiny-ae' is at layers 4"):
        load_saes("tiny-ae", layers=[4])


def test_an_sae_of_one_head_is_refused(tmp_path):
    make_sae("blocks.1.attn.hook_z").save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"]["hook_head_index"] = 3
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(SAEError, match="reads attention head 3 alone"):
        load_saes(tmp_path)


def test_old_configs_of_saelens(tmp_path):
    """Before version 6 everything was in one dictionary, and the hook was a `hook_point`."""
    sae = make_sae()
    sae.save_model(tmp_path)
    old = {"hook_point": "blocks.2.hook_resid_pre", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "model_name": "m"}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    (loaded,) = (saes := load_saes(tmp_path)).values()
    assert list(saes) == [Site(2, "resid_pre")]
    x = torch.randn(10, D_IN)
    assert torch.equal(encode(loaded, x), encode(sae, x))


def test_infinity_in_a_release_is_named(hub):
    weights = hub.parent / "cache" / "models--org--saes" / "snapshots" / COMMIT / RES[6] / "sae_weights.safetensors"
    tensors = load_file(weights)
    tensors["W_dec"][0, 0] = torch.inf
    save_file(tensors, weights.resolve())
    with pytest.raises(NonFiniteError, match=r"SAE tiny-res/blocks.6.*'W_dec' holds NaN or infinity"):
        load_saes("tiny-res")
