"""The drift-weighted bound: against gradients by hand, what it must bound, and what it counts twice."""

import pytest
import torch

from tests.causal.test_attribution import METRIC, TOKENS, moved
from tracelens import apply_precision, load
from tracelens.causal.attribution import attribute_weights
from tracelens.causal.bound import drift_bound, drift_bounds
from tracelens.causal.bound_result import DriftBound, DriftBounds
from tracelens.causal.places import Place
from tracelens.causal.readout import KL, Function
from tracelens.errors import MemoryBudgetError, MetricInputError, PairMismatchError, ResultFileError, UnknownNameError
from tracelens.organism import sample
from tracelens.pair import PrecisionPair
from tracelens.precision.sharing import copy_sharing
from tracelens.sites import Site

WHOLE = ("head", "attn", "mlp")


@pytest.fixture(scope="module")
def wide(tiny_folder):
    return load(tiny_folder, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def damaged(wide):
    return moved(wide, 0.1)


def test_products_are_those_of_gradients_and_errors_taken_by_hand(wide, damaged):
    found = drift_bound(PrecisionPair(wide, damaged), TOKENS, metric=METRIC)
    site, prompt = Site(1, "z"), 1
    tokens = torch.tensor([TOKENS[prompt]])

    def read(extra):
        hooks = [(str(site), lambda value, hook: value + extra)]
        logits = wide.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        return logits[9] - logits[20]

    with torch.no_grad():
        error = damaged.run_with_cache(tokens)[1][str(site)] - wide.run_with_cache(tokens)[1][str(site)]
    extra = torch.zeros_like(error, requires_grad=True)
    (gradient,) = torch.autograd.grad(read(extra), extra)
    for head in range(4):
        index = found.components.index(Place(site, None, head))
        g, d = gradient[0, :, head], error[0, :, head]
        assert found.signed[index, prompt] == pytest.approx((g * d).sum().item(), rel=1e-6)
        assert found.elementwise[index, prompt] == pytest.approx((g * d).abs().sum().item(), rel=1e-6)
        assert found.norms[index, prompt] == pytest.approx((g.norm() * d.norm()).item(), rel=1e-6)


def test_the_readings_are_ordered_and_measure_the_metric(wide, damaged):
    found = drift_bound(PrecisionPair(wide, damaged), TOKENS, metric=METRIC)
    assert (found.signed.abs() <= found.elementwise + 1e-12).all()
    assert (found.elementwise <= found.norms + 1e-12).all()
    assert found.norms.min() > 0
    with torch.no_grad():
        for i, ids in enumerate(TOKENS):
            for name, model in (("reference", wide), ("quantized", damaged)):
                logits = model(torch.tensor([ids]))[0, -1]
                assert getattr(found, name)[i] == pytest.approx(float(logits[9] - logits[20]), rel=1e-6)
    assert torch.equal(found.measured, (found.quantized - found.reference).abs())


def test_small_errors_never_exceed_the_bound_and_large_ones_may(wide):
    small = {f"noise {size}": moved(wide, size) for size in (1e-4, 1e-3)}
    bounds = drift_bounds(wide, small, TOKENS, metric=METRIC, errors="local", components=WHOLE)
    for one in bounds.values():
        assert (one.measured <= 1.01 * one.bound("elementwise")).all()
        assert (one.bound("elementwise") <= one.bound("norms")).all()
    # Ten times the error, ten times the bound.
    ratio = bounds["noise 0.001"].bound() / bounds["noise 0.0001"].bound()
    assert ((ratio - 10).abs() < 0.2).all()


def test_a_change_beyond_the_bound_is_counted(wide, damaged):
    """It is first order: a metric that is flat at the reference and not elsewhere moves by more than the bound says."""
    pair = PrecisionPair(wide, damaged)
    plain = drift_bound(pair, TOKENS, metric=METRIC)
    prompts = TOKENS[:1]

    def bowl(logits):
        return (logits[:, 9] - logits[:, 20] - plain.reference[0] + 1e-6) ** 2

    found = drift_bound(pair, prompts, metric=Function(bowl, "bowl"))
    assert found.summary()["violated"].value == 1
    assert found.summary()["violated"].n == 1


def test_local_errors_are_counted_once_and_total_ones_again_downstream(wide):
    """One wrong matrix in the first layer: local errors say it once, total errors in every component behind it too."""
    pair = PrecisionPair(wide, moved(wide, 1e-4, only=("blocks.0.mlp.W_out",)))
    local = drift_bound(pair, TOKENS, metric=METRIC, errors="local", components=WHOLE)
    total = drift_bound(pair, TOKENS, metric=METRIC)
    first = local.components.index(Place(Site(0, "mlp_out")))
    rest = [i for i in range(len(local.components)) if i != first]
    assert local.elementwise[rest].max() < 1e-9 * local.elementwise[first].min()
    assert torch.allclose(local.signed.sum(0), local.quantized - local.reference, rtol=1e-2)
    behind = [i for i, place in enumerate(total.components) if place.site.layer > 0]
    before = [i for i, place in enumerate(total.components) if place.site.layer == 0 and place.site.name == "z"]
    assert total.elementwise[behind].min() > 0
    assert not total.elementwise[before].any()
    double = total.components.index(Place(Site(0, "mlp_out")))
    assert torch.allclose(total.signed[double], local.signed[first], rtol=1e-6)
    assert (total.bound() > 1.2 * local.bound()).all()


def test_local_errors_add_up_to_the_attribution_of_the_weights(wide):
    pair = PrecisionPair(wide, moved(wide, 1e-4))
    local = drift_bound(pair, TOKENS, metric=METRIC, errors="local", components=WHOLE)
    weights = attribute_weights(pair, TOKENS, metric=METRIC)
    scale = weights.first_order.abs().sum(0)
    assert ((local.signed.sum(0) - weights.total).abs() < 1e-3 * scale).all()


def test_an_identical_pair_has_no_ratio(wide):
    for errors in ("total", "local"):
        found = drift_bound(PrecisionPair(wide, copy_sharing(wide, {})), TOKENS, metric=METRIC, errors=errors)
        assert not found.bound().any()
        assert not found.measured.any()
        summary = found.summary()
        assert summary["n_usable"] == 0
        assert found.n_undetermined == len(TOKENS)
        assert summary["looseness"].value != summary["looseness"].value
        assert found.table["share"].isna().all()


@pytest.mark.parametrize("precision", [None, "int8-dynamic"])
def test_a_bridge_gives_the_same_as_the_hooked_model(tiny_folder, precision):
    results = []
    for wrapper in ("hooked", "bridge"):
        reference = load(tiny_folder, device="cpu", wrapper=wrapper)
        quantized = rounded(reference, precision)
        pair = PrecisionPair(reference, quantized)
        results += [drift_bound(pair, TOKENS, metric=METRIC, errors=errors) for errors in ("total", "local")]
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        assert ours.components == theirs.components
        assert ours.elementwise.max() > 0
        for name in ("signed", "elementwise", "norms", "quantized"):
            off = (getattr(ours, name) - getattr(theirs, name)).abs() / getattr(ours, name).abs().max()
            # Where rounding is, numbers that differ in their last bit may now and then be rounded to different steps.
            assert off.max() < (2e-4 if precision is None else 0.1)
            assert (off < 2e-4).double().mean() > 0.8


def rounded(model, precision):
    """Rounded activations alone, which both wrappers have, or all norms a little larger."""
    if precision is None:
        norms = {n: p.detach() * 1.05 for n, p in model.named_parameters() if "ln1.w" in n or "input_layernorm" in n}
        return copy_sharing(model, norms)
    from tracelens.precision import parse
    from tracelens.precision.activations import simulate_activations

    made = copy_sharing(model, {})
    simulate_activations(made, parse("int4+a8"))
    return made


def test_one_gradient_pass_serves_all_precisions(wide, damaged):
    other = moved(wide, 0.2, seed=1)
    passes = []
    handle = wide.unembed.register_forward_hook(lambda module, args, out: passes.append(out.requires_grad))
    try:
        bounds = drift_bounds(wide, {"a": damaged, "b": other}, TOKENS, metric=METRIC)
    finally:
        handle.remove()
    assert sum(passes) == 2  # prompts of two lengths
    for name, model in (("a", damaged), ("b", other)):
        alone = drift_bound(PrecisionPair(wide, model), TOKENS, metric=METRIC)
        assert torch.equal(alone.elementwise, bounds[name].elementwise)
    table = bounds.to_dataframe()
    assert list(table["precision"]) == ["a", "b"]
    assert (table["bound"] > table["measured"]).all()


def test_a_small_budget_takes_smaller_batches_and_gives_the_same(wide, damaged):
    pair = PrecisionPair(wide, damaged)
    whole = drift_bound(pair, TOKENS * 4, metric=METRIC.__class__((9,) * 16, (20,) * 16))
    parts = drift_bound(pair, TOKENS * 4, metric=METRIC.__class__((9,) * 16, (20,) * 16), memory_budget=600_000)
    assert torch.allclose(whole.elementwise, parts.elementwise, rtol=1e-9)
    with pytest.raises(MemoryBudgetError, match="MiB"):
        drift_bound(pair, TOKENS, metric=METRIC, memory_budget=1000)


def test_parameters_are_as_they_were_afterwards(wide, damaged):
    watched = wide.blocks[0].attn.W_Q
    watched.requires_grad_(True)
    try:
        drift_bound(PrecisionPair(wide, damaged), TOKENS, metric=METRIC)
        assert [n for n, p in wide.named_parameters() if p.requires_grad] == ["blocks.0.attn.W_Q"]
        assert watched.grad is None
        assert torch.is_grad_enabled()
    finally:
        watched.requires_grad_(False)


def test_a_planted_head_carries_it(organism):
    """Noise on one head's part of W_V: locally, that head alone has an error."""
    name = "blocks.3.attn._W_V"
    weight = dict(organism.named_parameters())[name].detach().clone()
    weight[1] += 0.5 * weight.std() * torch.randn(weight[1].shape, generator=torch.Generator().manual_seed(0))
    pair = PrecisionPair(organism, copy_sharing(organism, {name: weight}))
    found = drift_bound(pair, sample(12), errors="local")
    # Two query heads read each key-value head.
    assert set(found.top(2)["component"]) == {"L3H2", "L3H3"}
    assert found.top(2)["share"].sum() > 0.999


def test_organism_precisions_follow_the_bound(organism):
    quantized = {spec: apply_precision(organism, spec) for spec in ("int8", "int2-g32")}
    bounds = drift_bounds(
        organism,
        quantized,
        sample(24, where=lambda p: len(p.prompt.split()) in (10, 11)),
        errors="local",
        components=WHOLE,
    )
    assert bounds["int8"].bound().mean() < 0.1 * bounds["int2-g32"].bound().mean()
    assert bounds["int8"].summary()["violated"].value == 0
    assert bounds["int8"].summary()["signed_pearson"] > 0.99


def test_results_are_saved_whole(wide, damaged, tmp_path):
    bounds = drift_bounds(wide, {"a": damaged, "b": moved(wide, 0.2)}, TOKENS, metric=METRIC)
    again = DriftBounds.load(bounds.save(tmp_path / "bounds.safetensors"))
    assert again.to_dict() == bounds.to_dict()
    assert again.to_dataframe().equals(bounds.to_dataframe())
    one = DriftBound.load(bounds["b"].save(tmp_path / "bound.safetensors"))
    assert one.components == bounds["b"].components
    assert one.table.equals(bounds["b"].table)
    assert "b, total errors" in repr(one)
    with pytest.raises(ResultFileError, match="tracelens_drift_bounds"):
        DriftBounds.load(tmp_path / "bound.safetensors")


def test_what_does_not_fit_is_refused(wide, damaged, organism):
    pair = PrecisionPair(wide, damaged)
    with pytest.raises(UnknownNameError, match="kind of errors"):
        drift_bound(pair, TOKENS, metric=METRIC, errors="own")
    with pytest.raises(UnknownNameError, match="at least one"):
        drift_bounds(wide, {}, TOKENS, metric=METRIC)
    with pytest.raises(UnknownNameError, match="activations of its own"):
        drift_bound(pair, TOKENS, metric=METRIC, components=("layer",))
    with pytest.raises(UnknownNameError, match="positions"):
        drift_bound(pair, TOKENS, metric=METRIC, components=(Place(Site(0, "mlp_out"), -1),))
    with pytest.raises(MetricInputError, match="no gradient"):
        drift_bound(pair, TOKENS, metric=Function(lambda logits: logits.argmax(-1).double(), "best"))
    with pytest.raises(UnknownNameError, match="quantized"):
        drift_bound(pair, TOKENS, metric=KL("quantized"))
    with pytest.raises(PairMismatchError):
        drift_bounds(wide, {"other": organism}, TOKENS, metric=METRIC)
    with pytest.raises(UnknownNameError, match="precision"):
        drift_bounds(wide, {"a": damaged}, TOKENS, metric=METRIC)["b"]
    with pytest.raises(UnknownNameError, match="kind of bound"):
        drift_bound(pair, TOKENS, metric=METRIC).bound("l1")
