from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.views.made_up import (
    made_up_report,
    made_up_sweep,
    report_without_intervals,
    report_without_safety_features,
    unchanged_report,
)
from tracelens.views.figures import GL_FROM, audit_figure, sweep_figure
from tracelens.views.style import CAPABILITY, SAFETY


def named(figure, name: str):
    (trace,) = [trace for trace in figure.data if trace.name == name and trace.showlegend is not False]
    return trace


def test_every_live_feature_is_a_point_and_safety_is_drawn_last():
    figure = audit_figure(made_up_report())
    capability, safety = named(figure, "capability features"), named(figure, "safety features")
    assert list(safety.y) == [0.6, 0.9, 0.95]
    assert list(capability.y) == [0.05, 0.99]
    assert (capability.marker.color, safety.marker.color) == (CAPABILITY, SAFETY)
    order = list(figure.data)
    assert order.index(safety) > order.index(capability)
    assert safety.marker.size > capability.marker.size
    assert "#3" in safety.text[0]
    assert "blocks.1.hook_resid_post" in safety.text[0]


def test_intervals_and_controls_are_drawn():
    figure = audit_figure(made_up_report())
    points = [t for t in figure.data if t.error_x.array is not None]
    assert [t.x[0] for t in points] == [0.816, 0.775, 0.9, 0.52]
    assert all(t.error_x.array[0] == pytest.approx(0.01) for t in points)
    controls = ("matched noise", "permuted error", "bf16 floor", "random features", "permuted labels")
    assert len({named(figure, name).line.color for name in controls}) == 5
    assert named(figure, "random features").x[0] == 0.55
    # Each has a lane of its own in a set's row, from the first at the top to the last.
    lanes = [named(figure, name).y[0] for name in controls]
    assert lanes == sorted(lanes)
    assert len(set(lanes)) == 5


def test_every_axis_has_a_title():
    for figure in (audit_figure(made_up_report()), sweep_figure(made_up_sweep())):
        titles = [axis.title.text for axis in figure.select_yaxes()] + [
            axis.title.text for axis in figure.select_xaxes()
        ]
        assert sum(bool(title) for title in titles) >= 3


def test_the_sweep_goes_from_many_bits_to_few():
    figure = sweep_figure(made_up_sweep())
    assert [label.split("<br>")[0] for label in figure.layout.xaxis.ticktext] == ["<b>INT4</b>", "<b>INT2-g32</b>"]
    assert list(named(figure, "safety features").y) == [0.816, 0.4]
    assert list(named(figure, "capability features").y) == [0.52, 0.4]
    assert named(figure, "safety features").line.color == SAFETY
    assert list(named(figure, "refuse→comply").y) == [100, 100]
    assert named(figure, "refuse→comply").error_y.arrayminus[0] > 10


@pytest.mark.parametrize(
    "report",
    [
        unchanged_report(),
        report_without_safety_features(),
        made_up_report(controls=False, readable=False),
        made_up_report(features=[], pairs=[]),
        made_up_report(features=[(3, "refusal", 0.6, 0.3)], pairs=[]),
        report_without_intervals(),
    ],
    ids=["unchanged", "no safety features", "no controls", "no features", "one feature", "no intervals"],
)
def test_reports_with_parts_missing_are_drawn(report):
    figure = audit_figure(report)
    assert figure.to_json()
    ticks = " ".join(figure.layout.yaxis.ticktext)
    assert "nan" not in ticks
    if report.cpfr["safety"].value != report.cpfr["safety"].value:
        assert "safety features (0)<br><b>—</b>" in ticks
    assert sweep_figure(replace(made_up_sweep(), reports={"int4": report})).to_json()


def test_labels_are_escaped():
    report = replace(made_up_report(features=[(3, "<b>refusal</b>", 0.6, 0.3)]), label="<script>INT4")
    assert "<script>INT4" not in str(audit_figure(report).to_dict())
    assert "<b>refusal</b>" not in str(audit_figure(report).to_dict())


def test_many_features_are_drawn_by_webgl():
    report = made_up_report()
    many = pd.concat([report.features] * (GL_FROM // len(report.features) + 1), ignore_index=True)
    many["fidelity"] = np.linspace(0, 1, len(many))
    points = [trace for trace in audit_figure(replace(report, features=many)).data if trace.name == "safety features"]
    assert points[0].type == "scattergl"
