import copy
import math

import pytest
import torch

from tests import handmade
from tests.handmade import ReadOut
from tests.tiny import TEXTS, write_checkpoint
from tracelens import PrecisionPair, apply_precision, load
from tracelens.causal.component_drift import Drift, component_drift
from tracelens.causal.components import name_of
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet
from tracelens.errors import UnknownNameError
from tracelens.sites import Site

ALL = ("head", "mlp", "attn", "layer")


def noisy(model, name, index=...):
    """A copy with noise in one parameter, or a part of it."""
    other = copy.deepcopy(model)
    parameter = dict(other.named_parameters())[name]
    with torch.no_grad():
        parameter[index] += 0.3 * torch.randn(parameter[index].shape, generator=torch.Generator().manual_seed(0))
    return other


def drift_of(reference, quantized, **options):
    return component_drift(
        PrecisionPair(reference, quantized), TEXTS, **{"components": ALL, "chat": "never", **options}
    )


def test_noise_in_one_head_is_found_there_first(tiny_model):
    found = drift_of(tiny_model, noisy(tiny_model, "blocks.1.attn.W_Q", 2))
    value = dict(zip(map(name_of, found.components), found.value.tolist(), strict=True))
    untouched = [name for name in value if name.startswith("L0") or name == "layer 0"] + ["L1H0", "L1H1", "L1H3"]
    assert all(value[name] == 0 for name in untouched)
    assert value["L1H2"] > 0.01
    # Behind it everything drifts, and less than the head itself.
    after = [name for name in value if name.startswith("L2")]
    assert all(0 < value[name] < value["L1H2"] for name in after)
    assert found.top(1)["component"].item() == "L1H2"


def test_identical_models_do_not_drift(tiny_model):
    assert drift_of(tiny_model, tiny_model).relative.abs().max() == 0


@torch.no_grad()
def test_is_the_definition(tiny_model):
    quantized = apply_precision(tiny_model, "int4-g8")
    found = drift_of(tiny_model, quantized, batch_size=3)
    assert torch.allclose(found.relative, drift_of(tiny_model, quantized, batch_size=1).relative, atol=1e-5)
    tokens = PromptSet.of(TEXTS, tiny_model, chat="never").tokens
    for prompt, ids in enumerate(tokens):
        ours, theirs = (model.run_with_cache(torch.tensor([ids]))[1] for model in (tiny_model, quantized))
        for place, value in zip(found.components, found.relative[:, prompt].tolist(), strict=True):
            if name_of(place).startswith("layer"):
                sites = (Site(place.site.layer, "attn_out"), Site(place.site.layer, "mlp_out"))
                a, b = (sum(cache[str(site)][0, 1:] for site in sites) for cache in (ours, theirs))
            else:
                a, b = (cache[str(place.site)][0, 1:] for cache in (ours, theirs))
                a, b = (a, b) if place.unit is None else (a[:, place.unit], b[:, place.unit])
            assert value == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-4), place


@torch.no_grad()
def test_norm_is_that_of_what_is_added(tiny_model):
    found = drift_of(tiny_model, tiny_model)
    norm = dict(zip(map(name_of, found.components), found.norm.tolist(), strict=True))
    tokens = PromptSet.of(TEXTS, tiny_model, chat="never").tokens
    caches = [tiny_model.run_with_cache(torch.tensor([ids]))[1] for ids in tokens]
    z = torch.cat([cache["blocks.1.attn.hook_z"][0, 1:, 3] for cache in caches])
    out = z @ tiny_model.blocks[1].attn.W_O[3]
    assert norm["L1H3"] == pytest.approx(out.square().sum(1).mean().sqrt().item(), rel=1e-4)
    mlp = torch.cat([cache["blocks.2.hook_mlp_out"][0, 1:] for cache in caches])
    assert norm["L2 MLP"] == pytest.approx(mlp.square().sum(1).mean().sqrt().item(), rel=1e-4)


def test_features():
    model = handmade.model()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.embed.W_E *= 1.25
    saes, features = {Site(1): ReadOut()}, {Site(1): [0, 4]}
    prompts = ["cat no", "the dog", "mat no no"]
    found = component_drift(
        PrecisionPair(model, scaled), prompts, components=("feature",), saes=saes, features=features, chat="never"
    )
    # Feature 0 fires on "no" alone.
    assert found.relative[0, [0, 2]].tolist() == pytest.approx([0.25, 0.25], abs=1e-5)
    assert math.isnan(found.relative[0, 1])
    assert found.value[0].item() == pytest.approx(0.25, abs=1e-5)
    # 3 on three of the seven tokens, and decoder rows of length 1.
    assert found.norm[0].item() == pytest.approx(math.sqrt(3 * 9 / 7), rel=1e-4)
    assert found.table["n_prompts"].tolist()[0] == 2


def test_positions(tiny_model):
    quantized = noisy(tiny_model, "blocks.0.mlp.W_out")
    last = drift_of(tiny_model, quantized, components=(Place(Site(0, "mlp_out"), -1), Place(Site(0, "mlp_out"))))
    tokens = PromptSet.of(TEXTS, tiny_model, chat="never").tokens[0]
    with torch.no_grad():
        a, b = (
            model.run_with_cache(torch.tensor([tokens]))[1]["blocks.0.hook_mlp_out"][0, -1]
            for model in (tiny_model, quantized)
        )
    assert last.relative[0, 0].item() == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-4)
    assert last.relative[0, 0] != last.relative[1, 0]


def test_bridges_give_the_same(tiny_folder, tmp_path, tiny_model):
    other = write_checkpoint(tmp_path / "other", seed=1)
    ours = drift_of(tiny_model, load(other, device="cpu"))
    theirs = drift_of(*(load(folder, device="cpu", wrapper="bridge") for folder in (tiny_folder, other)))
    assert torch.allclose(ours.relative, theirs.relative, rtol=1e-3, atol=1e-5)
    assert torch.allclose(ours.norm, theirs.norm, rtol=1e-4)


def test_rounded_activations_drift_further(tiny_model):
    weights, both = (drift_of(tiny_model, apply_precision(tiny_model, spec)) for spec in ("int4-g8", "int4-g8+a4"))
    assert (both.value > weights.value).double().mean() > 0.9


def test_save_and_load(tiny_model, tmp_path):
    found = drift_of(tiny_model, apply_precision(tiny_model, "int4-g8"), label="four")
    back = Drift.load(found.save(tmp_path / "drift.safetensors"))
    assert back.components == found.components
    assert back.label == "four"
    assert torch.equal(back.relative, found.relative)
    assert back.table.equals(found.table)


def test_patterns_have_no_tokens(tiny_model):
    with pytest.raises(UnknownNameError, match="pairs of tokens"):
        drift_of(tiny_model, tiny_model, components=(Place(Site(0, "pattern"), None, 1),))
