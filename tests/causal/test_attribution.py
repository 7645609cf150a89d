"""First-order attribution to weights: against finite differences, autograd, exact restoring and planted faults."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.handmade import REFUSES
from tests.handmade import model as handmade
from tests.tiny import write_checkpoint
from tracelens import apply_precision, load
from tracelens.causal.attribution import attribute_weights
from tracelens.causal.attribution_check import AttributionCheck
from tracelens.causal.attribution_result import WeightAttribution, kind_of_name
from tracelens.causal.matrices import matrices
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import KL, Function, LogitDifference
from tracelens.errors import (
    MemoryBudgetError,
    MetricInputError,
    PairMismatchError,
    PromptError,
    ResultFileError,
    UnknownNameError,
)
from tracelens.organism import sample
from tracelens.pair import PrecisionPair
from tracelens.precision.sharing import copy_sharing

TOKENS = [[4, 9, 17], [5, 11, 30, 8, 21], [7, 3, 12], [6, 22, 10, 14, 31]]
METRIC = LogitDifference((9,) * 4, (20,) * 4)


@pytest.fixture(scope="module")
def wide(tiny_folder):
    """Two layers more than one, GQA, in float64: finite differences are then exact to many digits."""
    return load(tiny_folder, device="cpu", dtype=torch.float64)


def moved(model, size, seed=0, only=None):
    """The model with noise of relative size `size` on all of its matrices, or on those named."""
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for matrix in matrices(model, model):
        noise = torch.randn(matrix.reference.shape, generator=generator, dtype=torch.float64)
        if only is None or matrix.name in only:
            weight = matrix.reference.detach()
            new[matrix.name] = (weight.double() * (1 + size * noise)).to(weight)
    return copy_sharing(model, new)


@pytest.mark.parametrize("at", ["reference", "quantized", "both"])
def test_first_order_is_the_limit_of_small_errors(wide, at):
    errors = {}
    for size in (1e-2, 1e-3):
        found = attribute_weights(PrecisionPair(wide, moved(wide, size)), TOKENS, metric=METRIC, at=at)
        errors[size] = float((found.unattributed.abs() / found.change.abs()).max())
    # The remainder is of second order in the error, with the trapezoid of third; the change of first.
    order = 80 if at == "both" else 8
    assert errors[1e-3] < errors[1e-2] / order
    assert errors[1e-3] < 0.05


def test_each_matrix_alone_gives_its_own_change(wide):
    quantized = moved(wide, 1e-5)
    pair = PrecisionPair(wide, quantized)
    at_reference = attribute_weights(pair, TOKENS, metric=METRIC)
    at_quantized = attribute_weights(pair, TOKENS, metric=METRIC, at="quantized")
    for found, how in ((at_reference, "alone"), (at_quantized, "restore")):
        check = found.check(pair, TOKENS, metric=METRIC)
        assert check.how == how
        assert check.exact.abs().min() > 0
        # A hundredth of the matrix's own largest change: some prompts hardly move.
        scale = check.exact.abs().amax(1, keepdim=True)
        assert ((check.predicted - check.exact).abs() < 0.01 * scale).all()
        assert check.summary["slope"] == pytest.approx(1, abs=1e-3)
        assert check.summary["ranks"].value > 0.99


def test_per_prompt_sums_are_the_gradient_of_the_whole_set(wide):
    quantized = moved(wide, 0.3)
    found = attribute_weights(PrecisionPair(wide, quantized), TOKENS, metric=METRIC)
    # Another way to the same number: one backward pass of the sum over padded-free prompts, the parameters' own gradients.
    model = copy.deepcopy(wide).requires_grad_(True)
    sum((out := model(torch.tensor([ids]))[0, -1])[9] - out[20] for ids in TOKENS).backward()
    theirs = dict(quantized.named_parameters())
    for name, parameter in model.named_parameters():
        if name in found.names:
            expected = (parameter.grad * (theirs[name] - parameter)).sum()
            assert found.first_order[found.names.index(name)].sum() == pytest.approx(expected.item(), rel=1e-9)


def test_rows_columns_and_heads_add_up(wide):
    found = attribute_weights(PrecisionPair(wide, moved(wide, 0.1)), TOKENS, metric=METRIC, rows=True)
    for index, name in enumerate(found.names):
        rows, columns = found.rows(name), found.columns(name)
        assert (len(rows), len(columns)) == found.shapes[index]
        for part in (rows, columns):
            assert torch.allclose(part.sum(0).double(), found.first_order[index], rtol=1e-3, atol=1e-7)
        if ".attn." in name:
            heads = found.heads(name)
            assert len(heads) == (2 if kind_of_name(name) in ("W_K", "W_V") else 4)
            assert torch.allclose(heads.sum(0).double(), found.first_order[index], rtol=1e-3, atol=1e-7)
    assert torch.allclose(found.by_layer().sum(0), found.first_order.sum(0))
    assert torch.allclose(sum(found.by_kind().values()), found.first_order.sum(0))
    with pytest.raises(UnknownNameError, match="no attention matrix"):
        found.heads("blocks.0.mlp.W_in")


def test_a_head_that_alone_is_changed_has_all_of_it(wide):
    name = "blocks.1.attn.W_O"
    weight = next(m for m in matrices(wide, wide) if m.name == name).reference.detach().clone()
    weight[2] *= 1.2
    found = attribute_weights(PrecisionPair(wide, copy_sharing(wide, {name: weight})), TOKENS, metric=METRIC, rows=True)
    heads = found.heads(name)
    assert heads[2].abs().min() > 0
    assert not heads[[0, 1, 3]].any()


def test_a_row_that_alone_is_changed_has_all_of_it(wide):
    name = "blocks.0.attn._W_K"
    matrix = next(m for m in matrices(wide, wide) if m.name == name)
    flat = matrix.flat(matrix.reference.detach().clone())
    flat[9] += 0.1
    pair = PrecisionPair(wide, copy_sharing(wide, {name: matrix.unflat(flat)}))
    rows = attribute_weights(pair, TOKENS, metric=METRIC, rows=True).rows(name)
    assert rows[9].any()
    assert not rows[[i for i in range(len(rows)) if i != 9]].any()


def test_rows_that_were_not_kept_are_refused(wide):
    found = attribute_weights(PrecisionPair(wide, moved(wide, 0.1)), TOKENS, metric=METRIC)
    with pytest.raises(UnknownNameError, match="rows=True"):
        found.rows(found.names[0])


def linear():
    """The handmade model with a last MLP that adds W_out relu(b) of a fixed hidden layer: logits are linear in W_out."""
    model = handmade(1)
    model.blocks[0].mlp.W_in.zero_()
    model.blocks[0].mlp.b_in.copy_(torch.linspace(0.5, 2, 16))
    return model


def test_first_order_is_exact_where_the_metric_is_linear():
    model = linear()
    noise = torch.randn(16, 24, generator=torch.Generator().manual_seed(4))
    quantized = copy_sharing(model, {"blocks.0.mlp.W_out": noise})
    pair = PrecisionPair(model, quantized)
    right, wrong = (model.unembed.W_U[:, side[0]] for side in (REFUSES.positive, REFUSES.negative))
    expected = float(torch.linspace(0.5, 2, 16) @ noise @ (right - wrong))
    for at in ("reference", "quantized"):
        found = attribute_weights(pair, ["yes", "no"], metric=REFUSES, at=at, chat="never")
        assert torch.allclose(found.total, found.change, atol=1e-5)
        assert found.change.abs().min() > 0.1
        assert torch.allclose(found.total, torch.full_like(found.total, expected), atol=1e-4)


def test_identical_models_show_nothing(organism):
    pair = PrecisionPair(organism, organism)
    found = attribute_weights(pair, sample(4), at="both")
    assert len(found.names) == 35
    assert not found.first_order.any()
    assert not found.change.any()
    assert found.effects.n_usable == 0
    assert found.table["effect"].isna().all()
    assert found.table["p_adjusted"].isna().all()
    assert found.summary["pearson"] != found.summary["pearson"]
    assert found.order() == list(found.names)
    check = found.check(pair, sample(4), names=found.names[:2])
    assert not check.exact.any()
    assert check.summary["best"] is None
    assert "nan" in repr(check)


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_noise_in_one_matrix_is_located(wrapper):
    model = load("organism", wrapper=wrapper)
    names = [matrix.name for matrix in matrices(model, model)]
    planted = names[17]
    quantized = copy.deepcopy(model)
    parameters = {name.replace("._original_component", ""): p for name, p in quantized.named_parameters()}
    with torch.no_grad():
        weight = parameters[planted]
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = attribute_weights(PrecisionPair(model, quantized), sample(8), at="both")
    assert found.order()[0] == planted == found.top(1)["name"][0]
    assert not found.first_order[[i for i, name in enumerate(names) if name != planted]].any()
    row = found.table.set_index("name").loc[planted]
    assert 0.9 < row["effect"] < 1.1


def test_a_large_fault_under_quantization_noise_comes_first(organism):
    quantized = apply_precision(organism, "int8")
    name = "blocks.2.mlp.W_out"
    weight = dict(quantized.named_parameters())[name].detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    broken = copy.deepcopy(quantized)
    with torch.no_grad():
        dict(broken.named_parameters())[name].add_(0.6 * weight.std() * noise)
    pair = PrecisionPair(organism, broken)
    for at in ("reference", "quantized"):
        found = attribute_weights(pair, sample(12, where=lambda p: len(p.prompt.split()) in (10, 11)), at=at)
        assert found.order()[0] == name
        assert found.names[int(found.first_order.abs().mean(1).argmax())] == name


def test_a_bridge_gives_the_same_as_the_hooked_model(tiny_folder):
    hooked = load(tiny_folder, device="cpu")
    bridge = load(tiny_folder, device="cpu", wrapper="bridge")
    noisy = moved(hooked, 0.2)
    same = copy.deepcopy(bridge)
    pairs = list(zip(matrices(hooked, noisy), matrices(same, same), strict=True))
    order = {
        "W_Q": "q_proj",
        "W_K": "k_proj",
        "W_V": "v_proj",
        "W_O": "o_proj",
        "W_in": "up_proj",
        "W_gate": "gate_proj",
    }
    order["W_out"] = "down_proj"
    theirs = {(m.layer, kind_of_name(m.name)): m for _, m in pairs}
    with torch.no_grad():
        for ours, _ in pairs:
            other = theirs[ours.layer, order[kind_of_name(ours.name)]]
            other.reference.copy_(other.unflat(ours.flat(ours.quantized)))
    found = attribute_weights(PrecisionPair(hooked, noisy), TOKENS, metric=METRIC, rows=True, at="both")
    bridged = attribute_weights(PrecisionPair(bridge, same), TOKENS, metric=METRIC, rows=True, at="both")
    assert torch.allclose(found.change, bridged.change, atol=1e-5)
    for name in found.names:
        matrix = next(m for m, _ in pairs if m.name == name)
        other = theirs[matrix.layer, order[kind_of_name(name)]].name
        assert torch.allclose(
            found.first_order[found.names.index(name)],
            bridged.first_order[bridged.names.index(other)],
            rtol=1e-3,
            atol=1e-5,
        )
        assert torch.allclose(found.rows(name), bridged.rows(other), rtol=1e-3, atol=1e-5)
        if ".attn." in name:
            assert torch.allclose(found.heads(name), bridged.heads(other), rtol=1e-3, atol=1e-5)


def test_rounding_of_activations_stays_and_is_left_unattributed(organism):
    """With activations rounded the gradient at the quantized model still predicts what restoring a matrix gives."""
    pair = PrecisionPair(organism, apply_precision(organism, "int4-g32+a8"))
    prompts = sample(64, where=lambda p: len(p.prompt.split()) in (10, 11))
    found = attribute_weights(pair, prompts, at="quantized")
    check = found.check(pair, prompts, names=found.names[:14:2])
    # Restoring one matrix also rounds everything behind it anew, which no gradient sees: less than the 0.99 without rounding,
    # and a slope below 1.
    assert check.summary["pearson"] > 0.8
    assert 0.7 < check.summary["slope"] < 1.1
    # Activations alone: no weight differs, and all of the change is left.
    found = attribute_weights(PrecisionPair(organism, apply_precision(organism, "int8-dynamic")), prompts)
    alone = PrecisionPair(organism, rounding_only(organism))
    rest = attribute_weights(alone, prompts)
    assert found.first_order.any()
    assert not rest.first_order.any()
    assert rest.change.any()
    assert torch.equal(rest.unattributed, rest.change)


def rounding_only(model):
    """Activations rounded to 8 bits, weights as they are."""
    from tracelens.precision import parse
    from tracelens.precision.activations import simulate_activations

    made = copy_sharing(model, {})
    simulate_activations(made, parse("int4+a4"))
    return made


def test_embeddings_biases_and_norms_have_entries_of_their_own(wide):
    named = dict(wide.named_parameters())
    new = {name: named[name].detach() * 1.001 for name in ("embed.W_E", "blocks.1.ln2.w", "unembed.W_U", "ln_final.w")}
    found = attribute_weights(PrecisionPair(wide, copy_sharing(wide, new)), TOKENS, metric=METRIC, at="both")
    assert set(found.others) == set(new)
    assert not found.first_order.any()
    assert (found.unattributed.abs() < 1e-3 * found.change.abs()).all()
    assert found.summary["others"].value == pytest.approx(float(found.total.mean()))


def test_parameters_are_as_they_were_afterwards(wide):
    quantized = moved(wide, 0.1)
    before = {name: p.detach().clone() for name, p in quantized.named_parameters()}
    watched = wide.blocks[0].mlp.W_in
    watched.requires_grad_(True)
    watched.grad = kept = torch.ones_like(watched)
    # No matrix: it asks for gradients, and is to get none.
    bystander = wide.embed.W_E
    bystander.requires_grad_(True)
    pair = PrecisionPair(wide, quantized)
    try:
        found = attribute_weights(pair, TOKENS, metric=METRIC, at="both")
        found.check(pair, TOKENS, metric=METRIC)
        assert watched.grad is kept
        assert bool((kept == 1).all())
        assert [n for n, p in wide.named_parameters() if p.requires_grad] == ["embed.W_E", "blocks.0.mlp.W_in"]
        assert bystander.grad is None
        assert not any(p.requires_grad or p.grad is not None for p in quantized.parameters() if p is not bystander)
        for name, p in quantized.named_parameters():
            assert torch.equal(p, before[name])
    finally:
        watched.grad = None
        watched.requires_grad_(False)
        bystander.requires_grad_(False)


def test_the_divergence_from_the_reference_has_its_gradient_at_the_quantized_model(wide):
    pair = PrecisionPair(wide, moved(wide, 0.1))
    assert attribute_weights(pair, TOKENS, metric=KL("reference")).first_order.abs().max() < 1e-9
    found = attribute_weights(pair, TOKENS, metric=KL("reference"), at="quantized")
    # A quadratic form: the gradient at the far end predicts twice the change.
    assert found.summary["slope"] == pytest.approx(2, abs=0.5)


def test_results_are_saved_whole(wide, tmp_path):
    pair = PrecisionPair(wide, moved(wide, 0.1))
    found = attribute_weights(pair, TOKENS, metric=METRIC, at="both", rows=True)
    check = found.check(pair, TOKENS, metric=METRIC, names=found.names[:5])
    for one in (found, check):
        path = one.save(tmp_path / "result.safetensors")
        again = type(one).load(path)
        assert again.to_dict() == one.to_dict()
        assert again.table.equals(one.table)
    again = WeightAttribution.load(found.save(tmp_path / "result.safetensors"))
    assert torch.equal(again.at_reference, found.at_reference)
    assert torch.equal(again.rows(found.names[3]), found.rows(found.names[3]))
    with pytest.raises(ResultFileError, match="tracelens_attribution_check"):
        AttributionCheck.load(tmp_path / "result.safetensors")


def test_what_does_not_fit_is_refused(wide):
    pair = PrecisionPair(wide, moved(wide, 0.1))
    with pytest.raises(UnknownNameError, match="base point"):
        attribute_weights(pair, TOKENS, metric=METRIC, at="middle")
    with pytest.raises(MemoryBudgetError, match="MiB"):
        attribute_weights(pair, TOKENS, metric=METRIC, memory_budget=1000)
    with pytest.raises(MetricInputError, match="no gradient"):
        attribute_weights(pair, TOKENS, metric=Function(lambda logits: logits.argmax(-1).double(), "best"))
    with pytest.raises(MetricInputError, match="NaN"):
        attribute_weights(pair, TOKENS, metric=Function(lambda logits: logits[:, 0] * torch.nan))
    with pytest.raises(PromptError):
        attribute_weights(pair, [], metric=METRIC)
    found = attribute_weights(pair, TOKENS, metric=METRIC)
    with pytest.raises(PairMismatchError, match="same prompts"):
        found.check(pair, TOKENS[:2], metric=LogitDifference((9, 9), (20, 20)))
    with pytest.raises(PairMismatchError, match="pair it was made of"):
        found.check(PrecisionPair(moved(wide, 0.5, seed=3), wide), TOKENS, metric=METRIC)
    with pytest.raises(UnknownNameError, match="weight matrix"):
        found.check(pair, TOKENS, metric=METRIC, names=["blocks.9.attn.W_Q"])
    with pytest.raises(UnknownNameError, match="check"):
        found.check(pair, TOKENS, metric=METRIC, how="both")
    with pytest.raises(MetricInputError, match="shape"):
        replace(found, first_order=found.first_order[:3])


def test_prompts_of_a_set_pass_through(wide):
    prompts = PromptSet.of(TOKENS, wide)
    pair = PrecisionPair(wide, moved(wide, 0.1))
    one, other = (attribute_weights(pair, each, metric=METRIC) for each in (TOKENS, prompts))
    assert torch.equal(one.first_order, other.first_order)


@pytest.mark.parametrize(("architecture", "wrapper"), [("GPT2LMHeadModel", "bridge"), ("MixtralForCausalLM", "hooked")])
def test_other_layouts_of_weights_are_attributed_too(tmp_path, architecture, wrapper):
    """Weights that lie (in, out), as GPT-2's do, and experts of which a token sees some."""
    model = load(write_checkpoint(tmp_path / "model", architecture), device="cpu", wrapper=wrapper)
    quantized = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in matrices(quantized, quantized):
            noise = torch.randn(matrix.reference.shape, generator=generator)
            matrix.reference.mul_(1 + 2e-3 * noise)
    pair = PrecisionPair(model, quantized)
    found = attribute_weights(pair, TOKENS, metric=METRIC, at="both")
    assert found.change.abs().min() > 0
    assert found.summary["slope"] == pytest.approx(1, abs=0.05)
    names = found.names[::5]
    check = attribute_weights(pair, TOKENS, metric=METRIC).check(pair, TOKENS, metric=METRIC, names=names)
    assert check.summary["slope"] == pytest.approx(1, abs=0.1)
    assert check.summary["pearson"] > 0.98
