"""Live figures without a browser: what is sent of them, and how they become other figures."""

import json
import math

import numpy as np
import plotly.graph_objects as go
import pytest
from ipywidgets.widgets.widget import _remove_buffers

from tracelens.views.widgets.live_figure import finite, live_figure
from tracelens.views.widgets.redraw import padded, redraw

NAN, INF = math.nan, math.inf


def sent(live) -> list[dict]:
    """Fills with what goes to the page from now on."""
    messages = []
    live.observe(lambda change: change["new"] and messages.append(change["new"]), "_py2js_update")
    for name in ("_py2js_restyle", "_py2js_relayout", "_py2js_removeTraceProps", "_py2js_removeLayoutProps"):
        live.observe(lambda change: change["new"] and messages.append(change["new"]), name)
    return messages


def figure(n: int) -> go.Figure:
    """Traces and a layout that differ with n in other properties each."""
    marker = {"size": n} if n % 2 else {"color": "red", "line": {"width": n}}
    traces = [go.Scatter(x=[1, 2], y=[n, 2], marker=marker), go.Heatmap(z=[[n, 1]])]
    return go.Figure(traces, {"title": {"text": f"<{n}>"}} if n % 2 else {"xaxis": {"range": [0, n]}})


def test_a_figure_becomes_another_in_one_message():
    live = live_figure(padded(figure(1), 4))
    messages = sent(live)
    for n in (2, 3, 4):
        redraw(live, figure(n))
        assert len(messages) == n - 1
        for trace, wanted in zip(live.data, figure(n).data, strict=False):
            ours = {k: v for k, v in trace.to_plotly_json().items() if k not in ("uid", "visible")}
            assert ours == wanted.to_plotly_json()
        assert [trace.visible for trace in live.data] == [True, True, False, False]
        assert live.layout.title.text == figure(n).layout.title.text
        assert live.layout.xaxis.range == figure(n).layout.xaxis.range
    redraw(live, figure(4))
    assert len(messages) == 3, "nothing is sent where nothing changed"


def test_another_kind_of_trace_is_refused():
    with pytest.raises(ValueError, match="cannot be drawn over"):
        redraw(live_figure(figure(1)), go.Figure(go.Bar(y=[1])))


def test_gaps_are_null_in_what_is_sent():
    bars = {"array": [NAN, 1.0], "arrayminus": (INF, 2.0)}
    live = live_figure(go.Figure([go.Scatter(y=[1.0, NAN], error_y=bars), go.Heatmap(z=np.array([[NAN, 2.0]]))]))
    assert math.isnan(live.data[0].y[1]), "in Python they stay what they are"
    said = json.dumps(_remove_buffers(live.get_state())[0], allow_nan=False)
    assert json.loads(said)["_widget_data"][1]["z"] == [[None, 2.0]]
    with live.batch_update():
        live.data[0].update({"y": [NAN, 3.0], "error_y": {"array": [-INF, 0.5]}}, overwrite=True)
        live._py2js_update = {"style_data": {"y": [[NAN]]}}
        json.dumps(_remove_buffers(live.get_state("_py2js_update"))[0], allow_nan=False)


def test_finite_leaves_the_rest_alone():
    buffer = memoryview(np.array([NAN]))
    made = finite({"a": [1, NAN, "nan", True, None, {"b": (np.float64(INF), 2.5)}], "c": buffer})
    assert made == {"a": [1, None, "nan", True, None, {"b": [None, 2.5]}], "c": buffer}
    assert made["c"] is buffer
