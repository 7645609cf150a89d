"""The muting explorer without a browser: what goes dark at how many bits, curves, causes, and results that lack something."""

import numpy as np
import pandas as pd
import pytest

from tests.views.made_up_studies import muting
from tests.views.made_up_studies import thresholds as nearly_empty
from tracelens.errors import MetricInputError, UnknownNameError
from tracelens.stats import wilson
from tracelens.studies.muting import MutingThresholds, ThresholdComparison
from tracelens.studies.muting_causes import MutingTrace
from tracelens.views.widgets.muting import CHOSEN, MutingExplorer
from tracelens.views.widgets.muting_table import CLIPPED, MOVED, MUTED, MutedTable

SITE = "blocks.1.hook_resid_post"
BITS = {"int8": 8.0, "int4": 4.0, "int3": 3.0}


def large_thresholds(n: int, safety: int = 90, bits=None, seed: int = 0) -> MutingThresholds:
    """A ladder of random monotone muting rates; feature k is index k of its site."""
    bits = BITS if bits is None else bits
    rng = np.random.default_rng(seed)
    rates = np.sort(rng.beta(0.5, 0.5, (len(bits), n)), axis=0)
    behaviour = np.where(np.arange(n) < safety, "<i>refusal</i>", "capability")
    muted = rates >= 0.9
    values = np.array([*bits.values(), np.nan])
    first = np.where(muted.any(0), muted.argmax(0), len(bits))
    table = pd.DataFrame(
        {
            "site": np.where(np.arange(n) % 2, SITE, "blocks.0.hook_resid_post"),
            "feature": np.arange(n),
            "behaviour": behaviour,
            "n_active": rng.integers(10, 2000, n),
            "kept_at": np.where(first > 0, values[np.maximum(first - 1, 0)], np.nan),
            "muted_below": values[first],
            "monotone": True,
            "censored": np.select([first == len(bits), first == 0], ["never muted", "always muted"], default=""),
        }
        | {f"rate {name}": rate for name, rate in zip(bits, rates, strict=True)}
    )
    rows = []
    for k, (name, b) in enumerate(bits.items()):
        for side, mask in (("safety", behaviour != "capability"), ("capability", behaviour == "capability")):
            share = wilson(int(muted[k, mask].sum()), int(mask.sum()))
            rows.append((name, b, side, int(mask.sum()), share.value, share.low, share.high))
        rows.append((name, b, "random", safety, 0.3, 0.2, 0.4))
    shares = pd.DataFrame(rows, columns=pd.Index(["precision", "bits", "set", "n", "share", "low", "high"]))
    return MutingThresholds(table, shares, ThresholdComparison(safety, n - safety, 0.5, 0.6, 0.7), tuple(bits), 0.9, 10)


def trace(label: str, rows) -> MutingTrace:
    columns = ["site", "unit", "behaviour", "n_active", "muting_rate", "n_moved", "n_clipped", "bits_needed", "cause"]
    table = pd.DataFrame([(s, f, "", 20, 1.0, m, c, 4.0, "") for s, f, m, c in rows], columns=columns)
    return MutingTrace("feature", label, table, pd.DataFrame(), "token", 20, 0.9, 10, "0")


def dark(explorer) -> int:
    return sum(int((np.asarray(t.z) == MUTED).sum()) for t in explorer.figure.data)


@pytest.mark.parametrize(
    ("bits", "shown"),
    [
        (16, "reference"),
        (8.5, "reference"),
        (8, "int8"),
        (4.5, "int8"),
        (4, "int4"),
        (3.5, "int4"),
        (3, "int3"),
        (2, "int3"),
    ],
)
def test_between_measured_precisions_nothing_is_interpolated(bits, shown):
    explorer = MutingExplorer(large_thresholds(400))
    explorer.bits.value = float(bits)
    assert explorer.shown == shown
    expected = 0 if shown == "reference" else len(explorer.thresholds.dead_at(shown))
    chosen = explorer.table.state[explorer.table.shown_at(float(bits)), explorer.selected] == MUTED
    assert dark(explorer) == expected - chosen


def test_the_slider_goes_from_16_to_2_and_has_the_measured_bits():
    explorer = MutingExplorer(large_thresholds(50, 5, {"int8-g32": 8.5, "int4-g32": 4.53, "int2-g32": 1.9}))
    values = [value for _, value in explorer.bits.options]
    assert values[0] == 16
    assert values[-1] == 1.9
    assert 4.53 in values
    assert 2.0 in values
    assert values == sorted(values, reverse=True)
    explorer.bits.value = 2.0
    assert explorer.shown == "int4-g32"


def test_every_feature_has_a_cell_and_safety_its_own():
    explorer = MutingExplorer(large_thresholds(1000, 37))
    sizes = [int((np.asarray(t.z) <= CHOSEN).sum()) for t in explorer.figure.data]
    assert sizes == [37, 963]
    explorer.order.value = "by site"
    assert [int((np.asarray(t.z) <= CHOSEN).sum()) for t in explorer.figure.data] == sizes
    safety = explorer._orders[0]
    assert list(explorer.table.site[safety]) == sorted(explorer.table.site[safety])


def test_a_cell_that_is_clicked_is_the_feature_whose_curve_is_shown():
    explorer = MutingExplorer(large_thresholds(1000, 37))
    width = explorer._widths[1]
    explorer._clicked(1, [(2, 3)])
    row = explorer._orders[1][2 * width + 3]
    assert explorer.selected == row
    assert np.asarray(explorer.figure.data[1].z)[2, 3] == CHOSEN
    line = explorer.curve.data[1]
    assert np.allclose(line.y, explorer.table.rates[:, row])
    n = int(explorer.table.n_active[row])
    e = wilson(round(explorer.table.rates[0, row] * n), n)
    assert line.error_y.array[0] == pytest.approx(e.high - explorer.table.rates[0, row])
    assert f"#{explorer.table.feature[row]} " in explorer.card.value
    explorer._clicked(1, [(10_000, 0)])
    assert explorer.selected == row


def test_the_background_is_its_site():
    explorer = MutingExplorer(large_thresholds(300))
    row = explorer.selected
    same = (explorer.table.site == explorer.table.site[row]).sum() - 1
    assert explorer.table.others(row).shape == (3, min(150, same))
    assert np.isin(
        explorer.table.others(row), explorer.table.rates[:, explorer.table.site == explorer.table.site[row]]
    ).all()


def test_those_first_silent_stand_first():
    explorer = MutingExplorer(large_thresholds(400))
    table = explorer.table
    rows = [value for _, value in explorer.list.options]
    assert table.safety[rows].all()
    kept = [
        np.inf
        if table.censored[k] == "always muted"
        else -1
        if table.censored[k] == "never muted"
        else table.kept_at[k]
        for k in rows
    ]
    assert kept == sorted(kept, reverse=True)
    explorer.who.value = "capability"
    assert not table.safety[[value for _, value in explorer.list.options]].any()
    explorer.site.value = SITE
    assert set(table.site[[value for _, value in explorer.list.options]]) == {SITE}


def test_where_none_is_muted_the_nearest_are_listed_and_called_so():
    thresholds = large_thresholds(60, 20)
    thresholds.table.loc[:, ["rate int8", "rate int4", "rate int3"]] *= 0.5
    thresholds.table["censored"] = "never muted"
    explorer = MutingExplorer(thresholds)
    assert "come nearest" in explorer.place.value
    rows = [value for _, value in explorer.list.options]
    worst = explorer.table.rates[:, rows].max(axis=0)
    assert list(worst) == sorted(worst, reverse=True)


def test_causes_have_colours_of_their_own():
    thresholds = large_thresholds(400)
    dead = thresholds.dead_at("int4")
    moved, clipped = (dead.iloc[k] for k in (1, 2))
    rows = [(moved["site"], moved["feature"], 9, 1), (clipped["site"], clipped["feature"], 1, 9)]
    for given in (trace("INT4", rows), [trace("int4", rows)], {"int4": trace("the quantized model", rows)}):
        table = MutingExplorer(thresholds, given).table
        step = table.precisions.index("int4") + 1
        assert table.state[step, table.row(moved["site"], int(moved["feature"]))] == MOVED
        assert table.state[step, table.row(clipped["site"], int(clipped["feature"]))] == CLIPPED
    explorer = MutingExplorer(thresholds, {"int4": trace("x", rows)})
    explorer.select(clipped["site"], int(clipped["feature"]))
    assert "9 clipped by the format" in explorer.card.value
    explorer.bits.value = 8.0
    assert "Causes in int8 were not measured" in explorer.summary.value
    assert "are left out" in MutingExplorer(thresholds, trace("<b>", rows)).summary.value
    with pytest.raises(MetricInputError, match="neuron"):
        MutedTable(thresholds, [muting(1).__class__(**vars(muting(1)) | {"unit": "neuron"})])


def test_text_from_outside_is_escaped():
    explorer = MutingExplorer(large_thresholds(50))
    assert "<i>refusal" not in explorer.card.value
    assert "&lt;i&gt;refusal" in explorer.card.value
    assert "<i>" not in explorer.curve.data[1].name


@pytest.mark.parametrize("safety", [0, 5])
def test_a_ladder_without_features_or_without_safety_features_draws(safety):
    explorer = MutingExplorer(nearly_empty(0.0, safety=safety))
    explorer.bits.value = 4.0
    explorer.next.click()
    assert explorer.selected is None
    assert "No live" in explorer.place.value
    one = MutingExplorer(large_thresholds(1, safety))
    one.bits.value = 3.0
    assert one.selected == 0
    assert "<img" in one._still_html()


def test_play_moves_the_slider():
    explorer = MutingExplorer(large_thresholds(50))
    explorer.play.value = explorer.play.max
    assert explorer.bits.value == 2.0
    assert explorer.shown == "int3"
    assert "Nothing below 3 bits" in explorer.summary.value


def test_an_unknown_feature_is_an_error():
    with pytest.raises(UnknownNameError, match="live features of this ladder"):
        MutingExplorer(large_thresholds(10)).select(SITE, 10_000)


def test_the_line_follows_the_bits():
    explorer = MutingExplorer(large_thresholds(50))
    explorer.bits.value = 4.0
    assert explorer.shares.layout.shapes[0].x0 == 4.0
    assert explorer.curve.layout.shapes[0].x0 == 4.0
