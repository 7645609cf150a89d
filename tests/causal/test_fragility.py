import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests.tiny import TEXTS, write_checkpoint
from tracelens import PrecisionPair, apply_precision, load
from tracelens.behaviour import AnswerTokens
from tracelens.causal.ablation import importance
from tracelens.causal.ablation_result import Importance
from tracelens.causal.component_drift import Drift
from tracelens.causal.fragility import associate, fragility
from tracelens.causal.fragility_result import Association, Fragility
from tracelens.causal.places import Place
from tracelens.causal.rank_correlation import covariates, detectable_at, rank_correlation
from tracelens.errors import PromptError, ResultFileError, UnknownNameError
from tracelens.precision.controls import matched_noise
from tracelens.sites import Site
from tracelens.stats import Estimate

ANSWERS = AnswerTokens((5,), (7,))
OPTIONS = {"metric": ANSWERS, "chat": "never", "n_resamples": 100, "n_permutations": 500}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlate(x, y, **options):
    replicates = [v + 0.01 * drawn(50, len(v), seed=i) for i, v in enumerate((x, y))]
    return rank_correlation(x, y, *replicates, **{"n_permutations": 500, **options})


# Rank correlation -------------------------------------------------------------------------------------------------------


def test_equals_scipy():
    tied = spearmanr(drawn(15, seed=1).round(), drawn(15, seed=2).round())
    assert correlate(drawn(15, seed=1).round(), drawn(15, seed=2).round()).estimate.value == pytest.approx(
        tied.statistic
    )
    x, y = drawn(15, seed=3), drawn(15, seed=2)
    expected = spearmanr(x, y)
    found = correlate(x, y, n_permutations=20_000)
    assert found.estimate.value == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)
    assert found.n == 15


def test_partial_is_the_correlation_of_what_regression_leaves():
    x, y, given = drawn(30, seed=1), drawn(30, seed=2), drawn(30, 2, seed=3)
    design = np.column_stack([np.ones(30), given.numpy()])
    left = []
    for v in (x, y):
        ranks = v.argsort().argsort().double().numpy()
        left.append(ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0])
    assert correlate(x, y, given=given).estimate.value == pytest.approx(np.corrcoef(*left)[0, 1])


@pytest.mark.parametrize("partial", [False, True])
def test_p_is_uniform_where_there_is_nothing(partial):
    p = []
    for seed in range(150):
        given = drawn(14, 2, seed=3 * seed + 2)
        x, y = drawn(14, seed=3 * seed), drawn(14, seed=3 * seed + 1)
        if partial:  # both follow what is controlled for, and nothing else joins them
            x, y = x + 2 * given[:, 0], y + 2 * given[:, 0]
        nothing = torch.zeros(1, 14, dtype=torch.float64)
        p.append(rank_correlation(x, y, nothing, nothing, given=given if partial else None, n_permutations=200).p_value)
    found = torch.tensor(p)
    assert 0.4 < found.mean() < 0.6
    assert (found <= 0.05).double().mean() < 0.11
    assert (found >= 0.5).double().mean() > 0.38


def test_a_confound_makes_a_correlation_that_partial_takes_away():
    norm = drawn(40, seed=7).exp()
    x, y = norm.log() + 0.3 * drawn(40, seed=8), -norm.log() + 0.3 * drawn(40, seed=9)
    layer = torch.arange(40) // 8
    assert correlate(x, y).estimate.value < -0.7
    assert correlate(x, y).p_value < 0.01
    controlled = correlate(x, y, given=covariates(norm, layer))
    assert abs(controlled.estimate.value) < 0.4
    assert controlled.p_value > 0.05


def test_layers_are_a_factor_where_there_are_enough():
    norm = torch.arange(1.0, 9.0, dtype=torch.float64)
    assert covariates(norm, torch.arange(8) // 2).shape == (8, 4)
    assert covariates(norm, torch.arange(8)).shape == (8, 2)
    # A step from layer to layer, up and down, is no trend, but a factor takes it away.
    layer = torch.arange(40) // 8
    step = torch.tensor([0.0, 9.0, 0.0, 9.0, 0.0], dtype=torch.float64)[layer]
    x, y = step + drawn(40, seed=1), step + drawn(40, seed=2)
    assert correlate(x, y).p_value < 0.01
    assert correlate(x, y, given=covariates(drawn(40, seed=4), layer)).p_value > 0.05


def test_undefined_where_nothing_varies():
    x = drawn(10)
    for a, b in ((x, torch.ones(10).double()), (x[:3], x[:3]), (x, torch.full((10,), torch.nan).double())):
        found = correlate(a, b)
        assert np.isnan([found.estimate.value, found.p_value, found.detectable]).all()
    # Five points, a constant, a norm and a trend leave too little.
    assert np.isnan(correlate(x[:5], -x[:5], given=covariates(x[:5].abs(), torch.arange(5))).estimate.value)


def test_unknown_components_are_left_out():
    x, y = drawn(12, seed=1), drawn(12, seed=2)
    holes = y.clone()
    holes[3] = torch.nan
    known = [i for i in range(12) if i != 3]
    assert correlate(x, holes).estimate.value == pytest.approx(spearmanr(x[known], y[known]).statistic)
    assert correlate(x, holes).n == 11


def test_detectable():
    # Of 5 components all orders but 2 of 120 are less than perfect: only ±1 is rare.
    assert correlate(drawn(5, seed=1), drawn(5, seed=2), n_permutations=5000).detectable == pytest.approx(1)
    assert np.isnan(detectable_at(torch.ones(10).double()))
    assert detectable_at(torch.linspace(0, 1, 101).double()) == pytest.approx(0.96)


# Associations -----------------------------------------------------------------------------------------------------------


def made_up(n_layers=5, n_heads=4, n_prompts=60, slope=-1.0, spread=0.05, seed=0):
    """Importance and drift of heads, the drift falling (`slope` −1) or rising with importance or random (0)."""
    places = tuple(Place(Site(layer, "z"), None, head) for layer in range(n_layers) for head in range(n_heads))
    importances = drawn(len(places), seed=seed).exp()
    other = drawn(len(places), seed=seed + 1).exp()
    drifts = other if slope == 0 else importances**slope
    change = importances[:, None] * (1 + spread * drawn(len(places), n_prompts, seed=seed + 2))
    relative = 0.1 * drifts[:, None] * (1 + spread * drawn(len(places), n_prompts, seed=seed + 3)).abs()
    signs = drawn(1, n_prompts, seed=seed + 4).sign()
    prompts = tuple(f"prompt {i}" for i in range(n_prompts))
    norm = drawn(len(places), seed=seed + 5).exp()
    plain = torch.zeros(n_prompts, dtype=torch.float64)
    return (
        Importance(places, "mean", "margin", "nats", plain, change * signs, None, prompts),
        Drift(places, relative, norm, "made up", prompts),
    )


def test_a_planted_correlation_is_found():
    for slope in (-1.0, 1.0):
        ours, drift = made_up(slope=slope)
        (found,) = associate(ours, {"int4": drift}, n_permutations=1000)
        assert found.correlation.value * slope > 0.97
        assert 0.9 < found.correlation.low * slope <= 1 or 0.9 < found.correlation.high * slope <= 1
        assert found.p_value == pytest.approx(1 / 1001)
        assert found.partial.value * slope > 0.9
        word = "less" if slope < 0 else "more"
        assert f"int4, 20 heads: the important drift {word}" in found.verdict
        assert f"with norm and layer controlled for, the important drift {word}" in found.verdict
        assert "not compared with noise" in found.verdict


def test_nothing_planted_is_called_so():
    ours, drift = made_up(slope=0.0, seed=10)
    (found,) = associate(ours, {"int4": drift}, n_permutations=1000)
    assert found.p_value > 0.05
    assert "not distinguishable from none" in found.verdict
    assert "only |ρ| ≥ 0.4" in found.verdict


def test_kinds_are_not_pooled():
    ours, drift = made_up(slope=0.0, seed=10)
    more, less = made_up(n_layers=10, n_heads=1, slope=0.0, seed=30)
    mlps = tuple(Place(Site(place.site.layer, "mlp_out")) for place in more.components)
    # MLPs matter a thousand times as much and drift a thousandth: pooled, that alone would be a correlation.
    both = Importance(
        ours.components + mlps, "mean", "margin", "nats", ours.plain, torch.cat([ours.change, 1000 * more.change])
    )
    drifts = Drift(
        both.components, torch.cat([drift.relative, less.relative / 1000]), torch.cat([drift.norm, less.norm])
    )
    assert spearmanr(both.value, drifts.value).pvalue < 1e-3
    found = associate(both, {"q": drifts}, n_permutations=500)
    assert [each.kind for each in found] == ["head", "mlp"]
    assert all(each.p_value > 0.05 for each in found)


def test_noise_that_does_the_same_is_said():
    ours, drift = made_up()
    others = [made_up(seed=0, spread=0.06)[1], made_up(seed=0, spread=0.04)[1]]
    (same,) = associate(ours, {"q": drift}, {"q": others}, n_permutations=500)
    assert same.versus_noise.low <= 0 <= same.versus_noise.high
    assert "noise of the same size shows as much" in same.verdict
    (unlike,) = associate(ours, {"q": drift}, {"q": [made_up(slope=1.0)[1]]}, n_permutations=500)
    assert unlike.noise.value > 0.9
    assert unlike.versus_noise.high < -1.5
    assert "noise of the same size gives ρ = 1.000" in unlike.verdict


def test_p_values_are_adjusted_over_all():
    ours, drift = made_up(slope=0.0, seed=10)
    _, falling = made_up(seed=10)
    found = associate(ours, {"a": drift, "b": falling, "c": drift}, n_permutations=500)
    assert all(each.p_adjusted >= each.p_value for each in found)
    assert found[1].p_adjusted == pytest.approx(3 * found[1].p_value)


def test_verdict_of_what_hides_behind_confounds():
    nothing, strong = Estimate(-0.1, -0.2, 0.1), Estimate(-0.7, -0.8, -0.6)
    hidden = Association("q", "head", 20, nothing, 0.6, 0.6, 0.45, strong, 0.01, 0.5, None, None)
    assert "not distinguishable from none" in hidden.verdict
    assert "with norm and layer controlled for, the important drift less" in hidden.verdict
    few = Association("q", "mlp", 4, nothing, 0.6, 0.6, float("nan"), strong, float("nan"), float("nan"), None, None)
    assert "so few can show none" in few.verdict


@pytest.mark.parametrize("rounds", [False, True])
def test_verdict_says_what_noise_does_not_match(rounds):
    apart = Estimate(-0.2, -0.3, -0.1)
    strong = Estimate(-0.8, -0.9, -0.7)
    found = Association("q", "head", 20, strong, 0.001, 0.001, 0.45, strong, 0.01, 0.5, strong, apart, rounds)
    assert "a difference of -0.2" in found.verdict
    assert ("this model rounds activations too" in found.verdict) is rounds


@pytest.mark.parametrize(
    ("rounds", "precisions"),
    [
        (True, ["int4-g8+a8", "int4-g8+kv8", "int4-g8+bf16", "fp16", "int8-dynamic", "llm-int8"]),
        (False, ["int4-g8", "llm-int8-weights"]),
    ],
)
def test_which_models_round_activations(tiny_model, rounds, precisions):
    found = fragility(tiny_model, precisions, TEXTS, n_noise=0, **OPTIONS)
    assert {each.rounds_activations for each in found.associations} == {rounds}
    assert found.correlations["rounds_activations"].eq(rounds).all()


# On models --------------------------------------------------------------------------------------------------------------


def test_identical_models_have_no_correlation(tiny_model):
    found = fragility(tiny_model, {"same": tiny_model}, TEXTS, n_noise=1, **OPTIONS)
    assert [each.kind for each in found.associations] == ["head", "mlp"]
    for each in found.associations:
        assert np.isnan([each.correlation.value, each.p_value, each.p_adjusted]).all()
        assert "undefined" in each.verdict
    assert found.drifts["same"].relative.abs().max() == 0


def test_all_ways_to_name_a_quantized_model(tiny_model):
    model = apply_precision(tiny_model, "int4-g8")
    ways = {"model": model, "pair": PrecisionPair(tiny_model, model), "spec": "int4-g8"}
    found = fragility(tiny_model, ways, TEXTS, n_noise=0, **OPTIONS)
    first = found.drifts["model"].relative
    assert all(torch.equal(drift.relative, first) for drift in found.drifts.values())
    listed = fragility(tiny_model, ["int4-g8", "int4-g8+a8"], TEXTS, n_noise=0, importance=found.importance, **OPTIONS)
    assert list(listed.drifts) == ["int4-g8", "int4-g8+a8"]
    assert torch.equal(listed.drifts["int4-g8"].relative, first)
    assert not torch.equal(listed.drifts["int4-g8+a8"].relative, first)
    assert listed.importance is found.importance
    assert all(each.noise is None for each in listed.associations)


def test_matched_noise_is_like_matched_noise(tiny_model):
    quantized = matched_noise(tiny_model, apply_precision(tiny_model, "int3-g8"), seed=99)
    found = fragility(tiny_model, {"noise": quantized}, TEXTS, n_noise=4, **OPTIONS)
    (heads, _) = found.associations
    assert len(found.noise["noise"]) == 4
    assert heads.versus_noise.low <= 0 <= heads.versus_noise.high
    table = found.table
    assert (table["noise_drift"] > 0).all()
    assert set(table["model"]) == {"noise"}
    assert list(found.correlations["n_components"]) == [12, 3]


def test_save_and_load(tiny_model, tmp_path):
    found = fragility(tiny_model, ["int4-g8", "int3-g8"], TEXTS, n_noise=2, **OPTIONS)
    back = Fragility.load(found.save(tmp_path / "fragility.safetensors"))
    assert back.verdict == found.verdict
    assert back.table.equals(found.table)
    assert back.correlations.equals(found.correlations)
    assert back.settings == found.settings
    with pytest.raises(ResultFileError, match="tracelens_importance"):
        Importance.load(tmp_path / "fragility.safetensors")


def test_bridges(tiny_folder, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    reference, quantized = (load(folder, device="cpu", wrapper="bridge") for folder in (tiny_folder, other))
    found = fragility(reference, {"other": quantized}, TEXTS, n_noise=1, **OPTIONS)
    hooked = fragility(
        load(tiny_folder, device="cpu"), {"other": load(other, device="cpu")}, TEXTS, n_noise=0, **OPTIONS
    )
    for ours, theirs in zip(found.associations, hooked.associations, strict=True):
        assert ours.correlation.value == pytest.approx(theirs.correlation.value, abs=1e-6, nan_ok=True)
    assert found.associations[0].noise is not None


def test_errors(tiny_model):
    with pytest.raises(UnknownNameError, match="names no model"):
        fragility(tiny_model, {}, TEXTS, **OPTIONS)
    ours = importance(tiny_model, TEXTS[:2], metric=ANSWERS, chat="never")
    with pytest.raises(PromptError, match=r"other prompts \(2\) than these \(4\)"):
        fragility(tiny_model, ["int4-g8"], TEXTS, importance=ours, **OPTIONS)
