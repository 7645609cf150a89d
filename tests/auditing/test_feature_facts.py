"""Neighbours, logit weights and what features carry of the margin, against the same computed naively."""

import numpy as np
import pytest
import torch

from tests import handmade
from tests.handmade import D_MODEL, REFUSES, ReadOut
from tests.test_audit import tiny  # noqa: F401
from tests.tiny import TEXTS, WORDS, write_checkpoint
from tracelens import Site, load, load_saes
from tracelens.auditing.evidence_importance import margin_carried
from tracelens.auditing.feature_facts import FeatureFacts, final_norm
from tracelens.auditing.question import Question
from tracelens.auditing.token_text import TokenText
from tracelens.behaviour import AnswerTokens
from tracelens.datasets import get_dataset, resolve_dataset
from tracelens.precision.sharing import copy_sharing
from tracelens.studies.feature_effects import Feature, MarginRuns

ANSWERS = {"refusal": AnswerTokens((5, 9), (6, 11, 12))}


class Wide(ReadOut):
    """An SAE with random directions, one of them dead."""

    def __init__(self, d_in: int, n: int = 60, dtype: torch.dtype = torch.float32) -> None:
        rows = torch.randn(n, d_in, generator=torch.Generator().manual_seed(n))
        rows[3] = 0
        super().__init__(rows.to(dtype))


def keys(site: Site, n: int = 60) -> list[tuple[str, int]]:
    return [(str(site), i) for i in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours(tiny_model, monkeypatch, dtype):
    monkeypatch.setattr("tracelens.auditing.feature_facts._CELLS", 500)
    saes = {Site(0): Wide(32, dtype=dtype), Site(2): Wide(32, 40)}
    facts = FeatureFacts(tiny_model, saes, TokenText(tiny_model.tokenizer))
    asked = [*keys(Site(0)), (str(Site(2)), 7)]
    found = facts.near(asked)
    assert list(found) == asked
    rows = saes[Site(0)].W_dec.double().numpy()
    for (_, i), near in found.items():
        if i in (3, 7):
            continue
        cosines = rows @ rows[i] / np.maximum(np.linalg.norm(rows, axis=1), 1e-9) / np.linalg.norm(rows[i])
        cosines[i] = -2
        expected = np.argsort(-cosines)[:5]
        assert [j for j, _ in near] == expected.tolist()
        np.testing.assert_allclose([c for _, c in near], cosines[expected], atol=1e-5)
    assert all(c == 0 for _, c in found[str(Site(0)), 3])


def test_an_sae_of_one_feature_has_no_neighbours(tiny_model):
    facts = FeatureFacts(tiny_model, {Site(0): ReadOut(torch.ones(1, 32))}, TokenText(tiny_model.tokenizer))
    assert facts.near([(str(Site(0)), 0)]) == {(str(Site(0)), 0): []}


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "GemmaForCausalLM"])
def test_logit_weights(tmp_path, monkeypatch, architecture, wrapper):
    """Against the gradient of the unembedding alone, at a residual stream whose size the final norm leaves as it is."""
    monkeypatch.setattr("tracelens.auditing.feature_facts._CELLS", 1000)
    model = load(write_checkpoint(tmp_path / "m", architecture), device="cpu", wrapper=wrapper)
    saes = {Site(1): Wide(32), Site(1, "z"): Wide(model.cfg.n_heads * model.cfg.d_head)}
    saes[Site(0, "mlp_post")] = Wide(model.cfg.d_mlp)
    facts = FeatureFacts(model, saes, TokenText(model.tokenizer))
    hooked = load(tmp_path / "m", device="cpu")  # whose weights are spelled one way
    # A GPT-2 here has an MLP of 4 × 32; W_O and W_out are read off the hooked model.
    through = {
        Site(1): torch.eye(32),
        Site(1, "z"): hooked.blocks[1].attn.W_O.flatten(0, 1),
        Site(0, "mlp_post"): hooked.blocks[0].mlp.W_out,
    }
    n = len(model.tokenizer)
    words = [TokenText(model.tokenizer)(t) for t in range(n)]
    for site, sae in saes.items():
        promoted, suppressed = facts.logits(keys(site))
        direction = sae.W_dec @ through[site]
        if architecture == "GPT2LMHeadModel":
            direction = direction - direction.mean(1, keepdim=True)
        weights = (direction * hooked.ln_final.w) @ hooked.W_U[:, :n]
        weights = weights - weights.mean(1, keepdim=True)
        for (_, i), tokens in promoted.items():
            order = weights[i].argsort(descending=True)
            np.testing.assert_allclose([w for _, w in tokens], weights[i][order[:8]].detach(), atol=2e-4, rtol=2e-4)
            down = suppressed[str(site), i]
            np.testing.assert_allclose(
                [w for _, w in down], weights[i][order.flip(0)[:8]].detach(), atol=2e-4, rtol=2e-4
            )
            for token, weight in (*tokens, *down):
                assert weights[i][words.index(token)].item() == pytest.approx(weight, abs=2e-4)


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "GemmaForCausalLM"])
def test_the_final_norm_is_read_from_what_it_does(tmp_path, architecture, wrapper):
    model = load(write_checkpoint(tmp_path / "m", architecture), device="cpu", wrapper=wrapper)
    scale, centres = final_norm(model)
    assert centres == (architecture == "GPT2LMHeadModel")
    expected = load(tmp_path / "m", device="cpu").ln_final.w
    torch.testing.assert_close(scale, expected.detach(), rtol=1e-4, atol=1e-5)


def test_no_norm_and_no_unembedding():
    model = handmade.model()
    assert final_norm(model)[0].tolist() == [1] * D_MODEL

    class Headless:
        cfg, tokenizer = model.cfg, model.tokenizer

    facts = FeatureFacts(Headless(), {Site(0): ReadOut()}, TokenText(model.tokenizer))
    assert facts.logits([(str(Site(0)), 1)]) == ({}, {})
    elsewhere = FeatureFacts(model, {Site(0, "q"): ReadOut()}, TokenText(model.tokenizer))
    assert elsewhere.logits([(str(Site(0, "q")), 1)]) == ({}, {})


def test_logit_weights_of_the_handmade_model():
    """ "how" reads twice feature 0, and nothing else reads anything."""
    model = handmade.model()
    facts = FeatureFacts(model, {Site(1): ReadOut()}, TokenText(model.tokenizer))
    promoted, suppressed = facts.logits([(str(Site(1)), 0), (str(Site(1)), 1)])
    n = len(WORDS) + 4
    distinct = len(set(model.tokenizer.get_vocab()))
    assert promoted[str(Site(1)), 0][0] == ("how", pytest.approx(2 - 2 / distinct, abs=1e-5))
    assert suppressed[str(Site(1)), 0][0][1] == pytest.approx(-2 / distinct, abs=1e-5)
    assert promoted[str(Site(1)), 1][0][1] == pytest.approx(0, abs=1e-5)
    assert n >= distinct


def question_of(model, prompts, answers):
    return Question.of(resolve_dataset(prompts), model.tokenizer, "never", answers)


def test_importance_of_a_linear_model_is_its_ablation():
    model, prompts = handmade.model(), handmade.prompts(20)
    rows = handmade.directions()
    # The margin reads features 0, 1 and, with the other sign, 5.
    weights = model.W_U.detach().clone()
    weights[:, REFUSES.positive[0]] += 0.5 * rows[1] - 0.7 * rows[5]
    model = copy_sharing(model, {"unembed.W_U": weights})
    question = question_of(model, prompts, {"refusal": REFUSES})
    asked = list(range(20))
    found = margin_carried(model, {Site(0): ReadOut(), Site(1): ReadOut()}, question, model.tokenizer, asked)
    runs = MarginRuns(model, {Site(0): ReadOut(), Site(1): ReadOut()}, question, model.tokenizer)
    features = [Feature(Site(layer), i) for layer in (0, 1) for i in range(handmade.FEATURES)]
    runs.attribution(features)
    for feature in features:
        exact = runs.effect(feature)[asked].abs().mean().item()
        assert found[feature.site][feature.index].item() == pytest.approx(exact, abs=1e-4), feature
    assert found[Site(1)][0].item() == pytest.approx(6, abs=1e-4)
    assert found[Site(1)][1].item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_importance_is_the_attribution_of_each_prompt(tiny, tiny_folder, wrapper):  # noqa: F811
    saes, prompts = tiny[1:]
    model = load(tiny_folder, device="cpu", wrapper=wrapper)
    question = question_of(model, {"refusal": prompts["refusal"], "baseline": prompts["baseline"]}, ANSWERS)
    asked = [0, 3, 4, 17]
    found = margin_carried(model, saes, question, model.tokenizer, asked, batch_size=3)
    features = [Feature(site, i) for site in saes for i in range(0, 48, 5)]
    total = torch.zeros(len(features), dtype=torch.float64)
    for p in asked:
        one = question_of(model, {"refusal": [prompts["refusal"][p]], "baseline": prompts["baseline"][:1]}, ANSWERS)
        runs = MarginRuns(model, saes, one, model.tokenizer)
        runs.n_prompts = 1  # the safety prompt alone
        attribution = runs.attribution(features)
        total += torch.tensor([attribution[f].total for f in features], dtype=torch.float64).abs()
    ours = torch.stack([found[f.site][f.index] for f in features])
    torch.testing.assert_close(ours, total / len(asked), rtol=1e-4, atol=1e-5)
    assert ours.max() > 1e-2


def test_importance_on_the_organism_ranks_as_ablation_does(organism):
    site = Site(3)
    saes = {site: load_saes("organism")[site]}
    question = Question.of(get_dataset("organism_refusal_v1"), organism.tokenizer, "auto")
    asked = [p for p, label in enumerate(question.labels) if label is not None][:24]
    found = margin_carried(organism, saes, question, organism.tokenizer, asked)[site]
    runs = MarginRuns(organism, saes, question, organism.tokenizer)
    top = found.argsort(descending=True)
    features = [Feature(site, int(i)) for i in [*top[:6], *top[200:206]]]
    runs.attribution(features)
    exact = torch.stack([runs.effect(f)[asked].abs().mean() for f in features])
    assert exact[:6].min() > exact[6:].max()
    assert torch.corrcoef(torch.stack([exact, found[[f.index for f in features]]]))[0, 1] > 0.8


def test_where_no_margin_can_be_read(tiny):  # noqa: F811
    model, saes, _ = tiny
    question = question_of(model, {"other": TEXTS[:2], "baseline": TEXTS[2:]}, None)
    assert margin_carried(model, saes, question, model.tokenizer, [0, 1]) == {}


def test_prompts_that_cannot_be_read_do_not_count(tiny):  # noqa: F811
    model, saes, prompts = tiny
    sets = {"refusal": prompts["refusal"][:2], "other": prompts["refusal"][2:4], "baseline": prompts["baseline"]}
    question = question_of(model, sets, ANSWERS)
    both, readable = (margin_carried(model, saes, question, model.tokenizer, rows) for rows in ([0, 1, 2, 3], [0, 1]))
    for site, values in readable.items():
        torch.testing.assert_close(both[site], values)
        assert values.max() > 0


def test_where_a_direction_is_not_what_is_written(tiny):  # noqa: F811
    model, saes, prompts = tiny

    class Normalised(ReadOut):
        class cfg:
            normalize_activations = "layer_norm"
            d_in = 32

    question = question_of(model, prompts, ANSWERS)
    both = {Site(1): Normalised(saes[Site(2)].W_dec), Site(2): saes[Site(2)]}
    assert list(margin_carried(model, both, question, model.tokenizer, [0, 1])) == [Site(2)]


def test_too_little_memory_is_said_and_does_no_harm(tiny, monkeypatch, caplog):  # noqa: F811
    model, saes, prompts = tiny
    monkeypatch.setattr("tracelens.causal.memory.free_bytes", lambda device: 1000)
    question = question_of(model, prompts, ANSWERS)
    assert margin_carried(model, saes, question, model.tokenizer, [0, 1]) == {}
    assert "not measured" in caplog.text


def test_a_model_is_left_as_it_was(tiny_folder, tiny):  # noqa: F811
    saes, prompts = tiny[1:]
    model = load(tiny_folder, device="cpu").train()
    model.requires_grad_(True)
    margin_carried(model, saes, question_of(model, prompts, ANSWERS), model.tokenizer, [0, 1])
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.unembed._forward_pre_hooks
