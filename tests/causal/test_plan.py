"""Plans: the right layer within its bytes, measured on other prompts, beside chance and the size of the error."""

import itertools
import json

import numpy as np
import pytest
import torch

import tracelens
from tracelens.causal.repair import RepairPlan, plan
from tracelens.causal.repair.choosing import at_random, fewest_bytes, most_gain
from tracelens.errors import PlanError, PromptError, ResultFileError, UnknownNameError
from tracelens.features import CircuitTracer
from tracelens.organism import sample
from tracelens.pair import PrecisionPair
from tracelens.precision import apply_precision
from tracelens.precision.sharing import copy_sharing

PLANTED = "blocks.2.mlp.W_out"
MODULE = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def prompts():
    # Two lengths: prompts of one length share their passes.
    return sample(32, "refusal", seed=1, where=lambda p: len(p.prompt.split()) in (10, 11))


@pytest.fixture(scope="module")
def planted(organism):
    """INT8, and noise in one matrix alone."""
    rounded = dict(apply_precision(organism, "int8").named_parameters())
    changed = {name: p for name, p in rounded.items() if p is not dict(organism.named_parameters())[name]}
    noise = torch.randn(rounded[PLANTED].shape, generator=torch.Generator().manual_seed(0))
    changed[PLANTED] = rounded[PLANTED] + noise * rounded[PLANTED].std()
    return PrecisionPair(organism, copy_sharing(organism, changed))


@pytest.fixture(scope="module")
def coarse(organism):
    return PrecisionPair(organism, apply_precision(organism, "int2-g32"))


@pytest.fixture(scope="module")
def found(coarse, prompts):
    return plan(coarse, prompts, budget_bytes=200_000)


def every_set(n):
    return (list(chosen) for k in range(n + 1) for chosen in itertools.combinations(range(n), k))


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    gains, costs = (rng.normal(size=9)).tolist(), rng.integers(1, 50, 9).tolist()
    budget = int(sum(costs) * 0.4)

    def total(chosen, values):
        return sum(values[i] for i in chosen)

    best = max(total(s, gains) for s in every_set(9) if total(s, costs) <= budget)
    chosen = most_gain(gains, costs, budget)
    assert total(chosen, costs) <= budget
    assert total(chosen, gains) == pytest.approx(best)
    target = 0.6 * sum(g for g in gains if g > 0)
    least = min(total(s, costs) for s in every_set(9) if total(s, gains) >= target)
    cheapest = fewest_bytes(gains, costs, target)
    assert total(cheapest, gains) >= target * (1 - 1e-6)
    assert total(cheapest, costs) == least
    drawn = at_random(costs, budget, seed)
    assert total(drawn, costs) <= budget
    assert all(total(drawn, costs) + costs[i] > budget for i in range(9) if i not in drawn), "filled"


def test_what_gains_nothing_is_not_taken():
    assert most_gain([-1.0, 0.0, 1.0], [1, 1, 1], 3) == [2]
    assert fewest_bytes([-1.0, 0.5], [1, 1], 2.0) == [1], "all that gain, where none reaches it"
    assert fewest_bytes([1.0], [1], 0.0) == []


@pytest.mark.parametrize("by", ["attribution", "alone", "magnitude"])
def test_noise_planted_in_one_matrix_is_what_is_kept(planted, prompts, by):
    n_weights = dict(planted.reference.named_parameters())[PLANTED].numel()
    made = plan(planted, prompts, budget_bytes=n_weights, bits=8.0, by=by, n_random=2)
    assert made.modules == (MODULE,)
    assert made.matrices == (PLANTED,)
    assert made.bytes == n_weights, "one byte more for each weight"
    assert made.recovery.value == pytest.approx(1, abs=0.1)
    assert made.advantages["random"].low > 0
    assert made.as_good == 0
    assert not made.beats["random"], "two random choices are too few to tell"
    assert "NOT told from a lucky one" in made.verdict
    assert "by size of the error is the same one" in made.verdict


def test_a_target_is_reached_with_as_little(planted, prompts):
    made = plan(planted, prompts, target=0.8, bits=8.0, n_random=1)
    assert made.modules == (MODULE,)
    assert made.target_met
    assert made.target_holds
    assert "is met on the 16 prompts to choose on and holds on the held-out ones" in made.verdict


def test_a_target_of_flips(coarse, prompts):
    made = plan(coarse, prompts, target={"flips": 0.0}, n_random=1)
    assert made.target_met
    flips = made.outcome("plan").flips
    assert made.target_holds == (flips.rate.value == 0)
    assert made.outcome("plan").flips.rate.value <= made.outcome("quantized").flips.rate.value


def test_a_real_plan_beats_chance_and_size(found):
    assert found.beats == {"random": True, "magnitude": True, "relative magnitude": True}
    assert found.bytes <= 200_000
    assert found.recovery.value > 0.7
    assert found.predicted.value == pytest.approx(found.recovery.value, abs=0.4)
    assert len(found.random) == 20
    assert found.random_p == pytest.approx(1 / 21)
    assert all(outcome.bytes <= 200_000 for outcome in found.outcomes)
    held = found.outcome("reference")
    assert held.recovery.value == pytest.approx(1)
    assert held.flips.rate.value == 0
    assert found.outcome("quantized").recovery.value == 0
    assert found.outcome("plan").perplexity.value < found.outcome("quantized").perplexity.value


def test_bytes_follow_from_bits(found):
    for unit in found.units:
        assert unit.bytes == -(-unit.n_weights * (16 - 2.5) // 8)
    assert "2.5 bits" in found.bytes_basis


def test_bytes_of_a_build_are_those_on_disk(organism, prompts):
    build = "tests/fixtures/organism/gptq"
    pair = PrecisionPair.load("organism", build)
    made = plan(pair, prompts[:12], budget_bytes=100_000, quantized_checkpoint=build, n_random=1)
    stored = tracelens.Checkpoint(build)
    unit = made.units[0]
    parts = stored.parts(f"{unit.modules[0]}.weight")
    assert unit.bytes == 2 * unit.n_weights - sum(stored.stored.files.nbytes(part) for part in parts)
    unknown = plan(pair, prompts[:12], budget_bytes=100_000, n_random=1)
    assert unknown.units[0].bytes == 2 * unit.n_weights
    assert "is not known" in unknown.bytes_basis


def test_where_a_choice_is_no_better_the_verdict_says_so(coarse, prompts):
    made = plan(coarse, prompts, budget_bytes=200_000, by="random", n_random=3)
    assert not made.beats["random"]
    assert "does NOT beat" in made.verdict or "WORSE" in made.verdict or "NOT told" in made.verdict
    worst = plan(coarse, prompts, budget_bytes=200_000, by="magnitude", n_random=3)
    assert "It does NOT beat 3 random choices" in worst.verdict or "It is WORSE than 3 random choices" in worst.verdict


def test_identical_models_have_nothing_to_repair(organism, prompts):
    made = plan(PrecisionPair(organism, organism), prompts, budget_bytes=1000)
    assert made.units == made.kept == ()
    assert made.bytes == 0
    assert made.verdict.startswith("Nothing to repair: all weight matrices")
    assert made.outcome("quantized").recovery.value != made.outcome("quantized").recovery.value, "0/0"
    assert made.plot().data is not None
    assert plan(PrecisionPair(organism, organism), prompts, target=0.9).kept == ()


def test_prompts_are_chosen_on_or_measured_on(coarse, prompts):
    twice = list(prompts[:10]) + list(prompts[:10])
    made = plan(coarse, twice, budget_bytes=100_000, n_random=1, by="magnitude")
    assert made.n_choosing < 10, "those that are measured on are left out of the choice"
    given = plan(coarse, prompts[:8], budget_bytes=100_000, held_out=prompts[6:20], n_random=1, by="magnitude")
    assert given.n_choosing == 6
    assert len(given.held_out.tokens) == 14
    with pytest.raises(PromptError, match="are among the held-out ones"):
        plan(coarse, prompts[:5], budget_bytes=100_000, held_out=prompts[:5], by="magnitude")


def test_what_is_fused_is_kept_together(coarse, prompts):
    fused = plan(coarse, prompts[:12], budget_bytes=200_000, granularity="fused", by="magnitude", n_random=1)
    assert len(fused.units) == 4 * 5
    assert fused.units[0].name == "model.layers.0.self_attn.q_proj+k_proj+v_proj" or any(
        unit.kind == "self_attn.q_proj+k_proj+v_proj" for unit in fused.units
    )
    layers = plan(coarse, prompts[:12], budget_bytes=300_000, granularity="layer", by="magnitude", n_random=1)
    assert len(layers.units) == 5
    assert {len(unit.modules) for unit in layers.units} == {7}


def test_another_wrapper_and_rounded_activations(organism, prompts):
    bridges = PrecisionPair(
        tracelens.load("organism", wrapper="bridge"), tracelens.load("tests/fixtures/organism/gptq", wrapper="bridge")
    )
    made = plan(bridges, prompts[:8], budget_bytes=100_000, n_random=1)
    hooked = plan(
        PrecisionPair.load("organism", "tests/fixtures/organism/gptq"), prompts[:8], budget_bytes=100_000, n_random=1
    )
    assert set(made.modules) == set(hooked.modules)
    assert made.recovery.value == pytest.approx(hooked.recovery.value, abs=1e-3)
    rounded = PrecisionPair(organism, apply_precision(organism, "int3-g32+a8"))
    assert plan(rounded, prompts, budget_bytes=200_000, n_random=1).recovery.value > 0.3


def test_cpfr_of_a_plan(coarse):
    prompts = sample(32, "refusal", seed=1)
    saes = {site: sae for site, sae in tracelens.load_saes("organism").items() if site.layer == 2}
    dataset = tracelens.datasets.get_dataset("organism_refusal_v1")
    options = {"n_permutations": 50, "alpha": 0.5, "min_auroc": 0.7}
    fingerprint = CircuitTracer(coarse.reference, saes).create_fingerprint(
        {"refusal": dataset.safety_prompts[:40]}, dataset.baseline_prompts[:40], **options
    )
    made = plan(
        coarse,
        prompts,
        budget_bytes=200_000,
        n_random=1,
        saes=saes,
        fingerprint=fingerprint,
        min_active=1,
        by="attribution",
    )
    reference, quantized, kept = (made.outcome(name).cpfr for name in ("reference", "quantized", "plan"))
    assert reference["safety"].value == pytest.approx(1)
    for kind in ("safety", "capability"):
        assert quantized[kind].value < kept[kind].value < 1
        assert kept[kind].low <= kept[kind].value <= kept[kind].high
    table = made.comparison.set_index("name")
    assert "cpfr_safety" in table
    assert (table.loc["reference", "closed"], table.loc["quantized", "closed"]) == (1, 0)
    gaps = [
        torch.tensor(made.outcome("reference").values) - torch.tensor(made.outcome(n).values)
        for n in ("plan", "quantized")
    ]
    assert table.loc["plan", "closed"] == pytest.approx(
        float(1 - gaps[0].square().sum() / gaps[1].square().sum()), rel=1e-4
    )
    with pytest.raises(PlanError, match="needs both saes= and fingerprint="):
        plan(coarse, prompts, budget_bytes=200_000, saes=saes)


def test_what_the_gradients_do_not_foretell_is_not_made_up(coarse, prompts, found):
    assert found.predicted_perplexity > 1
    assert found.predicted_flips.n == len(found.held_out.tokens)
    made = plan(coarse, prompts, budget_bytes=200_000, n_random=1, by="magnitude")
    assert (made.predicted, made.predicted_flips, made.predicted_perplexity) == (None, None, None)


def test_a_plan_is_read_back(found, tmp_path):
    again = RepairPlan.load(found.save(tmp_path / "plan.json"))
    assert again.to_dict() == found.to_dict()
    assert again.verdict == found.verdict
    assert again.export("gptqmodel") == found.export("gptqmodel")
    assert len(again.to_dataframe()) == len(found.units)
    (tmp_path / "other.json").write_text(json.dumps({"tracelens_other": 1}))
    with pytest.raises(ResultFileError, match="is not a repair plan"):
        RepairPlan.load(tmp_path / "other.json")


def test_the_figure_frames_what_is_kept(found):
    figure = found.plot()
    assert len(figure.layout.shapes) == len(found.kept) + 2, "a frame each, and the two levels"
    grid = figure.data[0]
    assert sum(value is not None for row in grid.z for value in row) == len(found.units)
    assert figure.data[1].y[0] == found.recovery.value


def test_it_is_deterministic_and_leaves_the_model_alone(coarse, prompts):
    before = {name: p.clone() for name, p in coarse.quantized.named_parameters()}
    first, second = (
        plan(coarse, prompts[:8], budget_bytes=300_000, n_random=1, by="alone", granularity="layer") for _ in range(2)
    )
    assert first.to_dict() == second.to_dict()
    assert all(torch.equal(before[name], p) for name, p in coarse.quantized.named_parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget_bytes": 100}, PlanError, "a budget of 100 bytes holds nothing: the smallest, model.layers.0"),
        ({}, PlanError, "neither is given"),
        ({"budget_bytes": 10, "target": 0.5}, PlanError, "both are given"),
        ({"budget_bytes": 0}, PlanError, "positive whole number"),
        ({"target": 1.5}, PlanError, "above 0 and at most 1"),
        ({"target": {"kl": 0.1}}, PlanError, "target is {'kl': 0.1}"),
        ({"budget_bytes": 10**5, "by": "luck"}, UnknownNameError, "unknown way to choose 'luck'"),
        ({"budget_bytes": 10**5, "granularity": "row"}, UnknownNameError, "unknown granularity 'row'"),
        ({"budget_bytes": 10**5, "bits": 16.0}, PlanError, "takes 16 bits a weight"),
        ({"budget_bytes": 10**5, "n_random": 0}, PlanError, "without a random one"),
    ],
)
def test_what_cannot_be_planned_is_said(coarse, prompts, options, error, message):
    with pytest.raises(error, match=message):
        plan(coarse, prompts[:8], **options)


def test_flips_need_a_margin(coarse, prompts):
    with pytest.raises(PlanError, match="needs a margin"):
        plan(coarse, prompts[:8], lambda logits: logits[:, 5], target={"flips": 0.1})
