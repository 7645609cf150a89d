"""Figures of smearing: who merges, in which groups, and what leaks between the classes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.views.escaping import in_figure
from tracelens.views.style import CAPABILITY, CONTROL, QUANTIZED, SAFETY, dressed, template, translucent

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.studies.smearing import SmearingTrace
    from tracelens.views.widgets.smearing_pairs import StoredPairs

JOINED = {"safety": SAFETY, "safety and capability": "#CC79A7", "capability": CAPABILITY}
KIND = {"safety with safety": SAFETY, "safety with capability": "#CC79A7", "capability": CAPABILITY}
SYMBOL = {"safety with safety": "diamond", "safety with capability": "square", "capability": "circle"}
LARGEST = 15
"""Groups that are drawn."""
HEIGHT = 660


def smearing_figure(trace: "SmearingTrace") -> "go.Figure":
    """Above, the share of features in a smeared pair and the leakage between classes, beside matched noise; below, the
    largest groups by what they join."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=2, specs=[[{}, {}], [{"colspan": 2}, None]], vertical_spacing=0.26, horizontal_spacing=0.12
    )
    shares: Any = trace.shares
    leakage: Any = trace.leakage
    pairs = leakage["class_reference"].str.cat(leakage["class_quantized"], sep=" →<br>")
    panels = [
        (1, shares.assign(what=shares["class"], y=shares["share"])),
        (2, leakage.assign(what=pairs, y=leakage["ratio"])),
    ]
    for column, table in panels:
        places = list(dict.fromkeys(table["what"]))
        table["x"] = [places.index(what) for what in table["what"]]
        figure.update_xaxes(
            tickvals=list(range(len(places))), ticktext=places, range=[-0.5, len(places) - 0.5], row=1, col=column
        )
        for model, shift in (("quantized", -0.08), ("noise", 0.08)):
            rows = table[table["model"] == model].assign(x=lambda rows, shift=shift: rows["x"] + shift)
            if len(rows):
                figure.add_trace(_points(rows, model, trace.label, showlegend=column == 1), row=1, col=column)
    figure.add_hline(y=1, line={"color": CONTROL["noise"], "width": 1, "dash": "dot"}, row=1, col=2)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(title_text="features in a smeared pair", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="leakage (1 = the reference's)", row=1, col=2)
    figure.update_xaxes(title_text="features", row=1, col=1)
    figure.update_xaxes(title_text="in the reference → in the quantized model", row=1, col=2)
    _draw_groups(figure, trace)
    subtitle = (
        f"A pair is smeared if its cosine over tokens rises by {trace.delta:g} to {trace.tau:g} or more; {len(trace.pairs)} "
        f"pairs, {len(trace.groups)} groups, {trace.n_prompts} prompts. Bars: 95 % intervals."
    )
    return dressed(figure, f"What merges in {in_figure(trace.label)}", subtitle, HEIGHT)


def _points(rows: Any, model: str, label: str, *, showlegend: bool) -> "go.Scatter":
    import plotly.graph_objects as go

    colour = QUANTIZED if model == "quantized" else CONTROL["noise"]
    name = in_figure(label) if model == "quantized" else "matched noise"
    errors = {"array": rows["high"] - rows["y"], "arrayminus": rows["y"] - rows["low"]}
    return go.Scatter(
        x=rows["x"],
        y=rows["y"],
        error_y={"type": "data", "symmetric": False, "color": colour, "thickness": 2, "width": 5, **errors},
        mode="markers",
        marker={"size": 11, "color": colour, "symbol": "circle" if model == "quantized" else "diamond"},
        name=name,
        legendgroup=model,
        showlegend=showlegend,
        text=rows["what"],
        hovertemplate=name + ", %{text}: %{y:.3f}<extra></extra>",
    )


def _draw_groups(figure: "go.Figure", trace: "SmearingTrace") -> None:
    import plotly.graph_objects as go

    largest: Any = trace.groups.head(LARGEST)
    for joins, colour in JOINED.items():
        rows = largest[largest["joins"] == joins]
        if not len(rows):
            continue
        hover = [
            f"{in_figure(r.site)}<br>{r.size} features ({r.n_safety} safety), {r.n_pairs} pairs, density {r.density:.2f}"
            for r in rows.itertuples()
        ]
        bar = go.Bar(
            x=rows.index,
            y=rows["size"],
            name=f"groups of {joins} features",
            marker={"color": colour, "line_width": 0},
            text=hover,
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
        figure.add_trace(bar, row=2, col=1)
    if not len(largest):
        figure.add_annotation(x=0.5, xref="x3 domain", y=0.5, yref="y3 domain", text="nothing is smeared")
    figure.update_xaxes(title_text="groups, largest first", showticklabels=False, ticks="", row=2, col=1)
    figure.update_yaxes(title_text="features in the group", row=2, col=1)


def overview_panel(
    pairs: "StoredPairs", rows: np.ndarray, tau: float, delta: float, *, height: int = 280
) -> "go.Figure":
    """Cosine in the reference against cosine in the quantized model, one point per stored pair; what is smeared lies in the open part.

    One trace for each of `KIND`, whose `customdata` are rows of `pairs`; the last rings the chosen pair.
    """
    import plotly.graph_objects as go

    kinds = list(KIND)
    marks: Any = go.Scattergl if len(rows) > 2_000 else go.Scatter
    figure = go.Figure()
    for k in reversed(range(len(kinds))):
        some = rows[pairs.kind[rows] == k]
        names = [
            f"{i} + {j}, {in_figure(s)}"
            for s, i, j in zip(pairs.site[some], pairs.feature_i[some], pairs.feature_j[some], strict=True)
        ]
        point = {
            "color": KIND[kinds[k]],
            "symbol": SYMBOL[kinds[k]],
            "size": 5 if k == 2 else 8,
            "opacity": 0.6 if k == 2 else 0.9,
        }
        trace = marks(
            x=pairs.cos_ref[some].astype(np.float32),
            y=pairs.cos_quant[some].astype(np.float32),
            mode="markers",
            name=kinds[k],
            marker=point,
            customdata=some.tolist(),
            text=names,
            hovertemplate="%{text}<br>%{x:.3f} → %{y:.3f}<extra></extra>",
        )
        figure.add_trace(trace)
    around = {"symbol": "circle-open", "size": 15, "color": CONTROL["random"], "line": {"width": 3}}
    figure.add_trace(
        marks(x=[], y=[], mode="markers", name="chosen", marker=around, hoverinfo="skip", showlegend=False)
    )
    figure.update_xaxes(
        title_text="cosine of the pair in the reference", range=[min(-0.02, _least(pairs.cos_ref)), 1.02]
    )
    figure.update_yaxes(title_text="in the quantized model", range=[min(-0.02, _least(pairs.cos_quant)), 1.02])
    layout: Any = figure.layout
    figure.update_layout(shapes=threshold_shapes(tau, delta, layout.xaxis.range, layout.yaxis.range))
    return small_panel(figure, height)


def threshold_shapes(
    tau: float, delta: float, x: Sequence[float], y: Sequence[float], *, dark: bool = False
) -> list[dict[str, Any]]:
    """A veil over the pairs that are not smeared, and the edge of those that are: y ≥ τ and y ≥ x + δ."""
    right, bottom, top, left = float(x[1]), float(y[0]), float(y[1]), float(x[0])
    edge = list(zip(*threshold_edge(tau, delta, x, y), strict=True))
    under = [*edge, (edge[-1][0], top), (right, top), (right, bottom), (left, bottom)]
    paper: Any = template(dark=dark).layout
    veil = translucent(paper.paper_bgcolor, 0.72)
    return [
        {"type": "path", "path": _path(under) + " Z", "fillcolor": veil, "line": {"width": 0}, "layer": "above"},
        {
            "type": "path",
            "path": _path(edge),
            "line": {"color": CONTROL["noise"], "width": 1.5, "dash": "dot"},
            "layer": "above",
        },
    ]


def threshold_edge(tau: float, delta: float, x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Corners of the lower edge of what is smeared, from left to right, within these ranges."""
    left, right, top = float(x[0]), float(x[1]), float(y[1])
    corner = min(right, max(left, tau - delta))
    end = max(corner, min(right, top - delta))
    return [left, corner, end], [max(tau, left + delta), max(tau, corner + delta), max(tau, end + delta)]


def _least(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.min()) - 0.02 if len(finite) else 0.0


def _path(points: list[tuple[float, float]]) -> str:
    return "M " + " L ".join(f"{x:.5f},{y:.5f}" for x, y in points)


def small_panel(figure: "go.Figure", height: int) -> "go.Figure":
    """The figure as a part of a widget: no titles, narrow margins."""
    margin = {"l": 56, "r": 12, "t": 28, "b": 44}
    return figure.update_layout(
        template=template(), height=height, margin=margin, legend={"y": 1.0, "font": {"size": 11}}
    )
