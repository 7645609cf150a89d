"""Marks that figures are made of: points with intervals, lines through them, and the bands of controls."""

from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.stats import Estimate
from tracelens.views.numbers import interval
from tracelens.views.style import CONTROL, translucent

if TYPE_CHECKING:
    import plotly.graph_objects as go


def row_bands(bands: list[tuple[float, float, Estimate]], control: str, title: str) -> list["go.Scatter"]:
    """A box in the control's lane of each row (top, bottom) from the low to the high end of its interval, and a line at its value."""
    import plotly.graph_objects as go

    if not bands:
        return []
    x, y, line_x, line_y = [], [], [], []
    for top, bottom, e in bands:
        if not isnan(e.low):
            x += [e.low, e.high, e.high, e.low, e.low, None]
            y += [top, top, bottom, bottom, top, None]
        line_x += [e.value, e.value, None]
        line_y += [top, bottom, None]
    colour = CONTROL[control]
    hover = {"hoverinfo": "skip", "legendgroup": control, "name": title, "mode": "lines"}
    text = [f"{title}: {interval(e)}" for *_, e in bands for _ in range(3)]
    return [
        go.Scatter(
            x=x, y=y, fill="toself", fillcolor=translucent(colour, 0.25), line_width=0, showlegend=False, **hover
        ),
        go.Scatter(
            x=line_x,
            y=line_y,
            line={"color": colour, "width": 3},
            **hover | {"hoverinfo": "text"},
            text=text,
        ),
    ]


def column_bands(points: list[tuple[int | float, Estimate]], control: str, title: str) -> list["go.Scatter"]:
    """A band between the ends of the control's intervals over the precisions, and a line through its values."""
    import plotly.graph_objects as go

    points = [(x, e) for x, e in points if not isnan(e.value)]
    if not points:
        return []
    x = [x for x, _ in points]
    banded = [(x, e) for x, e in points if not isnan(e.low)]
    colour = CONTROL[control]
    dash = {"noise": "dash", "permuted": "dashdot", "bf16": "solid", "random": "dot", "labels": "longdash"}[control]
    return [
        go.Scatter(
            x=[x for x, _ in [*banded, *reversed(banded)]],
            y=[e.high for _, e in banded] + [e.low for _, e in reversed(banded)],
            fill="toself",
            fillcolor=translucent(colour, 0.16),
            line_width=0,
            mode="lines",
            hoverinfo="skip",
            legendgroup=control,
            showlegend=False,
        ),
        go.Scatter(
            x=x,
            y=[e.value for _, e in points],
            mode="lines",
            line={"color": colour, "width": 2, "dash": dash},
            name=title,
            legendgroup=control,
            text=[interval(e) for _, e in points],
            hovertemplate=f"{title}: %{{text}}<extra></extra>",
        ),
    ]


def line(points: list[Any], name: str, colour: str, symbol: str) -> "go.Scatter":
    """Points with their intervals, joined by a line."""
    import plotly.graph_objects as go

    points = [(x, e) for x, e in points if not isnan(e.value)]
    return go.Scatter(
        x=[x for x, _ in points],
        y=[e.value for _, e in points],
        error_y=errors([e for _, e in points], colour),
        cliponaxis=False,
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        marker={"size": 10, "symbol": symbol, "color": colour},
        name=name,
        text=[interval(e) for _, e in points],
        hovertemplate=f"{name}: %{{text}}<extra></extra>",
    )


def errors(estimates: list[Estimate], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [e.high - e.value for e in estimates],
        "arrayminus": [e.value - e.low for e in estimates],
        "color": colour,
        "thickness": 2,
        "width": 5,
    }


def in_percent(rate: Estimate) -> Estimate:
    return Estimate(100 * rate.value, 100 * rate.low, 100 * rate.high)
