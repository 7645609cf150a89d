"""The reference against itself: every explorer and the page say that nothing changed, and none calls a feature the worst."""

from dataclasses import replace

import pytest

from tests.views.made_up import unchanged_report
from tests.views.made_up_evidence import S
from tracelens.sweep_result import SweepResult
from tracelens.views.report import audit_page
from tracelens.views.widgets.choosing import comparison
from tracelens.views.widgets.drift import FeatureDriftExplorer
from tracelens.views.widgets.drift_table import LiveFeatures
from tracelens.views.widgets.smearing import SmearingExplorer
from tracelens.views.widgets.sweep import SweepExplorer


@pytest.fixture(scope="module")
def same():
    return unchanged_report()


def test_the_drift_explorer(same):
    explorer = FeatureDriftExplorer(same)
    assert f"Nothing changed: each of the {len(same.features)} live features is the same in both models." in str(
        explorer
    )
    explorer.select(S, int(same.features["feature"].iloc[0]))
    assert "unchanged" in explorer.card.value
    assert "Rank" not in explorer.card.value
    explorer.controls.search.value = str(same.features["feature"].iloc[0])
    assert "Nothing changed" in explorer.summary.value


def test_one_feature_that_moved_is_a_change(same):
    features = same.features.copy()
    features.loc[0, "fidelity"] = 0.999
    live = LiveFeatures(replace(same, features=features))
    assert "Nothing changed" not in comparison(live, live.safety | ~live.safety, "chosen")
    page = audit_page(replace(same, features=features))
    assert f"Worst {len(features)} of {len(features)} features" in page


def test_the_smearing_explorer(same):
    assert str(SmearingExplorer(same)).startswith("0 pairs")


def test_the_sweep_explorer(same):
    card = SweepExplorer(SweepResult({"int8": same})).card.value
    assert "Nothing changed" in card
    assert "Worst" not in card


def test_the_page(same):
    page = audit_page(same)
    assert "so there are no worst ones" in page
    assert "Worst 1" not in page
    assert "Worst 2" not in page
