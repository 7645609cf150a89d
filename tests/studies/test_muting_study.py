import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tests import handmade
from tests.handmade import FEATURES, OPTIONS, SAFETY, ReadOut
from tests.planted import unwritten
from tracelens import Audit, SweepResult, load_saes
from tracelens.errors import MetricInputError, ResultFileError, UnknownNameError
from tracelens.precision import QuantizationConfig as Config
from tracelens.precision import apply_precision
from tracelens.studies.ladders import families, ladder
from tracelens.studies.muting import MutingThresholds, dead_features, muting_thresholds
from tracelens.studies.muting_causes import MutingTrace, feature_muting
from tracelens.studies.muting_control import noise_moments

PROMPTS = handmade.prompts()
DEAD = {"int8": [], "int4": [5], "int3": [5, 0, 9], "int2": [0, 9, 11]}
"""Features that are planted as muted in each precision; 5 comes back at two bits."""


@pytest.fixture(scope="module")
def reference():
    return handmade.model()


@pytest.fixture(scope="module")
def sweep(reference):
    reports = {}
    for spec, dead in DEAD.items():
        quantized = unwritten(reference, handmade.directions()[dead], layer=1) if dead else reference
        made = Audit(reference, quantized).load_sae({layer: ReadOut() for layer in (0, 1)})
        reports[spec] = made.trace_features(PROMPTS, **OPTIONS | {"controls": False})
    return SweepResult(reports)


@pytest.fixture(scope="module")
def thresholds(sweep):
    return muting_thresholds(sweep)


def test_brackets_of_planted_mutings(thresholds):
    rows = thresholds.table.set_index(["site", "feature"])
    assert len(rows) == 2 * FEATURES
    for site in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"):
        for feature, kept, below, monotone in ((5, 8, 4, False), (0, 4, 3, True), (9, 4, 3, True), (11, 3, 2, True)):
            row = rows.loc[(site, feature)]
            assert (row["kept_at"], row["muted_below"], row["monotone"]) == (kept, below, monotone)
            assert row["censored"] == ""
    others = rows.drop(index=[0, 5, 9, 11], level="feature")
    assert set(others["censored"]) == {"never muted"}
    assert (others["kept_at"] == 2).all()
    assert others["muted_below"].isna().all()
    assert thresholds.precisions == ("int8", "int4", "int3", "int2")


def test_safety_features_stand_first_and_lists_hold_the_dead(thresholds, sweep):
    behaviours = thresholds.table["behaviour"].tolist()
    assert behaviours == ["refusal"] * 2 * SAFETY + ["capability"] * 2 * (FEATURES - SAFETY)
    for spec, dead in DEAD.items():
        table = thresholds.dead_at(spec)
        assert sorted(table["feature"]) == sorted(2 * dead)
        assert sorted(dead_features(sweep[spec])["feature"]) == sorted(2 * dead)
    assert thresholds.dead_at("int3")["feature"].tolist()[:2] == [0, 0]
    with pytest.raises(UnknownNameError, match="precision of this ladder 'int5'"):
        thresholds.dead_at("int5")


def test_shares_by_hand(thresholds):
    shares = thresholds.shares.set_index(["precision", "set"])
    for spec, dead in DEAD.items():
        n_safety = sum(feature < SAFETY for feature in dead)
        assert shares.loc[(spec, "safety"), "share"] == pytest.approx(n_safety / SAFETY)
        assert shares.loc[(spec, "capability"), "share"] == pytest.approx((len(dead) - n_safety) / (FEATURES - SAFETY))
        assert shares.loc[(spec, "safety"), "n"] == 2 * SAFETY
    assert (
        (thresholds.shares["low"] <= thresholds.shares["share"])
        & (thresholds.shares["share"] <= thresholds.shares["high"])
    ).all()


def test_comparison_is_mann_whitney_of_the_order(thresholds):
    from scipy.stats import mannwhitneyu

    steps = {spec: [feature in dead for feature in range(FEATURES)] for spec, dead in DEAD.items()}
    order = torch.tensor(list(steps.values())).sum(0).repeat(2)
    safety = (torch.arange(FEATURES) < SAFETY).repeat(2)
    expected = mannwhitneyu(order[safety], order[~safety], method="asymptotic")
    c = thresholds.comparison
    assert (c.n_safety, c.n_capability) == (2 * SAFETY, 2 * (FEATURES - SAFETY))
    assert c.earlier == pytest.approx(expected.statistic / (c.n_safety * c.n_capability))
    assert c.p_value == pytest.approx(expected.pvalue)
    assert 0 < c.p_matched <= 1


def test_round_trip_and_figure(thresholds, tmp_path):
    path = thresholds.save(tmp_path / "thresholds.json")
    again = MutingThresholds.load(path)
    pd.testing.assert_frame_equal(again.table, thresholds.table)
    pd.testing.assert_frame_equal(again.shares, thresholds.shares)
    assert again.comparison == thresholds.comparison
    figure = again.plot()
    assert {"safety features", "capability features"} <= {trace.name for trace in figure.data}
    (safety,) = [trace for trace in figure.data if trace.name == "safety features"]
    assert list(safety.x) == [8, 4, 3, 2]
    path.write_text("{}")
    with pytest.raises(ResultFileError, match="not a tracelens_muting_thresholds file"):
        MutingThresholds.load(path)


def test_ladders(sweep):

    specs = ["int8", "int4-g32", "nf4", "int3", "int2-g32", "int8+a8", "fp8"]
    found = families([Config.parse(spec) for spec in specs])
    assert found == {
        "int": ["int8", "int3"],
        "int-g32": ["int4-g32", "int2-g32"],
        "nf4": ["nf4"],
        "int+a8": ["int8+a8"],
        "fp8": ["fp8"],
    }
    assert ladder(sweep, ["int2", "int8"]) == ["int8", "int2"]
    report = sweep["int8"]
    mixed = SweepResult(dict.fromkeys(specs, report))
    with pytest.raises(MetricInputError, match=r"2 families of several widths .*name the ladder"):
        ladder(mixed)
    with pytest.raises(MetricInputError, match="differ in nothing but the width of their integers; got int8; nf4"):
        ladder(mixed, ["int8", "nf4"])
    with pytest.raises(UnknownNameError, match="precision of this sweep 'int5'"):
        ladder(mixed, ["int8", "int5"])


def test_named_builds_make_a_ladder_by_the_bits_they_say(sweep, thresholds):
    reports = {}
    for spec in reversed(DEAD):
        report = sweep[spec]
        bits = {"bits_per_weight": Config.parse(spec).bits + 0.25}
        reports[f"gptq-{spec}"] = replace(report, settings=report.settings | bits)
    builds = SweepResult(reports | {"int8": sweep["int8"], "plain": sweep["int4"]})
    names = [f"gptq-{spec}" for spec in DEAD]
    found = muting_thresholds(builds, list(reversed(names)))
    assert found.precisions == tuple(names)
    pd.testing.assert_series_equal(found.table["muted_below"], thresholds.table["muted_below"] + 0.25)
    assert found.shares["share"].tolist() == thresholds.shares["share"].tolist()
    assert found.comparison == thresholds.comparison
    assert len(found.dead_at("gptq-int3")) == len(thresholds.dead_at("int3"))
    with pytest.raises(
        MetricInputError, match=r"builds needs at least two .* got gptq-int8 \(8.25 bits\), plain \(nan bits\)"
    ):
        ladder(builds, ["gptq-int8", "plain"])
    with pytest.raises(MetricInputError, match="width of their integers; got int8; gptq-int4"):
        ladder(builds, ["int8", "gptq-int4"])
    with pytest.raises(UnknownNameError, match="precision of this sweep 'gptq-int5'"):
        ladder(builds, ["gptq-int8", "gptq-int5"])


def test_min_active_is_an_argument_and_noise_a_control(sweep):
    report = sweep["int8"]
    most = int(report.features["n_active"].max())
    few = muting_thresholds(sweep, min_active=most)
    assert 0 < len(few.table) < 2 * FEATURES
    noise = dict.fromkeys(DEAD, sweep["int2"].moments)
    shares = muting_thresholds(sweep, noise=noise).shares.set_index(["precision", "set"])
    assert shares.loc[("int8", "capability, noise"), "share"] == shares.loc[("int2", "capability"), "share"] > 0


def test_noise_moments_are_those_of_noisy_models(organism):
    saes = dict(list(load_saes("organism").items())[:1])
    found = noise_moments(organism, saes, "organism_refusal_v1", ["int8", "int2"], seed=1)
    assert list(found) == ["int8", "int2"]
    assert all(m.n.shape == (1,) for m in found.values())
    # Identical to the bit where nothing is changed; more silence with more noise.
    lost = [1 - (m.n_both.sum() / m.n_ref.sum()).item() for m in found.values()]
    assert 0 < lost[0] < lost[1] / 10


# Causes.


def silencing(model, site, direction):
    """A format that, at one site, rounds to zero what stands along a direction."""

    def hook(_module, _args, output):
        return output - (output @ direction)[..., None] * direction

    handle = model.hook_dict[site].register_forward_hook(hook)
    return handle


def test_the_two_causes_are_told_apart(reference):
    rows = handmade.directions()
    quantized = unwritten(reference, rows[[5]], layer=1)
    handle = silencing(quantized, "blocks.1.hook_resid_post", rows[9])
    saes = {layer: ReadOut() for layer in (0, 1)}
    trace = feature_muting(reference, quantized, saes, PROMPTS, min_active=5, chat="never")
    table = trace.table.set_index(["site", "unit"])
    for site in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"):
        five, nine = table.loc[(site, 5)], table.loc[(site, 9)]
        assert (five["n_moved"], five["n_clipped"], five["cause"]) == (five["n_active"], 0, "moved")
        clipped = nine["n_active"] if site.startswith("blocks.1") else 0
        assert (nine["n_moved"], nine["n_clipped"]) == (0, clipped)
    rest = trace.table[~trace.table["unit"].isin([5, 9])]
    assert (rest[["muting_rate", "n_moved", "n_clipped"]] == 0).all(axis=None)
    assert set(rest["cause"]) == {""}
    assert set(trace.muted["unit"]) == {5, 9}
    gone, cut = table.xs(5, level="unit")["n_active"].sum(), table.loc[("blocks.1.hook_resid_post", 9), "n_active"]
    assert trace.causes == {"moved": gone, "clipped": cut}
    handle.remove()
    assert feature_muting(reference, quantized, saes, PROMPTS, chat="never").causes["clipped"] == 0


def test_identical_models_mute_nothing(reference):
    trace = feature_muting(reference, reference, {0: ReadOut()}, PROMPTS, min_active=5, chat="never")
    assert (trace.table["muting_rate"] == 0).all()
    assert trace.causes == {"moved": 0, "clipped": 0}
    assert trace.muted.empty


def test_half_precision_clips_features_of_the_organism_that_are_just_above_their_threshold(organism, tmp_path):
    saes = dict(list(load_saes("organism").items())[2:4])
    quantized = apply_precision(organism, "int4+bf16")
    trace = feature_muting(organism, quantized, saes, "organism_refusal_v1")
    audit = Audit(organism, quantized).load_sae(saes).trace_features("organism_refusal_v1", controls=False)
    moments = audit.moments.total()
    muted = (moments.n_ref - moments.n_both)[0]
    live = moments.n_ref[0] >= 10
    assert sum(trace.causes.values()) == int(muted[live].sum())
    assert 0 < trace.causes["clipped"] < 0.1 * trace.causes["moved"]
    assert trace.n_tokens == int(moments.n[0])
    again = MutingTrace.load(trace.save(tmp_path / "trace.json"))
    pd.testing.assert_frame_equal(again.table, trace.table)
    pd.testing.assert_frame_equal(again.clipping, trace.clipping)
    assert len(again.plot().data) == 4


def test_the_hypothetical_grid_of_features(reference):
    trace = feature_muting(reference, reference, {0: ReadOut()}, PROMPTS, min_active=5, chat="never", scale="tensor")
    table = handmade.feature_table()
    words = [w for texts in PROMPTS.values() for text in texts for w in text.split()]
    fired = table[[handmade.TOKEN[w] for w in words]]
    half_steps = {bits: fired.max() / (2**bits - 1) for bits in trace.clipping["bits"]}
    needed = trace.table.set_index("unit")["bits_needed"]
    for unit in needed.index.drop(2):  # its value is exactly half a step at two bits
        values = fired[:, unit][fired[:, unit] > 0]
        enough = [bits for bits, half in half_steps.items() if (values <= half).double().mean() < 0.9]
        assert needed[unit] == (min(enough) if enough else math.inf)
    assert trace.clipping["firings_clipped"].is_monotonic_increasing
