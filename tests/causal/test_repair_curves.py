"""Repair curves: planted faults come first, everything restored is 1, nothing is 0, and the models are as they were."""

import math

import pytest
import torch

import tracelens
from tests.handmade import PLAIN, REFUSES
from tracelens.causal.matrices import Part, matrices, restored
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import KL, LogitDifference
from tracelens.causal.repair import RepairCurve, curve
from tracelens.causal.repair.orders import spaced_counts
from tracelens.errors import MetricInputError, PairMismatchError, PromptError, ResultFileError, UnknownNameError
from tracelens.organism import sample

QUICK = {"n_random": 3}
BY = ("importance×drift", "attribution", "attribution size")
WORDS = [" ".join(PLAIN[i : i + 2 + i % 3]) for i in range(12)]


def copy_of(model):
    return tracelens.apply_precision(model, "fp32")


def noisy(model, name, size, rows=slice(None)):
    """A copy of the model with noise in one matrix alone."""
    other = copy_of(model)
    parameter = other.get_parameter(name)
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * parameter.std() * size
    keep = torch.zeros(parameter.shape)
    keep[rows] = 1
    module, _, last = name.rpartition(".")
    setattr(
        other.get_submodule(module), last, torch.nn.Parameter(parameter.detach() + noise * keep, requires_grad=False)
    )
    return other


@pytest.fixture(scope="module")
def prompts():
    # Two lengths: prompts of one length share their passes.
    return sample(24, where=lambda p: len(p.prompt.split()) in (10, 11))


@pytest.fixture(scope="module")
def refusal(organism):
    return tracelens.behaviour.answer_tokens_for(organism.tokenizer)


@pytest.fixture(scope="module")
def pair(organism):
    return tracelens.PrecisionPair(organism, tracelens.apply_precision(organism, "int3-g32"))


@pytest.fixture(scope="module")
def layers(pair, prompts, refusal):
    return curve(pair, prompts, metric=refusal, components="layers", by=BY, **QUICK)


def first(found, order):
    return found.top(order, 1)["component"][0]


def test_a_fault_planted_in_one_matrix_is_put_first_and_restoring_it_is_all(organism, prompts, refusal):
    name = "blocks.2.attn.W_O"
    pair = tracelens.PrecisionPair(organism, noisy(organism, name, 1.0))
    by = ("attribution", "attribution size", "magnitude", "relative magnitude", "attribution per byte")
    found = curve(pair, prompts, metric=refusal, by=by, counts=(1, 5), **QUICK)
    table = found.table.set_index(["order", "count"])
    for order in by:
        assert first(found, order) == name, order
        assert table.loc[(order, 1), "recovery"] == pytest.approx(1, abs=1e-4)
        assert table.loc[(order, 1), "closed"] == pytest.approx(1, abs=1e-4)
        assert table.loc[(order, 0), "recovery"] == 0
    # What is the same in both models costs nothing.
    assert int((found.bytes > 0).sum()) == 1
    assert "not known" in found.bytes_note


def test_a_fault_planted_in_one_head_is_put_first(organism, prompts, refusal):
    # The rows of W_V's second key-value head: they feed query heads 2 and 3 of layer 1.
    pair = tracelens.PrecisionPair(organism, noisy(organism, "blocks.1.attn._W_V", 2.0, rows=1))
    by = ("attribution", "drift", "magnitude")
    found = curve(pair, prompts, metric=refusal, restore="activations", components="head", by=by, counts=(2,), **QUICK)
    table = found.table.set_index(["order", "count"])
    # All later heads drift too, since they read these; none so much, relative to what it is.
    for order in ("drift", "attribution"):
        assert set(found.top(order, 2)["component"]) == {"L1H2", "L1H3"}, order
        assert table.loc[(order, 2), "recovery"] == pytest.approx(1, abs=1e-4)
    rows = curve(pair, prompts, metric=refusal, components="rows", by="magnitude", counts=(32,), **QUICK)
    names = rows.top("magnitude", 32)["component"]
    assert set(names) == {f"blocks.1.attn._W_V row {row}" for row in range(32, 64)}
    assert rows.table.set_index(["order", "count"]).loc[("magnitude", 32), "recovery"] == pytest.approx(1, abs=1e-4)


def test_everything_is_1_and_nothing_0_in_every_order(layers):
    ends = layers.table[layers.table["count"].isin([0, 5])]
    assert ends.loc[ends["count"] == 0, "recovery"].eq(0).all()
    assert ends.loc[ends["count"] == 5, "recovery"].to_numpy() == pytest.approx(1)
    assert (layers.full.value, layers.full.low, layers.full.high) == pytest.approx((1, 1, 1))
    assert torch.equal(layers.measured[:, -1], layers.goal.expand(len(layers.orders), -1))


@pytest.mark.parametrize("components", [("attn", "mlp"), "resid_post"])
def test_all_that_the_stream_is_made_of_restored_is_1(pair, prompts, refusal, components):
    found = curve(
        pair, prompts, metric=refusal, restore="activations", components=components, by="drift", counts=(1,), **QUICK
    )
    assert found.full.value == pytest.approx(1, abs=1e-4)


def test_heads_behind_a_quantized_w_o_leave_something(pair, prompts, refusal):
    found = curve(
        pair, prompts, metric=refusal, restore="activations", components="head", by="drift", counts=(1,), **QUICK
    )
    assert found.full.value < 0.99
    assert "W_O behind restored heads" in found.verdict


def test_identical_models_have_nothing_to_repair(organism, prompts, refusal):
    same = tracelens.PrecisionPair(organism, copy_of(organism))
    for options in ({"components": "layers"}, {"restore": "activations", "components": "mlp"}):
        found = curve(same, prompts, metric=refusal, by=("attribution", "drift per byte"), **options, **QUICK)
        assert found.n_usable == 0
        assert found.table["recovery"].isna().all()
        assert found.winners("components") == found.winners("bytes") == ()
        assert "(0/0): there is nothing to repair" in found.verdict
        assert math.isnan(found.full.value)


def test_the_verdict_says_in_which_measure_an_order_wins(layers, monkeypatch):
    names = [name for name in layers.areas("components")["order"] if name not in ("random", "magnitude")]
    assert len(names) >= 2

    def areas_where(wins):
        areas = type(layers).areas

        def changed(self, axis="components", measure="recovery"):
            table = areas(self, axis, measure).copy()
            table["wins"] = [name in wins[measure] for name in table["order"]]
            return table

        return changed

    both, half = names[:2]
    monkeypatch.setattr(type(layers), "areas", areas_where({"recovery": [both], "closed": [both, half]}))
    assert f"By components, {both} (" in layers.verdict
    assert f"better of random and magnitude; {half} only in the closed gap." in layers.verdict
    monkeypatch.undo()
    monkeypatch.setattr(type(layers), "areas", areas_where({"recovery": [both], "closed": [half]}))
    assert f"none of {len(names)} orders beats " in layers.verdict
    assert f"; {half} only in the closed gap; {both} only in recovery, which overshooting adds to." in layers.verdict


def test_nested_states_are_those_of_restoring_directly(pair, prompts, refusal, layers):
    held = PromptSet.of(prompts, pair.reference)
    texts = {text: i for i, text in enumerate(held.texts)}
    rows = [texts[text] for text in layers.prompts]
    found = matrices(pair.reference, pair.quantized)
    for order in (0, layers.orders.index("random 1")):
        for k, count in enumerate(layers.counts):
            chosen = {layers.layers[i] for i in layers.order[order, :count].tolist()}
            with restored([Part(m) for m in found if m.layer in chosen]), torch.no_grad():
                for row, index in list(enumerate(rows))[:3]:
                    logits = pair.quantized(torch.tensor([held.tokens[index]]))[:, -1]
                    direct = tracelens.behaviour.margin(logits, refusal)
                    assert layers.measured[order, k, row].item() == pytest.approx(direct.item(), abs=1e-4)


def test_the_two_halves_share_no_prompt_and_the_seed_decides(pair, prompts, refusal, layers):
    assert len(layers.prompts) == layers.n_chosen_on == 12
    again = curve(pair, prompts, metric=refusal, components="layers", by=BY, **QUICK)
    assert torch.equal(again.measured, layers.measured)
    other = curve(pair, prompts, metric=refusal, components="layers", by="magnitude", seed=1, **QUICK)
    assert set(other.prompts) != set(layers.prompts)
    given = curve(
        pair, prompts[:10], choose_on=prompts[10:], metric=refusal, components="layers", by="magnitude", **QUICK
    )
    assert (len(given.prompts), given.n_chosen_on) == (10, 14)


def test_a_metric_of_each_prompt_goes_with_it_into_its_half(pair, prompts, refusal):
    n = len(prompts)
    ids = torch.arange(n) % 7 + 20
    metric = LogitDifference(tuple(ids.tolist()), tuple((ids + 1).tolist()))
    found = curve(pair, prompts, metric=metric, components="layers", by="magnitude", counts=(), **QUICK)
    held = PromptSet.of(prompts, pair.reference)
    for row, text in enumerate(found.prompts[:5]):
        index = held.texts.index(text)
        with torch.no_grad():
            logits = pair.reference(torch.tensor([held.tokens[index]]))[0, -1]
        assert found.goal[row].item() == pytest.approx(float(logits[ids[index]] - logits[ids[index] + 1]), abs=1e-4)


def test_bytes_are_what_16_bits_add(organism, layers):
    n_weights = sum(m.n_weights for m in matrices(organism, organism))
    assert float(layers.bytes.sum()) == pytest.approx(n_weights * (16 - 3.5) / 8)
    assert layers.spent[:, -1].numpy() == pytest.approx(float(layers.bytes.sum()))
    assert "adds to 3.5 bits" in layers.bytes_note


def test_bytes_of_activations_are_by_token(pair, prompts, refusal):
    found = curve(
        *(pair, prompts),
        metric=refusal,
        restore="activations",
        components=("head", "mlp"),
        at=(None, "answer"),
        by="magnitude",
        counts=(),
        **QUICK,
    )
    held = [len(PromptSet.of([p], pair.reference).tokens[0]) for p in prompts if p.prompt in "\n".join(found.prompts)]
    share = len(held) / sum(held)
    by_name = dict(zip(found.names, found.bytes.tolist(), strict=True))
    assert by_name["L0H0"] == 2 * 32
    assert by_name["L4 MLP"] == 2 * 128
    assert by_name["L4 MLP at answer"] == pytest.approx(2 * 128 * share)


def test_kl_is_measured_against_the_models_as_they_were_given(pair, prompts):
    found = curve(pair, prompts, metric=KL("quantized"), components="layers", by="magnitude", **QUICK)
    assert found.start.abs().max() < 1e-6
    assert found.goal.max() > 1e-3
    assert found.full.value == pytest.approx(1)


def test_rounding_of_activations_remains_and_is_said(organism, prompts, refusal):
    pair = tracelens.PrecisionPair(organism, tracelens.apply_precision(organism, "int4-g32+a4"))
    found = curve(pair, prompts, metric=refusal, components="layers", by="magnitude", **QUICK)
    assert abs(found.full.value - 1) > 0.02
    assert "rounds its activations" in found.verdict
    with pytest.raises(PairMismatchError, match=r"rounds its activations .*gradient='reference'"):
        curve(pair, prompts, metric=refusal, gradient="both", by="attribution", **QUICK)


def test_the_model_is_as_it_was_after_an_exception(pair, prompts):
    before = [p.detach().clone() for p in pair.quantized.parameters()]
    calls = []

    def breaking(logits):
        calls.append(None)
        if len(calls) > 12:
            raise KeyError("no")
        return logits[:, 5]

    with pytest.raises(KeyError):
        curve(pair, prompts, metric=breaking, components="matrices", by="magnitude", **QUICK)
    for ours, now in zip(before, pair.quantized.parameters(), strict=True):
        assert torch.equal(ours, now)
        assert not now.requires_grad


def test_bridges(tiny_folder):
    ours, theirs = (tracelens.load(tiny_folder, wrapper="bridge", device="cpu") for _ in range(2))
    matrix = matrices(theirs, theirs)[9]
    with torch.no_grad():
        noise = torch.randn(matrix.quantized.shape, generator=torch.Generator().manual_seed(0))
        matrix.quantized.add_(0.3 * matrix.reference.std() * noise)
    pair = tracelens.PrecisionPair(ours, theirs)
    found = curve(
        pair,
        WORDS,
        metric=REFUSES,
        by=("importance", "drift", "attribution", "magnitude"),
        counts=(1,),
        chat="never",
        **QUICK,
    )
    for order in ("attribution", "magnitude"):
        assert first(found, order) == matrix.name
        assert found.table.set_index(["order", "count"]).loc[(order, 1), "recovery"] == pytest.approx(1, abs=1e-3)
    whole = curve(pair, WORDS, metric=REFUSES, restore="activations", components="resid_post", chat="never", **QUICK)
    assert whole.full.value == pytest.approx(1, abs=1e-3)


def test_saved_and_read_again(layers, tmp_path):
    path = layers.save(tmp_path / "curve.safetensors")
    again = RepairCurve.load(path)
    assert again.verdict == layers.verdict
    assert torch.equal(again.measured, layers.measured)
    assert again.table.equals(layers.table)
    assert again.to_dict() == layers.to_dict()
    (tmp_path / "other").write_text("{}")
    with pytest.raises(ResultFileError):
        RepairCurve.load(tmp_path / "other")


def test_what_cannot_be_repaired_is_said(pair, prompts, refusal):
    with pytest.raises(UnknownNameError, match="unknown order 'luck'"):
        curve(pair, prompts, metric=refusal, by="luck")
    with pytest.raises(UnknownNameError, match="unknown order 'relative magnitude'"):
        curve(pair, prompts, metric=refusal, restore="activations", by="relative magnitude")
    with pytest.raises(UnknownNameError, match="unknown kind of weights 'heads'"):
        curve(pair, prompts, metric=refusal, components="heads")
    with pytest.raises(UnknownNameError, match="patterns"):
        curve(pair, prompts, metric=refusal, restore="activations", components="pattern")
    with pytest.raises(UnknownNameError, match=r"99 components cannot be restored; there are 5"):
        curve(pair, prompts, metric=refusal, components="layers", counts=(99,), by="magnitude")
    with pytest.raises(UnknownNameError, match="n_random is 0"):
        curve(pair, prompts, metric=refusal, n_random=0)
    with pytest.raises(PromptError, match="cannot be halved"):
        curve(pair, prompts[:1], metric=refusal)
    with pytest.raises(MetricInputError, match=r"gradient='both'"):
        curve(pair, prompts, metric=KL("reference"), components="layers", by="attribution", **QUICK)


def test_steps_are_closest_where_curves_bend():
    assert spaced_counts(1) == (1,)
    assert spaced_counts(35) == (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 35)
