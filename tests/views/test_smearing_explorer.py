"""The smearing explorer without a browser: thresholds, filters, groups, the card, and results that lack something."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.views.made_up import SITE, made_up_report
from tests.views.made_up_evidence import S, made_up_evidence, report_with_evidence
from tracelens.audit_report import PAIR_COLUMNS, Control
from tracelens.errors import UnknownNameError
from tracelens.metrics.smearing import SmearedPair
from tracelens.metrics.smearing_groups import smeared_groups
from tracelens.views.smearing_figures import threshold_edge
from tracelens.views.widgets.smearing import SmearingExplorer
from tracelens.views.widgets.smearing_pairs import StoredPairs, drawn


def with_pairs(n: int, features: int = 300, seed: int = 0, **evidence):
    """A report whose evidence has `n` random pairs of two sites, a tenth of the features safety features."""
    rng = np.random.default_rng(seed)
    i = rng.integers(0, features - 1, n)
    j = rng.integers(i + 1, features)
    ref, rise = rng.uniform(0, 0.4, n), rng.uniform(0.1, 0.6, n)
    kind = [np.where(side % 10 == 0, "refusal", "capability") for side in (i, j)]
    site = np.where(rng.random(n) < 0.5, S, "blocks.2.hook_resid_post")
    columns = (site, i, j, *kind, ref, ref + rise, rise, rng.integers(10, 500, n))
    pairs = pd.DataFrame(dict(zip(PAIR_COLUMNS, columns, strict=True)))
    pairs = pairs[pairs["cos_quant"] >= 0.3].drop_duplicates(["site", "feature_i", "feature_j"]).reset_index(drop=True)
    return replace(made_up_report(), evidence=replace(made_up_evidence(), pairs=pairs, **evidence))


def test_it_starts_at_the_audits_thresholds_and_goes_down_to_the_floors():
    explorer = SmearingExplorer(report_with_evidence())
    assert (explorer.tau.value, explorer.delta.value) == (0.5, 0.2)
    assert (explorer.tau.min, explorer.delta.min) == (0.3, 0.1)
    assert [int(explorer.pairs.feature_j[k]) for k in explorer.rows] == [6]
    explorer.tau.value = 0.4
    assert len(explorer.rows) == 2
    explorer.delta.value = 0.1
    assert len(explorer.rows) == 3
    explorer.reset.click()
    assert len(explorer.rows) == 1


@pytest.mark.parametrize(("tau", "delta"), [(0.3, 0.1), (0.5, 0.2), (0.62, 0.33), (1.0, 1.0)])
def test_the_thresholds_say_what_a_direct_count_says(tau, delta):
    report = with_pairs(600)
    explorer = SmearingExplorer(report)
    explorer.tau.value, explorer.delta.value = tau, delta
    table = report.evidence.pairs
    direct = table[(table["cos_quant"] >= tau) & (table["increase"] >= delta)]
    assert len(explorer.rows) == len(direct)
    expected = []
    for _, part in direct.groupby("site"):
        rows = zip(part["feature_i"], part["feature_j"], part["cos_ref"], part["cos_quant"], strict=True)
        expected += [
            group.members
            for group in smeared_groups(SmearedPair(int(i), int(j), float(r), float(q)) for i, j, r, q in rows)
        ]
    assert sorted(tuple(map(int, members)) for _, members, _ in explorer.groups) == sorted(expected)
    assert sum(len(rows) for *_, rows in explorer.groups) == len(direct)


def test_filters_by_what_is_joined():
    explorer = SmearingExplorer(with_pairs(600))
    explorer.tau.value, explorer.delta.value = 0.3, 0.1
    counts = {}
    for which in (
        "all",
        "safety with safety",
        "safety with capability",
        "capability",
        "any safety",
        "behaviour: refusal",
    ):
        explorer.which.value = which
        counts[which] = len(explorer.rows)
    assert counts["all"] == counts["safety with safety"] + counts["safety with capability"] + counts["capability"]
    assert counts["any safety"] == counts["behaviour: refusal"] == counts["all"] - counts["capability"]
    assert min(counts.values()) > 0
    explorer.which.value, explorer.site.value = "all", S
    assert set(explorer.pairs.site[explorer.rows]) == {S}
    with pytest.raises(UnknownNameError, match="kind of pairs"):
        explorer.pairs.among(which="?")


def test_the_card_has_cosines_tokens_and_escapes_them():
    explorer = SmearingExplorer(report_with_evidence())
    explorer.select(S, 6, 3)
    card = explorer.card.value
    assert "0.100 → 0.700" in card
    assert "#3: 1.50 → 1.50" in card
    assert "#6: 0.00 → 1.20" in card
    assert "<script" not in card
    assert "&lt;b&gt;no&lt;/b&gt;" in card
    with pytest.raises(UnknownNameError, match="cosine of at least 0"):
        explorer.select(S, 3, 5)


def test_the_control_is_beside_the_counts():
    noise = Control("noise", {}, None, smeared=17)
    report = replace(report_with_evidence(), controls={"noise": noise})
    explorer = SmearingExplorer(report)
    assert "under matched noise 17 pairs" in explorer.summary.value
    assert "under matched noise 17 pairs" in explorer.card.value
    explorer.tau.value = 0.4
    assert "not at these lower ones" in explorer.summary.value
    assert "No control" in SmearingExplorer(replace(report, controls={})).summary.value


def test_a_click_on_a_point_a_mark_or_a_cell_shows_the_pair():
    explorer = SmearingExplorer(with_pairs(300))
    trace = explorer.figure.data[0]
    explorer._clicked(trace.customdata, [2])
    assert explorer.selected == trace.customdata[2]
    mark = explorer.groups_figure.data[2]
    explorer._clicked(mark.customdata, [1])
    assert explorer.selected == mark.customdata[1]
    explorer.how.value = "matrix"
    cells = np.asarray(explorer.groups_figure.data[3].customdata)
    assert (cells == cells.T).all()
    row, column = np.argwhere(cells >= 0)[-1]
    explorer._clicked(cells, [(row, column)])
    assert explorer.selected == cells[row, column]
    before = explorer.selected
    explorer._clicked(cells, [(0, 0)])
    assert explorer.selected == before


def test_the_matrix_has_the_quantized_model_above_the_diagonal():
    explorer = SmearingExplorer(report_with_evidence())
    explorer.how.value = "matrix"
    z = np.asarray(explorer.groups_figure.data[3].z, dtype=float)
    assert z[0, 1] == pytest.approx(0.7)
    assert z[1, 0] == pytest.approx(0.1)
    assert np.isnan(z[0, 0])


def test_a_large_group_is_cut_and_says_so():
    explorer = SmearingExplorer(with_pairs(3000))
    explorer.tau.value, explorer.delta.value = 0.3, 0.1
    assert len(explorer.groups_figure.data[1].x) == 40
    assert "drawn 40" in explorer.groups_figure.layout.title.text
    explorer.how.value = "matrix"
    assert np.asarray(explorer.groups_figure.data[3].z).shape == (150, 150)


def test_too_many_points_are_thinned_and_said():
    pairs = StoredPairs(with_pairs(30_000, features=4000))
    assert len(pairs) > 20_000
    rows = drawn(pairs)
    assert len(rows) == 20_000
    assert np.isin(np.flatnonzero(pairs.safety), rows).all()
    assert np.array_equal(rows, drawn(pairs))
    assert "points are drawn" in SmearingExplorer(with_pairs(30_000, features=4000)).summary.value


def test_pairs_that_were_left_out_are_told_below_the_audits_thresholds_only():
    explorer = SmearingExplorer(with_pairs(100, pairs_left_out=1234))
    assert "1,234" not in explorer.summary.value
    explorer.delta.value = 0.15
    assert "1,234 pairs" in explorer.summary.value


def test_without_evidence_thresholds_only_rise():
    report = made_up_report()
    explorer = SmearingExplorer(report)
    assert explorer.tau.min == 0.5
    assert "can only be raised" in explorer.summary.value
    assert len(explorer.rows) == len(report.smeared_pairs)


def test_nothing_smeared_is_no_error():
    empty = pd.DataFrame([], columns=pd.Index(PAIR_COLUMNS))
    for report in (replace(made_up_report(), smeared_pairs=empty), with_pairs(0)):
        explorer = SmearingExplorer(report)
        explorer.how.value = "matrix"
        explorer.next.click()
        assert explorer.selected is None
        assert "no pair" in explorer.groups_figure.layout.title.text
        assert explorer.still().layout.title.text


def test_the_edge_is_where_the_two_thresholds_meet():
    x, y = threshold_edge(0.5, 0.2, (0.0, 1.0), (0.0, 1.0))
    assert x == pytest.approx([0, 0.3, 0.8])
    assert y == pytest.approx([0.5, 0.5, 1.0])


def test_the_veil_wears_the_theme_and_the_picture_can_be_drawn():
    explorer = SmearingExplorer(report_with_evidence())
    light = explorer.figure.layout.shapes[0].fillcolor
    explorer._wear(True)
    assert explorer.figure.layout.shapes[0].fillcolor != light
    assert "<img" in explorer._still_html()


def test_the_list_and_its_buttons_go_through_the_pairs():
    explorer = SmearingExplorer(with_pairs(300))
    first = explorer.selected
    explorer.next.click()
    assert explorer.selected == explorer.rows[1] == explorer.list.value
    explorer.previous.click()
    assert explorer.selected == first
    explorer.list.value = int(explorer.rows[5])
    assert explorer.selected == explorer.rows[5]
    assert str(SITE) in explorer.card.value or "blocks.2" in explorer.card.value


def test_the_ring_around_the_chosen_pair_hides_no_pair():
    explorer = SmearingExplorer(with_pairs(600))
    *kinds, ring = explorer.figure.data
    assert sum(len(trace.x) for trace in kinds) == len(drawn(explorer.pairs))
    assert (len(ring.x), ring.customdata) == (1, None)
