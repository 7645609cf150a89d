"""Live figures in JupyterLab: what Python changed before they are drawn is drawn."""

import pytest

START = """
import plotly.graph_objects as go
from tracelens.views.widgets.live_figure import live_figure
def made():
    points = go.Scatter(x=[1, 2], y=[1, 2], mode="markers", marker={"size": 9}, error_y={"array": [1, 1]})
    return live_figure(go.Figure([points, go.Heatmap(z=[[1, 2], [3, 4]]), go.Scatter(visible=False)]))
def change(live, n):
    # Each trace changes properties that the others leave as they are.
    with live.batch_update():
        live.data[0].update({"marker": {"size": 20 + n, "line": {"width": 3}}, "error_y": None}, overwrite=True)
        live.data[1].update({"z": [[4, 2], [3, n]]}, overwrite=True)
        live.data[2].update({"visible": True, "y": [1, float("nan"), n], "line": {"color": "red"}}, overwrite=True)
live = made()
"""
AFTER = "change(live, 1); change(live, 2)"
SEEN = "tracelens.plot('.tracelens-figure').data.map(t => [t.marker?.size, t.z?.[1][1], t.y, t.visible, t.line?.color])"


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_batch_of_changes_of_different_properties_is_drawn(lab, before):
    with lab.show(f"{START}\n{AFTER if before else ''}\nlive") as shown:
        if not before:
            shown.does(AFTER)
        shown.wait(f"{SEEN}[0][0] === 22")
        points, cells, line = shown.value(SEEN)
        assert points[2] == [1, 2], "what no batch changed stays"
        assert cells[1] == 2
        assert line[2:] == [[1, None, 2], True, "red"]
        shown.wait("tracelens.plot('.tracelens-figure').querySelectorAll('.scatterlayer .trace').length === 2")
        shown.no_widget_failed()
