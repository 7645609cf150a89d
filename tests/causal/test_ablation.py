from typing import Any

import numpy as np
import pytest
import torch

from tests import handmade
from tests.handmade import REFUSES, TOKEN, ReadOut, directions, feature_table
from tests.tiny import TEXTS
from tracelens import apply_precision, load
from tracelens.behaviour import AnswerTokens, margin
from tracelens.causal.ablation import active_features, importance
from tracelens.causal.ablation_result import Importance
from tracelens.causal.ablation_values import draw_donors
from tracelens.causal.components import arm_of, components_of, kind_of, name_of
from tracelens.causal.places import Place
from tracelens.causal.prompts import PromptSet
from tracelens.errors import PromptError, ResultFileError, UnknownNameError
from tracelens.organism import sample
from tracelens.sites import Site

ANSWERS = AnswerTokens((5,), (7,))
ALL = ("head", "mlp", "attn", "layer")
PROMPTS = [*TEXTS, "the dog saw a tree", "no cat ran under the mat"]


# By hand ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer():
    """A handmade model whose first MLP writes, along what the margin reads, what a token has of feature 1: 2 for "no".

    At BOS it writes a hundred times as much, which no mean may hold.
    """
    model = handmade.model()
    rows = directions()
    model.blocks[0].mlp.W_in.zero_()
    model.blocks[0].mlp.W_in[:, 0] = rows[1]
    model.blocks[0].mlp.b_in.zero_()
    model.blocks[0].mlp.W_out[0] = rows[0]
    model.embed.W_E[TOKEN["<s>"]] = 200 * rows[1]
    return model


SHORT = ["cat no", "the dog no", "cat dog"]


def measured(model, **options):
    return importance(model, SHORT, metric=REFUSES, chat="never", **options)


def test_zero_ablation_takes_away_what_is_written(writer):
    found = measured(writer, method="zero")
    by_name = dict(zip(map(name_of, found.components), found.change, strict=True))
    # The margin is 2 × what stands along direction 0, less 1: 3 of the embedding of "no" and 2 of the MLP.
    assert torch.allclose(found.plain, torch.tensor([9.0, 9.0, -1.0], dtype=torch.float64), atol=1e-5)
    assert torch.allclose(by_name["L0 MLP"], torch.tensor([-4.0, -4.0, 0.0], dtype=torch.float64), atol=1e-5)
    for name, change in by_name.items():
        if name != "L0 MLP":
            assert change.abs().max() < 1e-5, name


def test_mean_ablation_leaves_the_mean_of_all_tokens_but_bos(writer):
    change = measured(writer, components=("mlp",)).change[0]
    # Of the 7 tokens two are "no" and have 2.
    mean = 2 * 2 / 7
    expected = torch.tensor([2 * (mean - 2), 2 * (mean - 2), 2 * mean], dtype=torch.float64)
    assert torch.allclose(change, expected, atol=1e-5)


def test_mean_over_another_set_and_by_position(writer):
    other = measured(writer, components=("mlp",), reference_prompts=["no", "cat"]).change[0]
    assert torch.allclose(other, torch.tensor([-2.0, -2.0, 2.0], dtype=torch.float64), atol=1e-5)
    by_position = measured(writer, components=("mlp",), per_position=True).change[0]
    # At position 2 stand no, dog, dog; at position 3 "no" alone.
    third = 2 / 3
    assert torch.allclose(by_position, 2 * torch.tensor([third - 2, 0.0, third]).double(), atol=1e-5)


def test_a_mean_of_what_is_always_written_changes_nothing(writer):
    writer.blocks[1].mlp.b_out += 3 * directions()[0]
    found = measured(writer, components=("mlp",), layers=[1])
    assert found.change.abs().max() < 1e-5
    assert measured(writer, components=("mlp",), layers=[1], method="zero").change.sub(-6).abs().max() < 1e-5


def test_resampling_takes_the_donor_of_equal_length(writer):
    found = importance(
        writer, ["cat no", "the dog no"], components=("mlp",), metric=REFUSES, method="resample", chat="never",
        reference_prompts=["dog cat", "cat dog cat"], n_draws=2,
    )  # fmt: skip
    assert torch.allclose(found.change[0], torch.tensor([-4.0, -4.0], dtype=torch.float64), atol=1e-5)


def test_features_are_ablated_alone():
    model = handmade.model()
    saes = {Site(0): ReadOut(), Site(1): ReadOut()}
    features = {Site(0): [0, 5], Site(1): [0]}
    options = {"components": ("feature",), "features": features, "saes": saes}
    zero = measured(model, method="zero", **options)
    expected = torch.tensor([[-6.0, -6.0, 0.0], [0.0, 0.0, 0.0], [-6.0, -6.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(zero.change, expected, atol=1e-4)
    mean = measured(model, **options)
    average = 3 * 2 / 7
    assert torch.allclose(mean.change[0], 2 * torch.tensor([average - 3, average - 3, average]).double(), atol=1e-4)
    assert zero.kinds == ("feature",) * 3
    assert name_of(zero.components[1]) == "L0 #5"


def test_active_features_are_those_that_fire():
    saes = {Site(1): ReadOut()}
    found = active_features(handmade.model(), saes, SHORT, chat="never")
    words = {word for text in SHORT for word in text.split()}
    table = feature_table()[[TOKEN[word] for word in words]]
    assert found == {Site(1): (table > 0).any(0).nonzero().squeeze(1).tolist()}
    assert active_features(handmade.model(), saes, SHORT, chat="never", min_active=3)[Site(1)] != found[Site(1)]


# Against hooks, one prompt and one component at a time ------------------------------------------------------------------


def held(model, tokens, site):
    """What a site holds, [pos, ...], and the last logits."""
    found = {}
    model.run_with_hooks(
        torch.tensor([tokens]), fwd_hooks=[(str(site), lambda value, hook: found.update(value=value[0].clone()))]
    )
    return found["value"]


def naive(model, prompts, places, replacement):
    """[place, prompt]: margins with `replacement(prompt, site)` [pos, ...] in place of all but BOS."""
    rows = []
    for place in places:
        margins = []
        for prompt, tokens in enumerate(prompts.tokens):

            def edited(value, hook, unit, new):
                value = value.clone()
                into = value[0, 1:] if unit is None else value[0, 1:, unit]
                into.copy_(new[1:] if unit is None else new[1:, unit])
                return value

            hooks = [
                (
                    str(part.site),
                    lambda value, hook, part=part, prompt=prompt: edited(
                        value, hook, part.unit, replacement(prompt, part.site)
                    ),
                )
                for part in arm_of(place)
            ]
            logits = model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)
            margins.append(margin(logits[:, -1], ANSWERS)[0].double())
        rows.append(torch.stack(margins))
    return torch.stack(rows)


@pytest.mark.parametrize("method", ["zero", "mean", "per_position", "resample"])
@torch.no_grad()
def test_equals_hooks(tiny_model, method):
    prompts = PromptSet.of(PROMPTS, tiny_model, chat="never")
    places = components_of(tiny_model, ALL, layers=[0, 1, 2])
    options = {"method": method, "n_draws": 1} if method != "per_position" else {"per_position": True}
    found = importance(tiny_model, prompts, components=ALL, metric=ANSWERS, seed=3, batch_size=4, **options)
    own = {
        (i, part.site): held(tiny_model, tokens, part.site)
        for i, tokens in enumerate(prompts.tokens)
        for part in dict.fromkeys(part for place in places for part in arm_of(place))
    }
    donors = draw_donors(prompts, prompts, np.random.default_rng(3))

    def replacement(prompt, site):
        mine = own[prompt, site]
        if method == "zero":
            return torch.zeros_like(mine)
        if method == "resample":
            theirs = own[donors[prompt], site][1:]
            # From the end, beginning again where the donor is shorter.
            index = [len(theirs) - 1 - (len(mine) - 1 - p) % len(theirs) for p in range(len(mine))]
            return theirs[index]
        everything = [own[i, site] for i in range(len(prompts))]
        if method == "mean":
            return torch.cat([values[1:] for values in everything]).mean(0).expand_as(mine)
        return torch.stack([torch.stack([v[p] for v in everything if p < len(v)]).mean(0) for p in range(len(mine))])

    expected = naive(tiny_model, prompts, places, replacement) - found.plain
    assert found.components == places
    assert (found.change - expected).abs().max() < 1e-5
    assert found.change.abs().max(1).values.min() > 1e-3


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_batches_and_budget_change_nothing(tiny_model, method):
    options = {"components": ALL, "metric": ANSWERS, "method": method, "placebo": True, "n_draws": 1, "layers": [1]}
    one = importance(tiny_model, PROMPTS, chat="never", batch_size=1, **options)
    many = importance(tiny_model, PROMPTS, chat="never", memory_budget=2_000_000, **options)
    assert torch.allclose(one.change, many.change, atol=1e-5)
    assert torch.allclose(one.placebo, many.placebo, atol=1e-5)


def test_bridges_give_the_same(tiny_folder, tiny_model):
    options = {"components": ALL, "metric": ANSWERS, "chat": "never"}
    ours = importance(tiny_model, PROMPTS, **options)
    theirs = importance(load(tiny_folder, device="cpu", wrapper="bridge"), PROMPTS, **options)
    assert torch.allclose(ours.change, theirs.change, atol=1e-4)


def test_models_that_round_activations_keep_rounding(tiny_model):
    rounded = apply_precision(tiny_model, "int4-g8+a8")
    ours = importance(rounded, PROMPTS, metric=ANSWERS, method="zero", chat="never")
    own = [
        margin(rounded(torch.tensor([ids]))[:, -1], ANSWERS)[0].double()
        for ids in PromptSet.of(PROMPTS, rounded, chat="never").tokens
    ]
    assert torch.allclose(ours.plain, torch.stack(own), atol=1e-4)
    assert (
        ours.change - importance(tiny_model, PROMPTS, metric=ANSWERS, method="zero", chat="never").change
    ).abs().max() > 1e-3


# What is reported -------------------------------------------------------------------------------------------------------


def test_table(organism):
    prompts = sample(20, "refusal", "heldout", seed=5, where=lambda p: len(p.prompt.split()) in (10, 11))
    found = importance(organism, prompts, placebo=True)
    table: Any = found.table
    assert found.metric == "margin"
    assert found.unit == "nats"
    assert len(table) == 5 * 4 + 5
    assert np.allclose(table["importance"], found.change.abs().mean(1))
    assert np.allclose(table["change"], found.change.mean(1))
    assert (table["importance_low"] <= table["importance"]).all()
    assert (table["importance"] <= table["importance_high"]).all()
    assert (table["p_adjusted"] >= table["p_value"]).all()
    top = found.top(3)
    assert list(top["importance"]) == sorted(table["importance"], reverse=True)[:3]
    # The first layer reads the words: a random displacement as large does much less.
    first = table[table["component"] == "L0H3"].iloc[0]
    assert first["importance"] > 2 * first["placebo_importance"]
    assert first["p_versus_placebo"] < 0.01


def test_feature_placebo_steps_as_far_along_another_direction(organism, organism_saes):
    prompts = sample(20, "refusal", "heldout", seed=5, where=lambda p: len(p.prompt.split()) in (10, 11))
    features = {
        site: active[:5] for site, active in active_features(organism, organism_saes, prompts, min_active=20).items()
    }
    found = importance(organism, prompts, components=("feature",), features=features, saes=organism_saes, placebo=True)
    assert found.placebo.isfinite().all()
    assert not torch.allclose(found.placebo, found.change)


@pytest.fixture(scope="module")
def organism_saes():
    from tracelens import load_saes

    return load_saes("organism")


def test_placebo_of_nothing_is_nothing(writer):
    found = measured(writer, components=("head", "mlp"), placebo=True, method="zero")
    silent = [name_of(place) != "L0 MLP" and kind_of(place) == "mlp" for place in found.components]
    assert found.placebo[silent].abs().max() < 1e-5


def test_save_and_load(tiny_model, tmp_path):
    found = importance(tiny_model, PROMPTS, metric=ANSWERS, chat="never", components=("head", "layer"), placebo=True)
    back = Importance.load(found.save(tmp_path / "importance.safetensors"))
    assert back.components == found.components
    assert back.prompts == found.prompts
    assert torch.equal(back.change, found.change)
    assert torch.equal(back.placebo, found.placebo)
    assert back.settings == found.settings
    assert back.table.equals(found.table)
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ResultFileError, match="tracelens_importance"):
        Importance.load(tmp_path / "other")


def test_positions_of_groups(organism):
    prompts = sample(12, "refusal", "heldout", seed=5)
    everywhere = importance(organism, prompts, components=("mlp",), layers=[0], method="zero")
    at_object = importance(organism, prompts, components=("mlp",), layers=[0], method="zero", where="object")
    nowhere = importance(
        organism, prompts, components=("mlp",), layers=[0], method="zero", where="nothing", spans={"nothing": [()] * 12}
    )
    assert nowhere.change.abs().max() == 0
    assert at_object.change.abs().max() > 0.1
    assert not torch.allclose(at_object.change, everywhere.change)


# What cannot be ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "median"}, UnknownNameError, "unknown method of ablation 'median'.*mean, zero, resample"),
        ({"components": ("heads",)}, UnknownNameError, "unknown kind of component 'heads'. Did you mean 'head'"),
        ({"components": ("feature",)}, UnknownNameError, "need features="),
        ({"layers": [3]}, UnknownNameError, "layer 3, but the model has 3 layers"),
        ({"components": ()}, UnknownNameError, "there are no components"),
        ({"components": (Place(Site(0, "z"), None, 9),)}, UnknownNameError, "head 9 is out of range"),
        ({"method": "resample", "reference_prompts": ["yes"]}, PromptError, "prompt 2 has no donor"),
        (
            {"per_position": True, "reference_prompts": ["yes"]},
            PromptError,
            "prompt 0 has a token at position 2.*longer reference_prompts",
        ),
        ({"n_draws": 0, "method": "resample"}, UnknownNameError, "n_draws is 0"),
    ],
)
def test_errors(tiny_model, options, error, message):
    with pytest.raises(error, match=message):
        importance(tiny_model, PROMPTS, metric=ANSWERS, chat="never", **options)


def test_layers_are_attention_and_mlp():
    place = Place(Site(2, "resid_post"))
    assert kind_of(place) == "layer"
    assert arm_of(place) == (Place(Site(2, "attn_out")), Place(Site(2, "mlp_out")))
    assert arm_of(Place(Site(2, "resid_post"), feature=3)) == (Place(Site(2, "resid_post"), feature=3),)
