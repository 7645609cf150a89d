"""The drift explorer, driven from Python: what is drawn, chosen, listed and said."""

from dataclasses import replace

import numpy as np
import pytest

from tests.views.made_up import made_up_report, report_without_safety_features, unchanged_report
from tests.views.made_up_evidence import S, report_with_evidence
from tests.views.made_up_large import large_report
from tracelens.audit_report import INTERVAL_COLUMNS, AuditReport, severity
from tracelens.errors import UnknownNameError
from tracelens.views.drift_figures import drift_figure
from tracelens.views.style import CAPABILITY, SAFETY
from tracelens.views.widgets.choosing import DRAWN_AT_MOST, Choice, comparison, thinned
from tracelens.views.widgets.drift import PAGE, FeatureDriftExplorer
from tracelens.views.widgets.drift_table import AXES, LiveFeatures


@pytest.fixture(scope="module")
def large() -> AuditReport:
    return large_report(3000)


def points(explorer: FeatureDriftExplorer) -> dict[int, tuple[float, float]]:
    """Row of each drawn feature → its place."""
    found = {}
    for trace, rows in zip(explorer.figure.data, explorer._rows, strict=False):
        for row, x, y in zip(rows.tolist(), trace.x, trace.y, strict=True):
            if np.isfinite(x) and np.isfinite(y):
                found[row] = (float(x), float(y))
    return found


def test_points_stand_where_the_sums_put_them(large):
    explorer = FeatureDriftExplorer(large)
    m, n = large.moments, float(large.moments.n[0])
    drawn = points(explorer)
    assert len(drawn) == 3000
    for row in (0, 77, 2999):
        at = int(explorer.live.feature[row]) + 1500 * (explorer.live.site[row] != next(iter(large.sites)))
        assert drawn[row][0] == pytest.approx(float(m.sum_ref[0, at]) / n, rel=1e-6)
        silent = not float(m.sum_quant[0, at])
        expected = explorer.live.floor("mean_quantized") if silent else float(m.sum_quant[0, at]) / n
        assert drawn[row][1] == pytest.approx(expected, rel=1e-6)


def test_silent_features_are_drawn_at_the_line_of_zero_and_only_there():
    explorer = FeatureDriftExplorer(large_report(500))
    live = explorer.live
    silent = live.values["mean_quantized"] == 0
    assert silent.any()
    assert live.floor("mean_quantized") < live.values["mean_quantized"][~silent].min()
    line = explorer.figure.data[explorer.layers.floors]
    assert line.y[0] == live.floor("mean_quantized")
    explorer.controls.log.value = False
    assert not explorer.figure.data[explorer.layers.floors].y
    assert all(points(explorer)[row][1] == 0 for row in np.flatnonzero(silent))


@pytest.mark.parametrize("x", ["fidelity_noise", "rate_reference", "importance", "share", "drift"])
def test_every_axis_moves_the_points(large, x):
    explorer = FeatureDriftExplorer(large)
    explorer.controls.x.value, explorer.controls.y.value = x, "fidelity"
    values = explorer.live.values
    known = np.flatnonzero(np.isfinite(values[x]))
    drawn = points(explorer)
    assert sorted(drawn) == known.tolist()
    row = int(known[len(known) // 2])
    assert drawn[row] == pytest.approx((values[x][row], values["fidelity"][row]), rel=1e-6)
    assert explorer.figure.layout.xaxis.title.text == AXES[x].title
    assert (explorer.figure.layout.xaxis.type == "log") == AXES[x].log
    if len(known) < 3000:
        assert f"{3000 - len(known):,} of them have no number on an axis" in str(explorer)


def test_views_set_both_axes_and_own_axes_have_no_name(large):
    explorer = FeatureDriftExplorer(large)
    c = explorer.controls
    c.view.value = "fidelity against the same under noise"
    assert (c.x.value, c.y.value) == ("fidelity_noise", "fidelity")
    diagonal = explorer.figure.data[explorer.layers.diagonal]
    assert tuple(diagonal.x) == tuple(diagonal.y)
    c.x.value = "novelty"
    assert c.view.value == "axes of your own"
    assert not explorer.figure.data[explorer.layers.diagonal].x
    c.x.value = "fidelity_noise"
    assert c.view.value == "fidelity against the same under noise"


def test_without_importance_the_share_of_activation_takes_its_place():
    explorer = FeatureDriftExplorer(made_up_report())
    explorer.controls.view.value = "fidelity against importance"
    assert explorer.controls.x.value == "share"
    assert "importance" not in [value for _, value in explorer.controls.x.options]


def test_shares_of_a_site_add_up():
    live = LiveFeatures(large_report(400))
    for site in live.site_sizes:
        assert live.values["share"][live.site == site].sum() == pytest.approx(1)


def test_filters_choose_what_they_say(large):
    explorer = FeatureDriftExplorer(large)
    c, live = explorer.controls, explorer.live
    c.behaviour.value = "safety"
    assert set(points(explorer)) == set(np.flatnonzero(live.behaviour != "capability"))
    c.behaviour.value = "behaviour: warning"
    assert {live.behaviour[row] for row in points(explorer)} == {"warning"}
    c.behaviour.value, c.damage.value = "all", "muted"
    assert (live.values["muting_rate"][list(points(explorer))] >= 0.9).all()
    c.damage.value, c.site.value = "degraded", "blocks.1.hook_resid_post"
    chosen = list(points(explorer))
    assert (live.values["fidelity"][chosen] < 0.8).all()
    assert set(live.site[chosen]) == {"blocks.1.hook_resid_post"}
    c.min_tokens.value = 400
    assert (live.n_active[list(points(explorer))] >= 400).all()
    assert len(explorer._order) == len(points(explorer)) < len(chosen)


def test_a_feature_of_two_behaviours_is_found_under_both():
    report = large_report(100, safety=3)
    found = report.fingerprint.features[0]
    other = next(f.behaviour for f in report.fingerprint.features if f.behaviour != found.behaviour)
    both = replace(found, behaviours={found.behaviour: 0.95, other: 0.92})
    live = LiveFeatures(replace(report, fingerprint=replace(report.fingerprint, features=[both])))
    row = live.row(str(found.site), found.feature)
    assert live.members[found.behaviour][row]
    assert live.members[other][row]


def test_search_by_number_and_by_condition(large):
    live = LiveFeatures(large)
    chosen = Choice(search="#12, 40").mask(live)
    assert set(live.feature[chosen]) == {12, 40}
    chosen = Choice(search="fidelity < .5 n_active>=100").mask(live)
    assert (chosen == ((live.values["fidelity"] < 0.5) & (live.n_active >= 100))).all()
    assert 0 < chosen.sum() < 3000
    with pytest.raises(UnknownNameError, match=r"unknown column 'fidelty'. Did you mean 'fidelity'\?"):
        Choice(search="fidelty < .5").mask(live)
    with pytest.raises(UnknownNameError, match=r"cannot search for 'lock'; give numbers of features \(#123, #7\)"):
        Choice(search="lock").mask(live)


def test_a_search_that_cannot_be_read_is_said_in_place_and_changes_nothing(large):
    explorer = FeatureDriftExplorer(large)
    explorer.controls.search.value = "<b>what</b>"
    assert "cannot search for" in explorer.message
    assert len(points(explorer)) == 3000
    explorer.controls.search.value = "#3"
    assert not explorer.message
    assert {int(explorer.live.feature[row]) for row in points(explorer)} == {3}


def test_the_list_is_worst_first_and_steps_through_all(large):
    explorer = FeatureDriftExplorer(large)
    worst = severity(large.features).sort_values(ascending=False, kind="stable").index[:3]
    for place in worst:
        row = large.features.loc[place]
        assert f"#{row['feature']} " in explorer.list.options[list(worst).index(place)][0]
        assert explorer.card.value.startswith(f'<article class="tl-card" aria-label="feature {row["feature"]} of')
        explorer.next.click()
    explorer.previous.click()
    assert explorer.selected == 2
    assert explorer.list.value == 2
    explorer.select(str(explorer.live.site[2 * PAGE]), int(explorer.live.feature[2 * PAGE]))
    assert explorer.list.index == 0
    explorer.previous.click()
    assert explorer.list.index == PAGE - 1


def test_a_click_rings_the_point_and_shows_its_card(large):
    explorer = FeatureDriftExplorer(large)
    trace = explorer.layers.groups.index(("safety", "survived"))
    explorer._clicked(trace, [4])
    row = explorer._rows[trace][4]
    ring = explorer.figure.layout.shapes[0]
    assert ring.visible
    assert (ring.xanchor, ring.yanchor) == pytest.approx(points(explorer)[int(row)], rel=1e-6)
    assert f"#{explorer.live.feature[row]} " in explorer.card.value
    assert explorer.list.value == row


def test_select_and_its_errors(large):
    explorer = FeatureDriftExplorer(large)
    site = str(explorer.live.site[5])
    explorer.select(site, int(explorer.live.feature[5]))
    assert explorer.selected == 5
    with pytest.raises(UnknownNameError, match=r"feature #99999 of .* is not among its 1500 live features|1,500 live"):
        explorer.select(site, 99999)
    with pytest.raises(UnknownNameError, match="unknown site with live features 'nowhere'"):
        explorer.select("nowhere", 1)


def test_related_features_are_a_step_away():
    explorer = FeatureDriftExplorer(report_with_evidence())
    explorer.select(S, 3)
    labels = [label for label, _ in explorer.jump.options[1:]]
    assert labels[0] == "merges with #6 (0.10 → 0.70)"
    assert "decoder near #5 (+0.62)" in labels
    explorer.jump.value = dict(explorer.jump.options)["decoder near #5 (+0.62)"]
    assert explorer.live.feature[explorer.selected] == 5


def test_a_brush_takes_what_lies_in_it_and_says_so_beside_the_rest(large):
    explorer = FeatureDriftExplorer(large)
    explorer.controls.view.value = "fidelity against the same under noise"
    explorer.brush((0.0, 1.0), (0.0, 0.5))
    inside = explorer.live.values["fidelity"] <= 0.5
    assert len(explorer._order) == inside.sum()
    mean = explorer.live.values["fidelity"][inside].mean()
    assert f"{inside.sum():,} of 3,000 live features brushed: mean fidelity {mean:.3f}" in str(explorer)
    assert f"The other {(~inside).sum():,}: mean fidelity" in str(explorer)
    painted = sum(len(trace.selectedpoints) for trace in explorer.figure.data[: len(explorer.layers.groups)])
    assert painted == inside.sum()
    explorer.clear.click()
    assert len(explorer._order) == 3000
    assert explorer.figure.data[0].selectedpoints is None


def test_a_brush_in_the_figure_is_told_trace_by_trace(large):
    explorer = FeatureDriftExplorer(large)
    for group in range(len(explorer.layers.groups)):
        explorer._picking(group, [0, 1] if group in (0, 2) else [])
    taken = [int(explorer._rows[group][i]) for group in (0, 2) for i in (0, 1)]
    assert explorer._order.tolist() == sorted(taken)


def test_colour_says_the_set_and_shape_the_damage(large):
    explorer = FeatureDriftExplorer(large)
    shapes = {}
    for (name, kind), trace in zip(explorer.layers.groups, explorer.figure.data, strict=False):
        assert trace.marker.color == {"safety": SAFETY, "capability": CAPABILITY}[name]
        shapes.setdefault(kind, set()).add(trace.marker.symbol)
    assert all(len(symbols) == 1 for symbols in shapes.values())
    assert len({next(iter(symbols)) for symbols in shapes.values()}) == len(shapes) >= 4


def test_beyond_the_limit_it_draws_a_sample_and_says_so():
    report = large_report(60_000)
    explorer = FeatureDriftExplorer(report)
    drawn = points(explorer)
    assert len(drawn) == DRAWN_AT_MOST
    assert f"{DRAWN_AT_MOST:,} points are drawn" in str(explorer)
    assert set(np.flatnonzero(explorer.live.safety)) <= set(drawn)
    assert set(range(2000)) <= set(drawn)
    explorer.controls.damage.value = "muted"
    assert set(points(explorer)) == set(np.flatnonzero(explorer.live.muted))
    assert "points are drawn" not in str(explorer)
    explorer.controls.damage.value = "all"
    assert set(points(explorer)) == set(drawn)


def test_a_sample_keeps_all_that_may_be_kept_and_the_order():
    live = LiveFeatures(large_report(5000))
    rows = np.arange(5000)
    drawn = thinned(live, rows, limit=3000)
    assert len(drawn) == 3000
    assert (np.diff(drawn) > 0).all()
    assert (thinned(live, rows, limit=3000) == drawn).all()
    assert len(thinned(live, rows, limit=10)) == 10


def test_the_sentence_when_nothing_is_chosen(large):
    live = LiveFeatures(large)
    assert comparison(live, np.zeros(3000, bool), "chosen") == "None of the 3,000 live features is chosen."


@pytest.mark.parametrize(
    "report",
    [
        made_up_report(features=[]),
        made_up_report(features=[(3, "refusal", 0.6, 0.3)]),
        made_up_report(controls=False),
        report_without_safety_features(),
        unchanged_report(),
    ],
    ids=["empty", "one", "no controls", "no safety", "unchanged"],
)
def test_small_results_are_drawn_with_a_sentence(report):
    explorer = FeatureDriftExplorer(report)
    for view in explorer.controls.view.options:
        explorer.controls.view.value = view
        explorer.still().to_json()
    explorer.controls.damage.value = "blurred"
    explorer.next.click()
    explorer.previous.click()
    assert f"{len(report.features)} live features" in str(explorer)


def test_numbers_that_are_none():
    report = large_report(300)
    table = report.features.assign(correlation=np.nan, fidelity_noise=np.nan, survival="")
    explorer = FeatureDriftExplorer(replace(report, features=table))
    assert "nan" not in str(explorer)
    assert "fidelity_noise" not in [value for _, value in explorer.controls.x.options]
    explorer.controls.y.value = "muting_rate"
    assert len(points(explorer)) == 300


def test_as_loaded_from_disk(tmp_path):
    report = made_up_report()
    report.save(tmp_path / "r")
    loaded = FeatureDriftExplorer(AuditReport.load(tmp_path / "r"))
    assert points(loaded) == points(FeatureDriftExplorer(report))


def test_hovering_tells_the_interval_on_axes_that_have_one():
    report = made_up_report()
    figure = drift_figure(report, "fidelity_noise", "fidelity")
    drawn = [trace for trace in figure.data if trace.customdata is not None]
    said = [line for trace in drawn for line in trace.customdata]
    assert len(said) == 5
    assert "draws of noise: 0.880 to 0.920<br>fidelity, 95 %: 0.550 to 0.650" in said
    assert all("%{customdata}" in trace.hovertemplate for trace in drawn)
    assert not [trace for trace in drift_figure(report).data if "customdata" in str(trace.hovertemplate)]
    old = replace(report, features=report.features.drop(columns=INTERVAL_COLUMNS))
    assert not [trace for trace in drift_figure(old, "fidelity_noise", "fidelity").data if trace.customdata is not None]


def test_intervals_follow_the_axes_and_the_points():
    explorer = FeatureDriftExplorer(large_report(3000))
    explorer.controls.y.value = "drift"
    explorer.controls.damage.value = "damaged"
    trace = max(explorer.figure.data[: len(explorer.layers.groups)], key=lambda t: len(t.x))
    rows = explorer._rows[list(explorer.figure.data).index(trace)]
    assert len(trace.customdata) == len(trace.x)
    low, high = explorer.live.interval(int(rows[3]), "drift")
    assert trace.customdata[3] == f"drift, 95 %: {low:.3f} to {high:.3f}"


def test_the_still_picture_is_what_is_seen(large):
    explorer = FeatureDriftExplorer(large)
    explorer.controls.view.value = "fidelity against firing rate"
    explorer.controls.behaviour.value = "safety"
    still = explorer.still()
    drawn = sum(
        int(np.isfinite(np.asarray(trace.x, float)).sum()) for trace in still.data[: len(explorer.layers.groups)]
    )
    assert drawn == len(points(explorer))
    assert still.layout.xaxis.title.text == AXES["rate_reference"].title


def test_names_from_outside_are_text_in_the_figure():
    report = made_up_report(features=[(3, "<b>x</b> $y$ %{z}", 0.6, 0.3)])
    explorer = FeatureDriftExplorer(report)
    label = explorer.figure.data[0].text[0]
    assert "<b>x" not in label.replace("<b>#3</b>", "")
    assert "$" not in label
    assert "%{" not in label


def test_the_figure_alone(large):
    figure = drift_figure(large, "fidelity_noise", "fidelity")
    assert figure.layout.yaxis.title.text == AXES["fidelity"].title
    assert "3,000 live features" in figure.layout.title.subtitle.text
