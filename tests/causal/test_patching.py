"""Patching within a model and across precisions: nothing is 0, everything 1, a planted fault comes first, an oracle agrees."""

import dataclasses
import math

import pytest
import torch

import tracelens
from tests.naive_patching import kept, naive, run
from tests.tiny import TEXTS, tiny_tokenizer, write_checkpoint
from tracelens.causal.contrasts import Contrasts
from tracelens.causal.corruptions import EmbeddingNoise
from tracelens.causal.patching import activation_patching, cross_precision_patching
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet
from tracelens.causal.readout import KL, Function
from tracelens.errors import MemoryBudgetError, MetricInputError, UnknownNameError
from tracelens.organism import sample
from tracelens.pair import PrecisionPair
from tracelens.precision.sharing import copy_sharing
from tracelens.sites import Site

TOLERANCE = 1e-5


def difference(logits):
    return logits[..., 5] - logits[..., 9]


OPTIONS = {"metric": difference, "chat": "never", "placebo": None}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, and one with other weights in every place but the embedding and unembedding."""
    folder = tmp_path_factory.mktemp("patching")
    ours, theirs = (tracelens.load(write_checkpoint(folder / str(s), seed=s), device="cpu") for s in (0, 1))
    for name in ("embed.W_E", "unembed.W_U", "unembed.b_U", "ln_final.w"):
        theirs.get_parameter(name).data = ours.get_parameter(name).data
    return ours, theirs


@pytest.fixture(scope="module")
def pair(models):
    return PrecisionPair(*models)


@pytest.fixture(scope="module")
def organism_pair(organism):
    return PrecisionPair(organism, tracelens.apply_precision(organism, "int2-g32"))


@pytest.mark.parametrize("direction", ["repair", "damage"])
def test_everything_is_1_and_nothing_0(organism_pair, direction):
    prompts = sample(12, "refusal", seed=1)
    everything = cross_precision_patching(organism_pair, prompts, layers=[-1], direction=direction)
    assert everything.metric == "margin"
    assert everything.settings["precision"] == "INT2-g32"
    assert everything.table["effect"].tolist() == pytest.approx([1], abs=1e-5)
    assert everything.per_prompt().min() == pytest.approx(1, abs=1e-3)
    at_answer = cross_precision_patching(
        organism_pair, prompts, by="group", groups=["answer", "object"], layers=[-1], direction=direction
    )
    assert at_answer.table["effect"].tolist() == pytest.approx([1, 0], abs=1e-5)
    # The embedding is not quantized, so that all that comes before layer 0 is nothing.
    nothing = cross_precision_patching(organism_pair, prompts, sites="resid_pre", layers=[0], direction=direction)
    assert nothing.table["effect"].tolist() == pytest.approx([0], abs=1e-5)


def test_repair_and_damage_are_the_same_runs_from_either_end(models):
    there = cross_precision_patching(PrecisionPair(*models), TEXTS, sites="z", by="head", **OPTIONS)
    back = cross_precision_patching(
        PrecisionPair(*models[::-1]), TEXTS, sites="z", by="head", direction="damage", **OPTIONS
    )
    assert torch.equal(there.start, back.start)
    assert torch.equal(there.goal, back.goal)
    assert torch.equal(there.patched, back.patched)


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_an_identical_pair_has_nothing_to_bring_back(tiny_folder, wrapper):
    model = tracelens.load(tiny_folder, device="cpu", wrapper=wrapper)
    options = OPTIONS | {"placebo": "displacement"}
    found = cross_precision_patching(PrecisionPair(model, model), TEXTS, sites=("z", "pattern"), by="head", **options)
    assert found.n_undetermined == len(TEXTS)
    assert found.table["effect"].isna().all()
    assert found.per_prompt().isnan().all()
    torch.testing.assert_close(found.patched, found.start.expand_as(found.patched), rtol=0, atol=TOLERANCE)


def spoilt(model, name, index):
    """The model with noise in one head's matrix alone."""
    weight = model.get_parameter(name).detach().clone()
    noise = torch.randn(weight[index].shape, generator=torch.Generator().manual_seed(0))
    weight[index] += noise * weight[index].std() * 1.5
    return copy_sharing(model, {name: weight})


@pytest.mark.parametrize(
    ("matrix", "site", "by", "layer", "head"),
    [
        ("W_O", "attn_out", "layer", 2, 3),
        ("_W_V", "v", "head", 1, 1),
        ("_W_V", "z", "layer", 1, 1),
        ("W_Q", "q", "head", 0, 2),
        ("W_Q", "pattern", "head", 3, 1),
    ],
)
def test_a_fault_in_one_head_is_located_first(organism, matrix, site, by, layer, head):
    faulty = spoilt(organism, f"blocks.{layer}.attn.{matrix}", head)
    found = cross_precision_patching(PrecisionPair(organism, faulty), sample(16, seed=2), sites=site, by=by)
    first, second = found.top(2).to_dict(orient="records")
    assert first["layer"] == layer
    assert by == "layer" or first["head"] == head
    assert first["effect"] == pytest.approx(1, abs=1e-3)
    assert second["effect"] < 0.9
    assert first["p_value"] < 0.001
    assert first["placebo_effect"] < 0.5
    # Attention that is moved anywhere at random changes much, now this way, now that: 16 prompts do not tell it apart.
    assert matrix == "W_Q" or first["p_versus_placebo"] < 0.01


@pytest.mark.parametrize(
    ("wrapper", "spec"),
    [("hooked", "int4-g8+a8"), ("hooked", "int8-dynamic"), ("hooked", "bf16"), ("bridge", "fp32+a4")],
)
def test_equal_to_plain_hooks_on_a_pair_that_rounds(tiny_folder, wrapper, spec):
    reference = tracelens.load(tiny_folder, device="cpu", wrapper=wrapper)
    pair = PrecisionPair(reference, tracelens.apply_precision(reference, spec))
    prompts = PromptSet.of(TEXTS[:3], reference, chat="never")
    # resid_mid has another place on a bridge: test_patching_parity.py.
    for direction, target, source, sites, by in (
        ("repair", pair.quantized, pair.reference, ("z", "v", "pattern"), "head"),
        ("damage", pair.reference, pair.quantized, ("resid_pre", "resid_post", "mlp_out"), "layer"),
    ):
        found = cross_precision_patching(pair, prompts, sites=sites, by=by, direction=direction, layers=[1], **OPTIONS)
        arms = [(Place(Site(row["layer"], row["site"]), None, row.get("head")),) for row in found.rows]
        apart = (found.patched - naive(target, source, prompts, arms, difference)).abs()
        # In a batch of another shape an activation beside the edge of its grid may fall to the other side.
        assert apart.median() <= TOLERANCE
        assert apart.max() < 0.2 * (found.goal - found.start).abs().max()


def test_lengths_batches_and_padding_do_not_matter(pair):
    tokenizer = tiny_tokenizer()
    options = OPTIONS | {"by": ("head", "position"), "sites": "z", "positions": [-1, -2]}
    plain = cross_precision_patching(pair, TEXTS, **options)
    assert plain.present.sum(1).tolist() == [4] * 24
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
        found = cross_precision_patching(pair, dict(padded), **options, batch_size=2)
        torch.testing.assert_close(found.patched, plain.patched, rtol=0, atol=TOLERANCE)
    for i, text in enumerate(TEXTS):
        alone = cross_precision_patching(pair, [text], **options)
        torch.testing.assert_close(alone.patched[:, 0], plain.patched[:, i], rtol=0, atol=TOLERANCE)


CLEAN = ["the cat sat on the mat", "she heard it", "a bird ran under a tree"]
CORRUPTED = ["the dog sat on a mat", "he heard it", "a cat ran under a tree"]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_within_a_model_against_plain_hooks(tiny_folder, wrapper, direction):
    model = tracelens.load(tiny_folder, device="cpu", wrapper=wrapper)
    contrasts = Contrasts.of(CLEAN, CORRUPTED, model, chat="never", metric=difference)
    found = activation_patching(
        model, contrasts, sites="v", by=("head", "group"), groups=["changed"], direction=direction, placebo=None
    )
    runs = (
        [contrasts.corrupted, contrasts.clean] if direction == "denoising" else [contrasts.clean, contrasts.corrupted]
    )
    arms = [(Place(Site(row["layer"], "v"), "changed", row["head"]),) for row in found.rows]
    expected = naive(model, model, runs[0], arms, difference, source_prompts=runs[1])
    torch.testing.assert_close(found.patched, expected, rtol=0, atol=TOLERANCE)
    for side, prompts in ((found.start, runs[0]), (found.goal, runs[1])):
        plain = torch.stack([difference(run(model, ids)[0, -1]) for ids in prompts.tokens]).double()
        torch.testing.assert_close(side, plain, rtol=0, atol=TOLERANCE)
    whole = activation_patching(
        model, contrasts, by="group", groups=["changed"], layers=[0], direction=direction, placebo=None
    )
    assert whole.table["effect"].tolist() == pytest.approx([1], abs=1e-4)


def test_a_corrupted_embedding(models):
    model, _ = models
    spans = {"object": [(2, 3), (1,), (2,)]}
    prompts = PromptSet.of(CLEAN, model, chat="never", spans=spans)
    contrasts = Contrasts.of_corruption(prompts, model, EmbeddingNoise(seed=4), Function(difference))
    found = activation_patching(model, contrasts, by="group", groups=["object"], layers=[0, 1], placebo=None)
    assert found.table["effect"][0] == pytest.approx(1, abs=1e-4)
    assert found.n_undetermined == 0
    for i, ids in enumerate(prompts.tokens):
        batch = next(b for b in prompts.batches(1) if b.prompt.tolist() == [i])
        edits = dict(contrasts.corruption.edits(batch, prompts, model))
        clean = kept(model, ids, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]

        def mend(value, clean=clean, i=i):
            value = value.clone()
            value[:, list(spans["object"][i])] = clean[:, list(spans["object"][i])]
            return value

        hooks = [(name, lambda v, hook, e=edit: e(v)) for name, edit in edits.items()]
        assert difference(run(model, ids, hooks)[0, -1]).item() == pytest.approx(found.start[i].item(), abs=TOLERANCE)
        hooks += [("blocks.1.hook_resid_pre", lambda v, hook, e=mend: e(v))]
        assert difference(run(model, ids, hooks)[0, -1]).item() == pytest.approx(
            found.patched[1, i].item(), abs=TOLERANCE
        )


def test_features_keep_the_error_of_their_sae(pair, models):
    rows = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)) / 6
    saes = {Site(layer): Sae(rows) for layer in (0, 1)}
    prompts = PromptSet.of(TEXTS, models[0], chat="never")
    found = cross_precision_patching(pair, prompts, by=("feature", "position"), positions=[-1, 1], saes=saes, **OPTIONS)
    arms = [(Place(Site(row["layer"]), row["position"], feature=row["feature"]),) for row in found.rows]
    expected = naive(models[1], models[0], prompts, arms, difference, saes=saes)
    torch.testing.assert_close(found.patched, expected, rtol=0, atol=TOLERANCE)
    assert (found.patched - found.start).abs().amax(1).gt(1e-3).sum() > 20


class Sae:
    """Reads with noise, so that its reconstruction is poor."""

    def __init__(self, rows):
        self.W_dec = rows
        self.W_enc = rows.T + 0.1 * torch.randn(rows.T.shape, generator=torch.Generator().manual_seed(1))

    def encode(self, x):
        return (x @ self.W_enc - 0.1).relu()


def test_divergence_from_either_model(pair):
    options = OPTIONS | {"layers": [2], "metric": KL("reference")}
    to_reference = cross_precision_patching(pair, TEXTS, **options)
    assert to_reference.goal.abs().max() < TOLERANCE
    assert to_reference.patched.abs().max() < TOLERANCE
    assert to_reference.start.min() > 0.01
    from_quantized = cross_precision_patching(pair, TEXTS, **options | {"metric": KL("quantized")})
    assert from_quantized.start.abs().max() < TOLERANCE
    for found in (to_reference, from_quantized):
        assert found.table["effect"].tolist() == pytest.approx([1], abs=1e-4)


def test_a_placebo_stands_beside_and_draws_are_averaged(pair):
    options = OPTIONS | {"placebo": "displacement", "sites": "resid_post", "layers": [2]}
    one, other, both = (
        cross_precision_patching(pair, TEXTS, **options, seed=seed, n_placebo=n) for seed, n in ((0, 1), (1, 1), (0, 2))
    )
    torch.testing.assert_close(both.placebo, (one.placebo + other.placebo) / 2)
    assert not torch.allclose(one.placebo, other.placebo)
    assert torch.equal(one.patched, other.patched)
    assert one.settings["seed"] == 0
    assert one.settings["pair"]["n_layers"] == "3"
    assert one.settings["precision"] == ""


def test_together(pair):
    alone = cross_precision_patching(pair, TEXTS, sites="mlp_out", **OPTIONS)
    growing = cross_precision_patching(pair, TEXTS, sites="mlp_out", cumulative=True, **OPTIONS)
    two = cross_precision_patching(pair, TEXTS, sites="mlp_out", pairs=True, **OPTIONS)
    torch.testing.assert_close(growing.patched[0], alone.patched[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(two.patched[1], growing.patched[1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(two.patched[[0, 3, 5]], alone.patched, rtol=0, atol=TOLERANCE)


def nan_for_the_second(logits):
    return torch.where(logits[:, 0] == logits[:, 0].max(), difference(logits), math.nan)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"direction": "denoising"}, UnknownNameError, "unknown direction 'denoising'. .*Known: repair, damage"),
        ({"placebo": "noise"}, UnknownNameError, "unknown placebo 'noise'"),
        ({"n_placebo": 0}, UnknownNameError, "n_placebo is 0"),
        ({"metric": lambda logits: logits}, MetricInputError, r"gave \[.*48\].* one number per row"),
        ({"metric": nan_for_the_second}, MetricInputError, r"'nan_for_the_second' is NaN for prompt \d"),
        ({"metric": KL("clean")}, UnknownNameError, "clean"),
        ({"memory_budget": 10_000}, MemoryBudgetError, r"memory budget is 0\.0 MiB"),
    ],
)
def test_what_cannot_be_run_is_said(pair, changes, error, message):
    with pytest.raises(error, match=message):
        cross_precision_patching(pair, ["the cat sat", "a dog ran"], **(OPTIONS | changes))


def test_directions_within_a_model(models):
    contrasts = Contrasts.of(CLEAN, CORRUPTED, models[0], chat="never", metric=difference)
    with pytest.raises(UnknownNameError, match=r"unknown direction 'repair'. .*Known: denoising, noising"):
        activation_patching(models[0], contrasts, direction="repair")
    other = dataclasses.replace(contrasts, metric=Function(lambda logits: 2 * difference(logits)))
    runs = [activation_patching(models[0], c, layers=[1], placebo=None) for c in (contrasts, other)]
    torch.testing.assert_close(2 * runs[0].patched, runs[1].patched)


def test_a_metric_that_breaks_under_a_patch_names_the_place(pair):
    plain = [
        run(model, pair.reference.to_tokens("the cat sat")[0].tolist())[0, -1, 5]
        for model in (pair.reference, pair.quantized)
    ]

    def once(logits):
        known = torch.isclose(logits[:, 5, None], torch.stack(plain), atol=1e-4).any(1)
        return torch.where(known, logits[:, 5], math.nan)

    with pytest.raises(
        MetricInputError, match="'once' is NaN for prompt 0 with z of layer 1 head 2 at position 3 replaced"
    ):
        cross_precision_patching(
            pair,
            ["the cat sat"],
            sites="z",
            by=("head", "position"),
            layers=[1],
            heads=[2],
            positions=[3],
            **OPTIONS | {"metric": once},
        )


def test_what_runs_beside_a_rounded_run_is_measured(organism, organism_pair):
    prompts = sample(32, "refusal", seed=3)
    rounded = PrecisionPair(organism, tracelens.apply_precision(organism, "int8-dynamic"))
    # Nothing before layer 0 is quantized, so what a patch does there is numerical noise alone.
    found = cross_precision_patching(rounded, prompts, sites="resid_pre", layers=[0], placebo=None)
    noise = found.settings["numerical_noise"]
    assert 0 < noise < 0.05
    assert (found.patched[0] - found.start).abs().max() < 5 * noise
    assert abs(found.table["effect"][0]) < 0.05
    for pair, direction in ((rounded, "damage"), (organism_pair, "repair")):
        found = cross_precision_patching(pair, prompts, layers=[0], placebo=None, direction=direction)
        assert "numerical_noise" not in found.settings


def test_batches_of_nothing_are_refused(pair):
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        cross_precision_patching(pair, TEXTS, batch_size=0, **OPTIONS)


def test_noising_goes_to_the_corrupted_embedding(models):
    prompts = PromptSet.of(CLEAN, models[0], chat="never", spans={"object": [(2, 3), (1,), (2,)]})
    contrasts = Contrasts.of_corruption(prompts, models[0], EmbeddingNoise(seed=4), Function(difference))
    options = {"by": "group", "groups": ["object"], "layers": [0], "placebo": None}
    there = activation_patching(models[0], contrasts, **options)
    back = activation_patching(models[0], contrasts, direction="noising", **options)
    torch.testing.assert_close(back.start, there.goal, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(back.goal, there.start, rtol=0, atol=TOLERANCE)
    assert back.table["effect"][0] == pytest.approx(1, abs=1e-4)
    apart = activation_patching(models[0], contrasts, metric=KL("corrupted"), **options)
    assert apart.start.abs().max() < TOLERANCE
    assert apart.goal.min() > 1e-4


def test_a_neuron_has_its_own_displacement_for_a_placebo(models):
    weight = models[0].get_parameter("blocks.0.mlp.W_in").detach().clone()
    weight[:, 5] *= -2
    faulty = PrecisionPair(models[0], copy_sharing(models[0], {"blocks.0.mlp.W_in": weight}))
    options = OPTIONS | {"placebo": "displacement"}
    found = cross_precision_patching(faulty, TEXTS, sites="mlp_post", by="neuron", layers=[0], **options)
    # It falls on another neuron, and is the only one that is not nothing.
    for values in (found.patched, found.placebo):
        assert ((values - found.start).abs().amax(1) > 1e-6).nonzero().flatten().tolist() == [5]
    assert (found.placebo - found.patched)[5].abs().max() > 1e-6


def test_both_models_run_as_in_evaluation_and_train_on_afterwards(tiny_model):
    pair, seen = PrecisionPair(tiny_model, tracelens.apply_precision(tiny_model, "int4-g8")), set()
    for model in (pair.reference, pair.quantized):
        model.train()
        model.add_hook("blocks.0.hook_resid_pre", lambda value, hook, model=model: seen.add(model.training))
    cross_precision_patching(pair, TEXTS[:2], layers=[1], **OPTIONS)
    assert seen == {False}
    assert pair.reference.training
    assert pair.quantized.training


def test_what_hardly_differs_is_up_to_the_user(pair):
    plain = cross_precision_patching(pair, TEXTS, layers=[1], **OPTIONS)
    apart = (plain.goal - plain.start).abs().sort().values
    found = cross_precision_patching(pair, TEXTS, layers=[1], min_difference=float(apart[:2].mean()), **OPTIONS)
    assert (plain.n_undetermined, found.n_undetermined) == (0, 1)
    assert found.table["n_usable"].tolist() == [len(TEXTS) - 1]
