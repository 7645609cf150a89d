import pytest
import torch
from torch import nn

from tests.test_audit import tiny  # noqa: F401
from tests.tiny import TEXTS
from tracelens import Site, load
from tracelens.errors import MetricInputError, UnknownNameError
from tracelens.precision import apply_precision
from tracelens.precision.grids import round_to_integers
from tracelens.studies.neurons import neuron_muting

PROMPTS = {"refusal": TEXTS[:2], "baseline": TEXTS[2:]}
PLAIN = {"chat": "never", "min_active": 1}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load(tiny_folder, device="cpu")


def by_hand(model, quantized, layer, share=0.1):
    """Counts from the caches of single prompts; the value before the rounding is computed anew from what is not rounded."""
    act = nn.functional.silu
    values = {"reference": [], "before": [], "after": []}
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        keep = slice(1, None) if ids[0, 0] == model.tokenizer.bos_token_id else slice(None)
        with torch.no_grad():
            _, ours = model.run_with_cache(ids)
            _, theirs = quantized.run_with_cache(ids)
        name = f"blocks.{layer}.mlp"
        values["reference"].append(ours[f"{name}.hook_post"][0, keep])
        values["after"].append(theirs[f"{name}.hook_post"][0, keep])
        values["before"].append((act(theirs[f"{name}.hook_pre"]) * theirs[f"{name}.hook_pre_linear"])[0, keep])
    r, before, after = (torch.cat(values[name]) for name in ("reference", "before", "after"))
    level = share * r.abs().amax(0)
    fired, gone, would = r.abs() > level, after.abs() <= level, before.abs() > level
    return fired.sum(0), (fired & gone & ~would).sum(0), (fired & gone & would).sum(0), (before, after)


@pytest.mark.parametrize("spec", ["fp32+a4", "int4+a8", "int4+a4"])
def test_causes_are_those_of_the_values_on_both_sides_of_the_rounding(model, spec):
    quantized = apply_precision(model, spec)
    trace = neuron_muting(model, quantized, PROMPTS, **PLAIN)
    total = 0
    for layer in range(model.cfg.n_layers):
        n, moved, clipped, (before, after) = by_hand(model, quantized, layer)
        # The premise: what the hook does is round this value.
        torch.testing.assert_close(round_to_integers(before, 4 if "a4" in spec else 8), after)
        rows = trace.table[trace.table["site"] == str(Site(layer, "mlp_post"))].set_index("unit").sort_index()
        assert rows.index.tolist() == n.nonzero().squeeze(1).tolist()
        for column, expected in (("n_active", n), ("n_moved", moved), ("n_clipped", clipped)):
            assert rows[column].tolist() == expected[n > 0].tolist()
        total += int(clipped.sum())
    assert trace.causes["clipped"] == total
    assert total > 0 or "a8" in spec


def test_nothing_is_clipped_where_only_weights_are_rounded(model):
    trace = neuron_muting(model, apply_precision(model, "int2"), PROMPTS, **PLAIN)
    assert trace.causes["clipped"] == 0
    assert trace.causes["moved"] > 0
    assert set(trace.table["cause"]) == {"moved", ""}


def test_identical_models_mute_nothing(model):
    trace = neuron_muting(model, model, PROMPTS, **PLAIN)
    assert (trace.table["muting_rate"] == 0).all()
    assert trace.unit == "neuron"
    assert len(trace.table) == model.cfg.n_layers * model.cfg.d_mlp


def test_a_neuron_that_is_cut_off_is_muted(model):
    from tracelens.precision.sharing import copy_sharing

    weight = model.blocks[1].mlp.W_in.detach().clone()
    weight[:, [3, 17]] = 0
    trace = neuron_muting(
        model, copy_sharing(model, {"blocks.1.mlp.W_in": weight}), PROMPTS, sites=["blocks.1.mlp.hook_post"], **PLAIN
    )
    assert trace.muted["unit"].tolist() in ([3, 17], [17, 3])
    assert (trace.table["muting_rate"] > 0).sum() == 2


def test_the_hypothetical_grid_is_what_rounding_the_activations_would_do(model):
    """With nothing but 4-bit activations, layer 0 of the quantized model rounds very nearly the reference's own values."""
    site = Site(0, "mlp_post")
    trace = neuron_muting(model, model, PROMPTS, sites=[site], fires_above=0.0, bits=(4,), **PLAIN)
    values = []
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            _, cache = model.run_with_cache(ids)
        values.append(cache[str(site)][0, int(ids[0, 0] == model.tokenizer.bos_token_id) :])
    x = torch.cat(values)
    zeroed = (round_to_integers(x, 4) == 0) & (x != 0)
    assert trace.clipping["firings_clipped"][0] == pytest.approx(zeroed.sum().item() / (x != 0).sum().item(), abs=1e-3)


def test_a_bridge_gives_the_same(tiny_folder, model):
    """In the first layer; behind it, differences in the last bit have flipped codes of four bits."""
    bridge = load(tiny_folder, device="cpu", wrapper="bridge")
    found, expected = (
        neuron_muting(m, apply_precision(m, "fp32+a4"), PROMPTS, sites=[Site(0, "mlp_post")], **PLAIN).table
        for m in (bridge, model)
    )
    assert found["n_active"].sum() == expected["n_active"].sum()
    for cause in ("n_moved", "n_clipped"):
        assert found[cause].sum() > 0
        assert abs(found[cause].sum() - expected[cause].sum()) <= 3


def test_bad_input(model):
    with pytest.raises(MetricInputError, match=r"fires_above is 1.0; expected a share"):
        neuron_muting(model, model, PROMPTS, fires_above=1.0, **PLAIN)
    with pytest.raises(UnknownNameError, match="no_such_site"):
        neuron_muting(model, model, PROMPTS, sites=["no_such_site"], **PLAIN)
