"""Orders: what each ranks by, by hand or against what is measured directly."""

import pytest
import torch

import tracelens
from tracelens.causal.ablation import importance
from tracelens.causal.matrices import Part, matrices, restored
from tracelens.causal.places import Place
from tracelens.causal.repair.activation_repair import ActivationRepair
from tracelens.causal.repair.halves import parts
from tracelens.causal.repair.orders import checked_orders, ranked
from tracelens.causal.repair.runs import Runs
from tracelens.causal.repair.weight_repair import WeightRepair
from tracelens.errors import UnknownNameError
from tracelens.organism import sample
from tracelens.precision.controls import matched_noise
from tracelens.sites import Site


@pytest.fixture(scope="module")
def given(organism):
    """A pair that differs little, so that first order is nearly all there is."""
    quantized = tracelens.apply_precision(organism, "int8")
    pair = tracelens.PrecisionPair(organism, quantized)
    metric = tracelens.behaviour.answer_tokens_for(organism.tokenizer)
    # Two lengths: prompts of one length share their passes.
    choose, _ = parts(pair, sample(24, where=lambda p: len(p.prompt.split()) in (10, 11)), metric=metric)
    runs = Runs(pair)
    places = (Place(Site(1, "z"), None, 0), Place(Site(2, "mlp_out")), Place(Site(3), "answer"))
    heads = ActivationRepair(places, runs, choose)
    found = matrices(organism, quantized)
    return pair, choose, runs, heads, found


def alone(runs, choose, found):
    start, goal = (runs.plain(name, choose.prompts, choose.metric) for name in ("quantized", "reference"))
    d = goal - start
    values = []
    for matrix in found:
        with restored([Part(matrix)]):
            values.append(
                float(((runs.plain("quantized", choose.prompts, choose.metric) - start) * d).sum() / (d * d).sum())
            )
    return torch.tensor(values)


def test_attribution_of_weights_foretells_what_each_brings_alone(given):
    _, choose, runs, heads, found = given
    exact = alone(runs, choose, found)
    for gradient in ("reference", "both"):
        repair = WeightRepair(found, "matrix", runs, choose, 8.0, gradient, heads)
        guess = repair.scores("attribution").float()
        assert torch.corrcoef(torch.stack([guess, exact]))[0, 1] > 0.95
    assert repair.scores("alone").float() == pytest.approx(exact.numpy(), abs=1e-4)
    # With the mean gradient of both ends, the parts add up to the whole but for third order.
    assert float(guess.sum()) == pytest.approx(1, abs=0.05)
    assert torch.equal(repair.scores("attribution size"), repair.scores("attribution").abs())


def test_rows_and_layers_add_up_to_matrices(given):
    _, choose, runs, heads, found = given
    rows, whole, layers = (
        WeightRepair(found, grain, runs, choose, 8.0, heads=heads) for grain in ("row", "matrix", "layer")
    )
    sizes = [m.shape[0] for m in found]
    for by, power in (("attribution", 1), ("magnitude", 2)):
        summed = torch.stack([part.sum() for part in (rows.scores(by) ** power).split(sizes)])
        assert summed.numpy() == pytest.approx((whole.scores(by) ** power).numpy(), abs=1e-9)
        by_layer = torch.zeros(5, dtype=torch.float64).index_add_(0, torch.tensor(whole.layers), summed)
        assert by_layer.numpy() == pytest.approx((layers.scores(by) ** power).numpy(), abs=1e-9)
    assert float(rows.bytes().sum()) == float(whole.bytes().sum()) == float(layers.bytes().sum())
    error = found[3].error
    assert float(whole.scores("magnitude")[3]) == pytest.approx(float(error.norm()), rel=1e-5)
    relative = error.norm() / found[3].reference.norm()
    assert float(whole.scores("relative magnitude")[3]) == pytest.approx(float(relative), rel=1e-5)


def test_drift_magnitude_and_importance_of_activations(given):
    pair, choose, _, heads, _ = given
    off, relative = [], []
    for ids in choose.prompts.tokens:
        ours, theirs = (model.run_with_cache(torch.tensor([ids]))[1] for model in (pair.reference, pair.quantized))
        for hook, cut in (
            ("blocks.1.attn.hook_z", (0, slice(1, None), 0)),  # BOS left out
            ("blocks.2.hook_mlp_out", (0, slice(1, None))),
            ("blocks.3.hook_resid_post", (0, -1)),
        ):
            a, b = ours[hook][cut], theirs[hook][cut]
            off.append(float((a - b).norm()))
            relative.append(float((a - b).norm() / a.norm()))
    means = [torch.tensor(values).view(-1, 3).mean(0).numpy() for values in (off, relative)]
    assert heads.scores("magnitude").numpy() == pytest.approx(means[0], rel=1e-3)
    assert heads.scores("drift").numpy() == pytest.approx(means[1], rel=1e-3)
    expected = (
        importance(pair.reference, choose.prompts, components=heads.places, metric=choose.metric).change.abs().mean(1)
    )
    assert heads.scores("importance").numpy() == pytest.approx(expected.numpy())
    product = heads.scores("importance") * heads.scores("drift")
    assert torch.equal(heads.scores("importance×drift"), product)


def test_attribution_of_activations_foretells_what_each_brings_alone(given):
    *_, heads, _ = given
    assert heads.scores("attribution").numpy() == pytest.approx(heads.scores("alone").numpy(), abs=0.15)
    assert heads.scores("attribution")[2] > 0.5


def test_features_are_ranked_and_restored(given):
    pair, choose, _, _, _ = given
    noisy = tracelens.PrecisionPair(
        pair.reference, matched_noise(pair.reference, tracelens.apply_precision(pair.reference, "int3-g32"))
    )
    saes = tracelens.features.normalise_saes(tracelens.load_saes("organism"))
    site = Site(3)
    active = tracelens.causal.ablation.active_features(
        pair.reference, saes, choose.prompts.texts, min_active=12, chat="never"
    )
    features = sorted(next(v for k, v in active.items() if Site.parse(k) == site))[:12]
    runs = Runs(noisy, saes)
    repair = ActivationRepair(tuple(Place(site, None, feature=f) for f in features), runs, choose)
    assert repair.bytes(choose.prompts).tolist() == [2.0] * len(features)
    for by in ("drift", "magnitude", "attribution"):
        assert repair.scores(by).isfinite().all()
    guess, exact = repair.scores("attribution"), repair.scores("alone")
    assert torch.corrcoef(torch.stack([guess, exact]))[0, 1] > 0.5


class Costly:
    """Three components with scores by hand."""

    names, layers, bytes_note = ("a", "b", "c"), (0, 0, 0), ""

    def bytes(self, prompts):
        raise AssertionError

    measure = bytes

    def scores(self, by):
        return torch.tensor([3.0, 5.0, 5.0], dtype=torch.float64)


def test_largest_first_ties_in_order_and_by_byte():
    costs = torch.tensor([1.0, 10.0, 0.0], dtype=torch.float64)
    names, order, scores = ranked(Costly(), ("magnitude", "magnitude per byte"), costs, 2, 0)
    assert names == ("magnitude", "magnitude per byte", "random 0", "random 1")
    assert order[:2].tolist() == [[1, 2, 0], [2, 0, 1]]
    assert all(sorted(row) == [0, 1, 2] for row in order.tolist())
    assert scores[2:].isnan().all()
    assert torch.equal(ranked(Costly(), ("magnitude",), costs, 2, 0)[1][1:], order[2:])


def test_magnitude_and_random_are_always_there():
    known = ("drift", "magnitude", "random")
    assert checked_orders("drift", known) == ("drift", "magnitude")
    assert checked_orders(("random", "magnitude", "drift per byte"), known) == ("magnitude", "drift per byte")
    with pytest.raises(UnknownNameError, match=r"unknown order 'drft'\. Did you mean 'drift'"):
        checked_orders("drft", known)
    with pytest.raises(UnknownNameError, match="random per byte"):
        checked_orders("random per byte", known)
