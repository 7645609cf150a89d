import pandas as pd
import pytest
import torch

from tests import handmade
from tests.handmade import D_MODEL, REFUSES, TOKEN, ReadOut
from tests.planted import written
from tests.tiny import TEXTS
from tracelens import Site, load, load_saes
from tracelens.auditing.assembly import Question
from tracelens.datasets import get_dataset, resolve_dataset
from tracelens.errors import PromptError, SAEError, UnknownNameError
from tracelens.precision import apply_precision
from tracelens.precision.sharing import copy_sharing
from tracelens.studies.feature_effects import Feature, MarginRuns
from tracelens.studies.pathways import NewPathways, new_pathways

PROMPTS = handmade.prompts(60)
NEW = {20: 1.5, 21: -0.5, 22: 0.0}
"""Directions that only the quantized model writes → how much of the margin a unit of each is."""
OPTIONS = {"answer_tokens": {"refusal": REFUSES}, "chat": "never", "min_active": 5, "n_resamples": 200}
SAE = ReadOut(handmade.directions(D_MODEL))


@pytest.fixture(scope="module")
def reference():
    """The handmade model, whose margin also reads directions that it never writes."""
    model, rows = handmade.model(), handmade.directions(D_MODEL)
    weights = model.W_U.detach().clone()
    for k, weight in NEW.items():
        weights[:, TOKEN["how"]] += weight * rows[k]
    return copy_sharing(model, {"unembed.W_U": weights})


def amounts():
    generator = torch.Generator().manual_seed(9)
    shape = (len(TOKEN), len(NEW))
    table = (0.5 + torch.rand(shape, generator=generator)) * (torch.rand(shape, generator=generator) < 0.4)
    table[[TOKEN[w] for w in ("<unk>", "<pad>", "<s>", "</s>")]] = 0
    return table


@pytest.fixture(scope="module")
def quantized(reference):
    return written(reference, amounts(), handmade.directions(D_MODEL)[list(NEW)])


@pytest.fixture(scope="module")
def found(reference, quantized):
    return new_pathways(reference, quantized, {0: SAE}, PROMPTS, **OPTIONS, noise=False)


def last_words():
    return [TOKEN[text.split()[-1]] for texts in PROMPTS.values() for text in texts]


def test_planted_features_are_found_and_their_effect_is_the_planted_one(found):
    table = found.table.set_index("feature")
    assert sorted(table.index) == list(NEW)
    assert found.n_novel == len(NEW)
    assert (table["novelty"] == 1).all()
    for column, (feature, weight) in enumerate(NEW.items()):
        # Blocks write nothing, so only what the last word brings along reaches the margin, and it does so linearly.
        effect = weight * amounts()[last_words(), column].double()
        row = table.loc[feature]
        assert row["effect"] == pytest.approx(effect.mean().item(), abs=1e-5)
        assert row["attribution"] == pytest.approx(effect.mean().item(), abs=1e-5)
        assert row["low"] - 1e-6 <= row["effect"] <= row["high"] + 1e-6
        assert row["effect_where_it_fires"] * row["n_prompts"] / found.n_prompts == pytest.approx(row["effect"])
    assert found.table["feature"].tolist() == [20, 21, 22]  # by what they do
    assert table.loc[20, "q_value"] < 0.01
    assert table.loc[20, "prompts_raised"] == (amounts()[last_words(), 0] > 0).sum()
    assert table.loc[21, "prompts_raised"] == 0


def test_controls_are_not_new_and_those_that_the_margin_does_not_read_do_nothing(found):
    control = found.control.set_index("feature")
    assert not set(control.index) & set(NEW)
    assert len(control) == len(NEW)
    assert (control["novelty"] == 0).all()
    assert control.drop(index=0, errors="ignore")["effect"].abs().max() < 1e-5
    assert found.above_control > 0.5


def test_every_layer_sees_the_same_effect(reference, quantized):
    both = new_pathways(reference, quantized, {0: SAE, 1: SAE}, PROMPTS, **OPTIONS, noise=False).table
    by_site = {site: rows.set_index("feature")["effect"].sort_index() for site, rows in both.groupby("site")}
    assert len(by_site) == 2
    first, second = by_site.values()
    assert first.to_numpy() == pytest.approx(second.to_numpy(), abs=1e-5)


def test_only_the_strongest_are_measured(reference, quantized):
    found = new_pathways(reference, quantized, {0: SAE}, PROMPTS, **OPTIONS, top=1, noise=False)
    assert found.table["effect"].notna().tolist() == [True, False, False]
    assert found.table["feature"].tolist() == [20, 21, 22]
    assert found.control["effect"].notna().sum() == 1


def test_identical_models_have_none(reference, tmp_path):
    found = new_pathways(reference, reference, {0: SAE}, PROMPTS, **OPTIONS)
    assert (found.n_novel, found.n_novel_noise) == (0, 0)
    assert found.table.empty
    assert found.above_control != found.above_control
    assert NewPathways.load(found.save(tmp_path / "none.json")).table.empty
    assert "no feature is new" in str(found.plot().to_dict())


def test_round_trip_and_figure(found, tmp_path):
    again = NewPathways.load(found.save(tmp_path / "new.json"))
    pd.testing.assert_frame_equal(again.table, found.table)
    pd.testing.assert_frame_equal(again.control, found.control)
    assert set(again.to_dataframe()["kind"]) == {"new", "control"}
    (new,) = [trace for trace in again.plot().data if trace.name == "new features"]
    assert list(new.x) == found.table["effect"].tolist()


def some_of_the_organism():
    dataset = get_dataset("organism_refusal_v1")
    return {"refusal": dataset.safety_prompts[:60], "baseline": dataset.baseline_prompts[:60]}


def test_attribution_of_the_organism_is_near_the_exact_effect(organism):
    saes = dict(list(load_saes("organism").items())[3:])
    quantized = apply_precision(organism, "int2")
    found = new_pathways(organism, quantized, saes, some_of_the_organism(), top=5)
    measured = found.to_dataframe().dropna(subset=["effect"])
    assert len(measured) == 10
    assert found.n_prompts == 120
    assert measured[["attribution", "effect"]].corr().iloc[0, 1] > 0.9
    assert found.n_novel_noise > 0


def test_a_model_that_rounds_activations_lets_gradients_through(organism):
    saes = dict(list(load_saes("organism").items())[4:])
    quantized = apply_precision(organism, "int2+a8")
    found = new_pathways(organism, quantized, saes, some_of_the_organism(), top=4, noise=False)
    measured = found.to_dataframe().dropna(subset=["effect"])
    assert measured[["attribution", "effect"]].corr().iloc[0, 1] > 0.9


def test_effects_in_a_bridge_are_those_in_a_hooked_model(tiny_folder):
    rows = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    prompts = resolve_dataset({"refusal": TEXTS[:2], "baseline": TEXTS[2:]})
    features = [Feature(Site(layer), i) for layer in (0, 1) for i in (2, 9, 30)]
    found = []
    for wrapper in ("hooked", "bridge"):
        model = load(tiny_folder, device="cpu", wrapper=wrapper)
        question = Question.of(prompts, model.tokenizer, "never", OPTIONS["answer_tokens"])
        runs = MarginRuns(model, {Site(layer): ReadOut(rows) for layer in (0, 1)}, question, model.tokenizer)
        attribution = runs.attribution(features)
        first_order = torch.tensor([attribution[f].total for f in features])
        found.append((first_order, torch.stack([runs.effect(f) for f in features])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert ours.abs().max() > 1e-3


def test_bad_input(reference, quantized):
    with pytest.raises(PromptError, match="no prompt's margin can be read"):
        new_pathways(
            reference, quantized, {0: SAE}, {"other": PROMPTS["refusal"], "baseline": PROMPTS["baseline"]}, chat="never"
        )

    class Normalised(ReadOut):
        class cfg:
            normalize_activations = "layer_norm"
            d_in = D_MODEL

    with pytest.raises(SAEError, match="normalises its input"):
        new_pathways(reference, quantized, {0: Normalised()}, PROMPTS, **OPTIONS)


def test_an_effect_needs_an_attribution(reference):
    question = Question.of(resolve_dataset(PROMPTS), reference.tokenizer, "never", OPTIONS["answer_tokens"])
    runs = MarginRuns(reference, {Site(0): SAE}, question, reference.tokenizer)
    with pytest.raises(UnknownNameError, match="call attribution first"):
        runs.effect(Feature(Site(0), 3))
    assert runs.attribution([]) == {}
