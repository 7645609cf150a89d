"""Numbers of the explorers against the sums and tables that they come from, where the two models or two rules give different ones."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.views.made_up_evidence import S, made_up_evidence, report_with_evidence
from tracelens.audit_report import PAIR_COLUMNS
from tracelens.stats import wilson
from tracelens.views.widgets.card_numbers import card_numbers, statistics_table
from tracelens.views.widgets.drift_table import LiveFeatures, starts_of
from tracelens.views.widgets.smearing_pairs import StoredPairs


def with_pairs(*rows):
    """A report that stored these pairs: i, j, behaviours, cosines before and after."""
    table = pd.DataFrame(
        [(S, i, j, b, c, r, q, q - r, 40) for i, j, b, c, r, q in rows], columns=pd.Index(PAIR_COLUMNS)
    )
    return replace(report_with_evidence(), evidence=replace(made_up_evidence(), pairs=table))


def test_rates_and_means_are_of_their_own_model():
    report = report_with_evidence()
    live, m = LiveFeatures(report), report.moments.total()
    columns = [starts_of(report)[site] + k for site, k in zip(live.site, live.feature.tolist(), strict=True)]
    for name, count, total in (("reference", "n_ref", "sum_ref"), ("quantized", "n_quant", "sum_quant")):
        fires, activation = (getattr(m, of)[0][columns].numpy() for of in (count, total))
        np.testing.assert_allclose(live.values[f"rate_{name}"], fires / float(m.n[0]))
        np.testing.assert_allclose(live.values[f"mean_{name}"], activation / float(m.n[0]))
    assert (live.values["rate_reference"] != live.values["rate_quantized"]).any()


def test_a_pair_right_at_the_thresholds_is_smeared():
    pairs = StoredPairs(with_pairs((1, 2, "capability", "capability", 0.3, 0.5)))
    assert pairs.increase[0] == pytest.approx(0.2)
    assert pairs.smeared(0.5, 0.2).all()
    assert not pairs.smeared(0.51, 0.2).any()
    assert not pairs.smeared(0.5, 0.21).any()


def test_groups_with_safety_features_come_before_larger_ones():
    chain = [(k, k + 1, "capability", "capability", 0.0, 0.9) for k in range(10, 15)]
    pairs = StoredPairs(with_pairs(*chain, (1, 2, "refusal", "capability", 0.0, 0.6)))
    groups = pairs.groups(np.arange(len(pairs)))
    assert [sorted(members.tolist()) for _, members, _ in groups] == [[1, 2], list(range(10, 16))]


def test_pairs_that_could_be_are_counted_by_kind():
    report = report_with_evidence()
    live = report.features
    expected = {"safety with safety": 0, "safety with capability": 0, "capability": 0}
    for _, part in live.groupby("site"):
        safe = (part["behaviour"] != "capability").tolist()
        for a in range(len(safe)):
            for b in range(a):
                kind = ("capability", "safety with capability", "safety with safety")[safe[a] + safe[b]]
                expected[kind] += 1
    assert StoredPairs(report).possible == expected


def test_a_feature_right_at_nine_tenths_is_muted():
    report = report_with_evidence()
    table = report.features.assign(muting_rate=[0.9, 0.8999, *[0.0] * (len(report.features) - 2)])
    assert LiveFeatures(replace(report, features=table)).muted.tolist()[:2] == [True, False]


def test_the_interval_of_novelty_is_over_what_the_quantized_model_fires():
    report = report_with_evidence()
    live = LiveFeatures(report)
    numbers = card_numbers(report, live, S, 3)
    numbers = replace(numbers, values=numbers.values | {"novelty": 0.5}, n_active=1000, n_quant=10)
    row = statistics_table(report, live, numbers, S).split("novelty")[1]
    found = wilson(5, 10)
    assert f"[{found.low:.3f}, {found.high:.3f}]" in row
