"""What repairs claim: nothing is chosen on what it is measured on, a lucky draw is no win, and targets are checked where they count."""

from dataclasses import replace

import pytest
import torch

import tracelens
from tracelens.causal.components import components_of
from tracelens.causal.matrices import matrices
from tracelens.causal.rank_correlation import rank_correlation
from tracelens.causal.readout import Function, LogitDifference
from tracelens.causal.repair import choosing, curve, plan
from tracelens.causal.repair.halves import parts
from tracelens.causal.repair.measures import LEVEL, rank_p
from tracelens.causal.repair.roles import components_fed
from tracelens.errors import MetricInputError, PrecisionSpecError, PromptError
from tracelens.organism import sample

ROWS = [[5, 6, 7, 8], [9, 8, 7, 6], [4, 9, 5, 8], [6, 4, 8, 5], [7, 9, 4, 6], [8, 5, 9, 7]]


@pytest.fixture(scope="module")
def pair(organism):
    return tracelens.PrecisionPair(organism, tracelens.apply_precision(organism, "int2-g32"))


@pytest.fixture(scope="module")
def refusal(organism):
    return tracelens.behaviour.answer_tokens_for(organism.tokenizer)


@pytest.fixture(scope="module")
def prompts():
    # Two lengths: prompts of one length share their passes.
    return sample(24, seed=2, where=lambda p: len(p.prompt.split()) in (10, 11))


@pytest.fixture(scope="module")
def lucky(pair, prompts):
    """A plan of matrices drawn at random."""
    return plan(pair, prompts, budget_bytes=400_000, by="random", n_random=20)


@pytest.mark.parametrize("gradient", ["reference", "both"])
def test_heads_of_a_bridge_are_attributed_as_those_of_the_hooked_model(tiny_folder, gradient):
    metric = Function(lambda logits: logits[:, 7] - logits[:, 9], "difference")
    scores = {}
    for wrapper in ("hooked", "bridge"):
        reference, quantized = (tracelens.load(tiny_folder, wrapper=wrapper) for _ in range(2))
        with torch.no_grad():
            for matrix in matrices(reference, quantized):
                matrix.quantized.mul_(1.02)
        found = curve(
            tracelens.PrecisionPair(reference, quantized),
            ROWS,
            metric=metric,
            restore="activations",
            components=("head", "mlp"),
            by="attribution",
            gradient=gradient,
            n_random=1,
        )
        scores[wrapper] = found.scores[found.orders.index("attribution")]
    heads = scores["bridge"][:12]
    assert heads.abs().min() > 0
    assert torch.allclose(scores["bridge"], scores["hooked"], rtol=1e-3, atol=1e-5)


def test_a_prompt_given_twice_is_on_one_side_only(pair, prompts, refusal):
    chosen, held = parts(pair, [*prompts, *prompts], metric=refusal)
    assert not set(chosen.prompts.tokens) & set(held.prompts.tokens)
    assert [chosen.prompts.texts[0], held.prompts.texts[0]] == [
        [p.prompt for p in (*prompts, *prompts)][rows[0]] for rows in (chosen.rows, held.rows)
    ]
    other, _ = parts(pair, prompts[:6], prompts[3:12], metric=refusal)
    assert len(other.prompts) == 6
    with pytest.raises(PromptError, match="all prompts to choose on are among the held-out ones"):
        parts(pair, [prompts[0], prompts[0]], metric=refusal)


def test_answers_of_one_set_are_not_read_of_another(pair):
    metric = LogitDifference((7,) * 6, (9,) * 6)
    other = [row[::-1] for row in ROWS]
    with pytest.raises(PromptError, match="something of its own for each prompt"):
        curve(pair, ROWS, metric=metric, choose_on=other, n_random=1)


@pytest.mark.parametrize("bits", [0, 16.0, 32.0])
def test_what_is_kept_costs_more_than_nothing(pair, prompts, refusal, bits):
    with pytest.raises(PrecisionSpecError, match="bits_per_weight is"):
        curve(pair, prompts, metric=refusal, bits_per_weight=float(bits), n_random=1)


@pytest.mark.parametrize("restore", ["weights", "activations"])
def test_a_metric_without_a_gradient_is_named(pair, prompts, restore):
    metric = Function(lambda logits: logits.argmax(-1).float(), "count")
    with pytest.raises(MetricInputError, match="'count' has no gradient"):
        curve(pair, prompts, metric=metric, restore=restore, by="attribution", n_random=1)


def test_a_rank_among_few_says_little():
    assert rank_p(0, 19) == pytest.approx(LEVEL)
    assert rank_p(0, 18) > LEVEL
    assert rank_p(1, 39) == pytest.approx(LEVEL)


def at(plan, share):
    """The plan's outcome if every held-out prompt had come back by `share`."""
    goal, start = (torch.tensor(plan.outcome(n).values, dtype=torch.float64) for n in ("reference", "quantized"))
    own = plan.outcome("plan")
    return replace(
        own,
        values=tuple((start + (goal - start) * share).tolist()),
        recovery=replace(own.recovery, value=share, low=share, high=share),
    )


def test_one_random_choice_as_good_is_a_lucky_draw(lucky):
    weak = [replace(at(lucky, 0.1), name=f"random {i + 1}") for i in range(20)]
    ends = [outcome for outcome in lucky.outcomes if not outcome.name.startswith(("random ", "plan"))]
    clear = replace(lucky, outcomes=(*ends, at(lucky, 0.9), *weak))
    assert clear.advantages["random"].low > 0
    assert clear.as_good == 0
    assert clear.beats["random"]
    assert "It beats 20 random choices" in clear.verdict
    shared = replace(clear, outcomes=(*clear.outcomes[:-1], replace(at(lucky, 0.9), name="random 20")))
    assert shared.advantages["random"].low > 0
    assert shared.as_good == 1
    assert not shared.beats["random"]
    assert "NOT told from a lucky one" in shared.verdict
    assert "1 of them bring back as much or more" in shared.verdict


def test_a_target_that_is_met_as_it_is_must_hold_on_the_held_out_prompts_too(pair, prompts):
    found = plan(pair, prompts, target={"flips": 1.0}, n_random=1)
    assert found.kept == ()
    assert found.target_holds is True
    assert "and on the 12 held-out ones" in found.verdict
    reference, quantized = (found.outcome(name) for name in ("reference", "quantized"))
    turned = replace(quantized, values=tuple(-value for value in reference.values))
    strict = replace(found, target=replace(found.target, value=0.5), outcomes=(reference, turned))
    assert strict.target_holds is False
    assert "does NOT on the 12 held-out ones" in strict.verdict


def test_rows_of_keys_and_values_feed_the_heads_of_their_group(organism):
    cfg = organism.cfg
    group = cfg.n_heads // cfg.n_key_value_heads
    places = components_of(organism, ("head", "mlp"))
    found = {m.name: m for m in matrices(organism, organism)}
    fed = components_fed(found["blocks.1.attn._W_V"], places, cfg)
    heads = [{places[i].unit for i in row} for row in fed]
    assert all(places[i].site.layer == 1 for row in fed for i in row)
    assert heads == [
        set(range(row // cfg.d_head * group, row // cfg.d_head * group + group)) for row in range(len(fed))
    ]


def test_more_things_than_can_be_chosen_exactly_are_taken_by_rate(monkeypatch):
    monkeypatch.setattr(choosing, "EXACT", 0)
    assert choosing.fewest_bytes([1.0, 3.0, 2.0, -1.0], [1, 1, 4, 1], 3.5) == [0, 1]
    assert choosing.most_gain([1.0, 3.0, 2.0, -1.0], [1, 1, 4, 1], 2) == [0, 1]


def test_orders_that_tie_with_the_own_one_count_in_its_p():
    x = torch.arange(4, dtype=torch.float64)
    found = rank_correlation(x, x, x[None], x[None])
    assert found.p_value == pytest.approx(2 / 24, abs=0.02), "two of the 24 orders are perfect, up or down"
