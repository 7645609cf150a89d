"""The figure of one group of features that merge: a graph of its pairs, or a matrix of their cosines."""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tracelens.views.escaping import in_figure
from tracelens.views.smearing_figures import small_panel
from tracelens.views.style import CAPABILITY, CHOSEN, CONTROL, SAFETY, translucent

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.views.widgets.smearing_pairs import StoredPairs

COSINES: dict[str, Any] = {"cmin": 0, "cmax": 1, "colorscale": "Viridis"}
MANY = 30
"""Features of a group beyond which they are not named."""


def group_panel(
    pairs: "StoredPairs",
    members: np.ndarray,
    rows: np.ndarray,
    how: Literal["graph", "matrix"] = "graph",
    *,
    safety: frozenset[int] = frozenset(),
    chosen: int | None = None,
    title: str = "",
    height: int = 280,
) -> "go.Figure":
    """One group of features that merge. As a graph: a line and a mark on it per pair. As a matrix: cosine in the quantized model above the
    diagonal, in the reference below it; a pair that was not stored is blank.

    Always the same traces: lines, features, pairs, matrix, the chosen one; `customdata` of pairs and cells are rows of `pairs`, -1 where
    there is none.
    """
    import plotly.graph_objects as go

    members = _neighbours(pairs, members, rows)
    order = np.argsort(members)
    i, j = (order[np.searchsorted(members[order], side[rows])] for side in (pairs.feature_i, pairs.feature_j))
    draw = _as_graph if how == "graph" else _as_matrix
    figure = go.Figure(draw(pairs, members, rows, i, j, safety, chosen))
    n, graph = len(members), how == "graph"
    ticks: dict[str, Any] = {"showticklabels": False, "ticks": ""}
    if n <= MANY and not graph:
        ticks = {"tickvals": list(range(n)), "ticktext": [f"#{f}" for f in members]}
    span = [-1.35, 1.35] if graph else [-0.5, n - 0.5]
    quiet = {"showgrid": False, "showline": False, "title": {"text": "" if graph else "features of the group"}}
    axes: dict[str, Any] = {
        "xaxis": {"range": span, **quiet, **ticks},
        "yaxis": {"range": span if graph else span[::-1], **quiet, **ticks},
    }
    heading = {"text": in_figure(title), "font": {"size": 12}, "y": 0.99, "pad": {"t": 4, "l": 8}}
    return small_panel(figure, height).update_layout(showlegend=False, title=heading, **axes)


def _as_graph(
    pairs: "StoredPairs",
    members: np.ndarray,
    rows: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    safety: frozenset[int],
    chosen: int | None,
) -> list[Any]:
    """Traces of `group_panel`: features on a circle, a line for each pair, and a mark on it to click."""
    import plotly.graph_objects as go

    n = len(members)
    angle = np.pi / 2 - 2 * np.pi * np.arange(n) / max(n, 1)
    x, y = np.cos(angle), np.sin(angle)
    gap = np.full(len(rows), np.nan)
    lines = [np.stack([side[i], side[j], gap], 1).ravel() for side in (x, y)]
    # Off the middle, where all chords of a circle would meet.
    share = 0.5 + 0.08 * (np.arange(len(rows)) % 5 - 2)
    middle = [side[i] * share + side[j] * (1 - share) for side in (x, y)]
    few, safe = n <= MANY, [int(f) in safety for f in members]
    node = {
        "size": 12 if few else 7,
        "color": [SAFETY if one else CAPABILITY for one in safe],
        "symbol": ["diamond" if one else "circle" for one in safe],
    }
    mark = {"size": 8, "color": pairs.cos_quant[rows], "line": {"width": 1, "color": CONTROL["noise"]}} | COSINES
    hover = [
        f"#{a} + #{b}<br>{r:.3f} → {q:.3f}"
        for a, b, r, q in zip(
            *(side[rows] for side in (pairs.feature_i, pairs.feature_j, pairs.cos_ref, pairs.cos_quant)), strict=True
        )
    ]
    shared: dict[str, Any] = {"hovertemplate": "%{text}<extra></extra>"}
    return [
        go.Scatter(
            x=lines[0],
            y=lines[1],
            mode="lines",
            line={"color": translucent(CONTROL["noise"], 0.5), "width": 1},
            hoverinfo="skip",
        ),
        go.Scatter(
            x=x,
            y=y,
            mode="markers+text" if few else "markers",
            text=[f"#{f}" for f in members],
            textposition="top center",
            cliponaxis=False,
            marker=node,
            **shared,
        ),
        go.Scatter(
            x=middle[0], y=middle[1], mode="markers", customdata=rows.tolist(), text=hover, marker=mark, **shared
        ),
        go.Heatmap(visible=False),
        _ring(rows, chosen, middle, "circle-open"),
    ]


def _as_matrix(
    pairs: "StoredPairs",
    members: np.ndarray,
    rows: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    safety: frozenset[int],
    chosen: int | None,
) -> list[Any]:
    """Traces of `group_panel`: a cell for each pair and model."""
    import plotly.graph_objects as go

    n = len(members)
    z, at = np.full((n, n), np.nan), np.full((n, n), -1)
    low, high = np.minimum(i, j), np.maximum(i, j)
    z[low, high], z[high, low] = pairs.cos_quant[rows], pairs.cos_ref[rows]
    at[low, high] = at[high, low] = rows
    cells = go.Heatmap(
        # Two-dimensional arrays travel as JSON, which has no NaN.
        z=[[None if v != v else float(v) for v in line] for line in z],
        x=list(range(n)),
        y=list(range(n)),
        customdata=at,
        zmin=COSINES["cmin"],
        zmax=COSINES["cmax"],
        colorscale=COSINES["colorscale"],
        colorbar={"title": {"text": "cosine"}, "thickness": 10},
        hoverongaps=False,
        hovertemplate="%{z:.3f}<extra></extra>",
        xgap=int(n < 60),
        ygap=int(n < 60),
    )
    hidden = [go.Scatter(visible=False) for _ in range(3)]
    return [*hidden, cells, _ring(rows, chosen, (high, low), "square-open")]


def _neighbours(pairs: "StoredPairs", members: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The members so ordered that linked ones stand near each other (reverse Cuthill–McKee)."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    if len(members) < 3:
        return members
    i, j = (np.searchsorted(members, side[rows]) for side in (pairs.feature_i, pairs.feature_j))
    ones = np.ones(2 * len(rows))
    linked = csr_array((ones, (np.concatenate([i, j]), np.concatenate([j, i]))), shape=(len(members), len(members)))
    return members[reverse_cuthill_mckee(linked, symmetric_mode=True)]


def _ring(rows: np.ndarray, chosen: int | None, places: Any, symbol: str) -> "go.Scatter":
    import plotly.graph_objects as go

    at = np.flatnonzero(rows == chosen) if chosen is not None else []
    x, y = ([float(side[k]) for k in at] for side in places)
    look = {"size": 15, "color": CHOSEN, "symbol": symbol, "line": {"width": 3}}
    return go.Scatter(x=x, y=y, mode="markers", marker=look, hoverinfo="skip")
