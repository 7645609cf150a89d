"""Direction repair: an error along the direction is undone wholly, one beside it not at all."""

import math

import pytest
import torch

import tracelens
from tests.handmade import D_MODEL, PLAIN, REFUSES, TOKEN, directions, model
from tracelens.causal.matrices import Matrix, matrices
from tracelens.causal.repair import DirectionRepair, direction
from tracelens.causal.repair.directions import mean_difference, unit
from tracelens.causal.repair.roles import components_fed, writes_to_the_residual
from tracelens.errors import PromptError, UnknownNameError
from tracelens.organism import sample

HARMFUL = [f"{word} no" for word in PLAIN[:8]]
HARMLESS = [f"{word} {word}" for word in PLAIN[:8]]
OPTIONS = {"metric": REFUSES, "chat": "never", "n_random": 5}


def written(along, size):
    """A handmade model whose last MLP writes `size` along a direction at every token; without norms, so that this is all."""
    made = model()
    with torch.no_grad():
        # A bias of W_in makes its first unit fire 1 on everything, and W_out writes it.
        made.blocks[1].mlp.W_in.zero_()
        made.blocks[1].mlp.b_in.zero_()
        made.blocks[1].mlp.b_in[0] = 1
        made.blocks[1].mlp.W_out[0] = size * along
    return made


def pair_of(along, size=2.0):
    return tracelens.PrecisionPair(written(along, 0.0), written(along, size))


def found_direction():
    """That of the handmade model's last layer."""
    reference = written(torch.zeros(D_MODEL), 0.0)
    ends = [torch.tensor([TOKEN[text.split()[-1]] for text in texts]) for texts in (HARMFUL, HARMLESS)]
    return unit(reference.W_E[ends[0]].mean(0) - reference.W_E[ends[1]].mean(0))


def alike(n):
    """Prompts of the embedded model of two lengths: those of one length share their passes."""
    return sample(n, where=lambda p: len(p.prompt.split()) in (10, 11))


def value(found, version, kind, layers="all", column="recovery"):
    table = found.table.set_index(["version", "direction", "layers"])
    return table.loc[(version, kind, layers), column]


def test_an_error_along_the_direction_is_undone_wholly():
    along = found_direction()
    found = direction(pair_of(along), HARMFUL + HARMLESS, harmful=HARMFUL, harmless=HARMLESS, **OPTIONS)
    for version in ("activations", "weights"):
        for layers in ("1", "all"):
            assert value(found, version, "refusal", layers) == pytest.approx(1, abs=1e-3)
            assert value(found, version, "everything", layers) == pytest.approx(1, abs=1e-3)
            assert value(found, version, "refusal", layers, "closed") == pytest.approx(1, abs=1e-3)
            assert abs(value(found, version, "random", layers)) < 0.3
        # Nothing differs in the first layer.
        assert value(found, version, "everything", "0") == pytest.approx(0, abs=1e-6)
    # The largest error is this very direction, so that it is no better than its control.
    assert value(found, "weights", "largest error") == pytest.approx(1, abs=1e-3)
    assert not found.table["wins"].any()


def test_an_error_beside_the_direction_stays():
    along = found_direction()
    beside = unit(directions()[0] - (directions()[0] @ along) * along)
    found = direction(pair_of(beside), HARMFUL + HARMLESS, harmful=HARMFUL, harmless=HARMLESS, **OPTIONS)
    for version in ("activations", "weights"):
        assert value(found, version, "refusal") == pytest.approx(0, abs=1e-3)
        assert value(found, version, "everything") == pytest.approx(1, abs=1e-3)
    assert "not reliably more than the best control" in found.verdict
    assert found.cosine == pytest.approx((1, 1), abs=1e-4)


def test_difference_of_means_by_hand():
    states = torch.tensor([[[1.0, 0], [3, 0], [0, 1], [0, 3]]])
    found = mean_difference(states, torch.tensor([True, True, False, False]))
    assert found[0].tolist() == pytest.approx([2**-0.5, -(2**-0.5)])
    with pytest.raises(PromptError, match="there are 1 harmful and 3 harmless ones"):
        mean_difference(states, torch.tensor([True, False, False, False]))


@pytest.fixture(scope="module")
def found(organism):
    pair = tracelens.PrecisionPair(organism, tracelens.apply_precision(organism, "int3-g32"))
    before = [p.detach().clone() for p in pair.quantized.parameters()]
    metric = tracelens.behaviour.answer_tokens_for(organism.tokenizer)
    made = direction(pair, alike(60), metric=metric, n_random=2, by_layer=False)
    assert all(torch.equal(ours, now) for ours, now in zip(before, pair.quantized.parameters(), strict=True))
    return made


def test_bytes_are_one_vector_a_matrix(found, organism):
    d_model, d_mlp, n = 128, 256, organism.cfg.n_layers
    assert value(found, "weights", "refusal", column="bytes") == 2 * n * (d_model + d_mlp + d_model)
    assert value(found, "weights", "everything", column="bytes") == n * (128 * 128 + 128 * 256) * (16 - 3.5) / 8
    assert value(found, "activations", "refusal", column="bytes") == 2 * n
    assert value(found, "activations", "everything", column="bytes") == 2 * n * d_model


def test_the_organism(found):
    assert value(found, "activations", "everything") == pytest.approx(1, abs=1e-4)
    assert min(found.cosine) > 0.95
    assert found.n_harmful + found.n_harmless == len(found.prompts) == 30


def test_saved_and_read_again(found, tmp_path):
    again = DirectionRepair.load(found.save(tmp_path / "direction.safetensors"))
    assert again.verdict == found.verdict
    assert again.table.equals(found.table)


def test_identical_models_have_nothing_to_repair(organism):
    pair = tracelens.PrecisionPair(organism, organism)
    metric = tracelens.behaviour.answer_tokens_for(organism.tokenizer)
    found = direction(pair, alike(30), metric=metric, n_random=1, by_layer=False, at="answer")
    assert found.table["recovery"].isna().all()
    assert not found.table["wins"].any()
    assert "(0/0)" in found.verdict
    assert math.isnan(found.table["p_adjusted"].iloc[0])


def test_a_quantized_side_that_rounds_activations(organism):
    pair = tracelens.PrecisionPair(organism, tracelens.apply_precision(organism, "int4-g32+a8"))
    metric = tracelens.behaviour.answer_tokens_for(organism.tokenizer)
    found = direction(pair, alike(30), metric=metric, n_random=1, source=3, by_layer=False)
    assert value(found, "activations", "everything") == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("wrapper", ["hooked", "bridge"])
def test_either_wrapper(tiny_folder, wrapper):
    pair = tracelens.PrecisionPair(*(tracelens.load(tiny_folder, wrapper=wrapper, device="cpu") for _ in range(2)))
    writers = [m for m in matrices(pair.reference, pair.quantized) if writes_to_the_residual(m, 32)]
    assert len(writers) == 2 * 3
    with torch.no_grad():
        writers[2].quantized.add_(0.3 * torch.ones_like(writers[2].quantized))
    found = direction(pair, HARMFUL + HARMLESS, harmful=HARMFUL, harmless=HARMLESS, source=1, **OPTIONS)
    assert value(found, "activations", "everything") == pytest.approx(1, abs=1e-3)
    assert value(found, "weights", "everything") == pytest.approx(1, abs=1e-3)
    # The same matrices under either name.
    places = [tracelens.causal.places.Place(tracelens.Site(1, "z"), None, head) for head in range(4)]
    by_name = {m.name: m for m in matrices(pair.reference, pair.quantized) if m.layer == 1}
    fed = {name: components_fed(m, places, pair.reference.cfg) for name, m in by_name.items()}
    keys = next(rows for name, rows in fed.items() if name.endswith(("_W_K", "k_proj.weight")))
    assert keys == [[0, 1]] * 8 + [[2, 3]] * 8
    queries = next(rows for name, rows in fed.items() if name.endswith((".W_Q", "q_proj.weight")))
    assert queries == [[row // 8] for row in range(32)]


def test_what_cannot_be_repaired_is_said(organism):
    pair = tracelens.PrecisionPair(organism, organism)
    metric = tracelens.behaviour.answer_tokens_for(organism.tokenizer)
    with pytest.raises(PromptError, match="harmful and harmless belong together"):
        direction(pair, sample(10), metric=metric, harmful=sample(4))
    with pytest.raises(UnknownNameError, match="layer 9"):
        direction(pair, sample(10), metric=metric, source=9)
    with pytest.raises(PromptError, match="give harmful= and harmless="):
        direction(pair, sample(20, where=lambda p: p.z > 3), metric=metric)


def test_experts_in_one_tensor_are_refused():
    stacked = torch.zeros(4, 32, 40)
    experts = Matrix("model.layers.0.mlp.experts.down_proj", 0, (128, 40), stacked, stacked, (0, 1), (2,))
    with pytest.raises(UnknownNameError, match=r"all experts in one tensor.*wrapper='hooked'"):
        writes_to_the_residual(experts, 32)
    inwards = Matrix("model.layers.0.mlp.experts.gate_up_proj", 0, (320, 32), stacked, stacked, (0, 1), (2,))
    assert not writes_to_the_residual(inwards, 32)
