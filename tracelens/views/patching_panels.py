"""Panels of figures of patching: effects over one axis, in order of size, and as heatmaps over two."""

from collections.abc import Sequence
from html import unescape
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from tracelens.views.escaping import in_figure
from tracelens.views.patching_words import axis_title, labels, place_of
from tracelens.views.style import CONTROL, translucent

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.causal.patching_result import PatchingResult

TOWARDS, AWAY = "#0F8B8D", "#A6611A"
"""Towards the run whose activations are put in, and away from it: teal and brown, apart for all kinds of colour blindness."""
BLANK = "#8A8F98"
PANELS, COLUMNS = 6, 3
"""Heatmaps of one figure, and of one row."""
WIDTH = 720.0
"""Pixels across which a figure draws, about."""
CELL, FRAME, BETWEEN = 24, 190, 46
"""Height of a heatmap's row, of what is around the heatmaps, and between them, in pixels."""
LETTER = 7.5
"""Width of a tick's letter in pixels, about."""


class Drawn(NamedTuple):
    """A figure without its titles, what its subtitle must add, and its height."""

    figure: "go.Figure"
    said: str
    height: int


def profile(table: "pd.DataFrame", axis: str, result: "PatchingResult", tokens: Sequence[str] | None) -> Drawn:
    """Effects over one axis with their intervals, the placebo beside them."""
    import plotly.graph_objects as go

    values = list(table[axis])
    ticks = labels(axis, values, result, tokens)
    figure = go.Figure(points(table, list(range(len(values))), up=False, lines=axis in ("layer", "position")))
    _goals(figure, table, up=False)
    figure.update_xaxes(**axis_of(ticks, WIDTH), title_text=axis_title(axis, table))
    figure.update_yaxes(title_text="effect")
    return Drawn(figure, f"Filled: {told_apart(table)}. Bars: 95 % intervals.", 460 + turned(ticks, WIDTH))


def ranking(table: "pd.DataFrame", axes: Sequence[str], top: int) -> Drawn:
    """The largest effects either way, best above, the placebo beside each."""
    import plotly.graph_objects as go

    found: Any = table[table["effect"].notna()]
    shown = found.loc[found["effect"].abs().sort_values(ascending=False).index[:top]].sort_values("effect")
    figure = go.Figure(points(shown, list(range(len(shown))), up=True, lines=False))
    _goals(figure, shown, up=True)
    ticks = [in_figure(" · ".join(place_of(axis, row[axis]) for axis in axes)) for row in shown.to_dict("records")]
    figure.update_yaxes(tickvals=list(range(len(ticks))), ticktext=ticks, range=[-0.7, len(ticks) - 0.3])
    figure.update_xaxes(title_text="effect")
    said = (
        f"The {len(shown)} largest effects of {len(table)}: being chosen for their size, they are overstated. "
        f"Filled: {told_apart(table)}. Bars: 95 % intervals."
    )
    return Drawn(figure, said, FRAME + max(160, 20 * len(shown)))


def heatmaps(
    table: "pd.DataFrame", axes: Sequence[str], result: "PatchingResult", tokens: Sequence[str] | None
) -> Drawn:
    """Effects over two axes; one panel for each value of any others."""
    from plotly.subplots import make_subplots

    x, y = directions(table, axes)
    others = [axis for axis in axes if axis not in (x, y)]
    panels, said = _panels(table, others)
    across, up = (values_of(table[axis]) for axis in (x, y))
    columns = min(len(panels), 1 if len(across) > 14 else 2 if len(across) > 8 else COLUMNS)
    rows = ceil(len(panels) / columns)
    height = rows * max(110 if rows > 1 else 150, CELL * len(up))
    names = [
        " · ".join(_named(axis, value, result, tokens) for axis, value in zip(others, key, strict=True))
        for key in panels
    ]
    gap = BETWEEN / (height + BETWEEN * (rows - 1))
    spacing: dict[str, Any] = {"horizontal_spacing": 0.04, "vertical_spacing": gap} if len(panels) > 1 else {}
    figure = make_subplots(rows, columns, subplot_titles=names if others else None, **spacing)
    xs, ys = (labels(axis, values, result, tokens) for axis, values in ((x, across), (y, up)))
    for i, panel in enumerate(panels.values()):
        at: Any = {"row": i // columns + 1, "col": i % columns + 1}
        figure.add_traces(cells(panel, x, y, across, up, first=i == 0), rows=at["row"], cols=at["col"])
        lowest, leftmost = i + columns >= len(panels), at["col"] == 1
        figure.update_xaxes(**axis_of(xs, WIDTH / columns), matches="x", showticklabels=lowest, **at)
        figure.update_xaxes(title_text=axis_title(x, table) if lowest else None, **at)
        figure.update_yaxes(**axis_of(ys, None), matches="y", showticklabels=leftmost, **at)
        figure.update_yaxes(title_text=axis_title(y, table) if leftmost else None, **at)
    figure.update_layout(coloraxis=colours(table))
    whole = FRAME + height + BETWEEN * (rows - 1) + (24 if others else 0)
    return Drawn(figure, said, whole + turned(xs, WIDTH / columns))


def _named(axis: str, value: Any, result: "PatchingResult", tokens: Sequence[str] | None) -> str:
    """A panel's value of one axis; a position by its token too."""
    plain, tick = in_figure(place_of(axis, value)), labels(axis, [value], result, tokens)[0]
    return f"{plain} {tick}" if axis == "position" and tick != str(value) else plain


def directions(table: "pd.DataFrame", axes: Sequence[str]) -> tuple[str, str]:
    """Which axis lies across and which goes up: as usual where there is a usual way, else the longest across."""
    for up, across in (("sender", "receiver"), ("position", "key"), ("group", "key")):
        if up in axes and across in axes:
            return across, up
    y = "layer" if "layer" in axes else axes[0]
    rest = [axis for axis in axes if axis != y]
    return max(rest, key=lambda axis: (axis != "site", len(table[axis].unique()))), y


def values_of(column: Any) -> list[Any]:
    values = list(dict.fromkeys(column))
    return sorted(values) if all(isinstance(value, int) for value in values) else values


def _panels(table: "pd.DataFrame", others: Sequence[str]) -> tuple[dict[tuple[Any, ...], "pd.DataFrame"], str]:
    """What each panel shows; of very many, those with the largest effects."""
    if not others:
        return {(): table}, ""
    found: dict[Any, Any] = dict(iter(table.groupby([*others], sort=False, dropna=False)))
    if len(found) <= PANELS:
        return found, ""
    largest = sorted(found, key=lambda key: -float(found[key]["effect"].abs().max(skipna=True)))[:PANELS]
    what = " and ".join(others)
    return {key: found[key] for key in found if key in largest}, (
        f"Shown: the {PANELS} of {len(found)} panels ({what}) with the largest effect; choose=... shows others."
    )


def cells(table: "pd.DataFrame", x: str, y: str, across: list[Any], up: list[Any], *, first: bool) -> list[Any]:
    """One heatmap: effects, grey where there is none, dots where they are marked."""
    import plotly.graph_objects as go

    effect: list[list[float | None]] = [[None] * len(across) for _ in up]
    text = [[absent(x, y)] * len(across) for _ in up]
    blank: list[list[float | None]] = [[0.0] * len(across) for _ in up]
    marked: list[tuple[int, int]] = []
    for row in table.to_dict("records"):
        i, j = up.index(row[y]), across.index(row[x])
        known = row["effect"] == row["effect"]
        effect[i][j], blank[i][j], text[i][j] = (
            (row["effect"], None, row["hover"]) if known else (None, 1.0, row["hover"])
        )
        if row["marked"]:
            marked.append((j, i))
    shared: dict[str, Any] = {"xgap": 1, "ygap": 1, "hovertemplate": "%{text}<extra></extra>", "text": text}
    greys = [[0, translucent(BLANK, 0.0)], [1, translucent(BLANK, 0.25)]]
    empty = [(j, i) for i, line in enumerate(blank) for j, value in enumerate(line) if value is not None]
    nan = any(1.0 in line for line in blank)
    cross = {"symbol": "x-thin", "size": 5, "line": {"color": translucent(BLANK, 0.7), "width": 1}}
    dot = {"symbol": "circle", "size": 6, "color": "#FFFFFF", "line": {"color": "#24292F", "width": 1.2}}
    return [
        go.Heatmap(z=blank, colorscale=greys, zmin=0, zmax=1, showscale=False, hoverongaps=False, **shared),
        go.Heatmap(z=effect, coloraxis="coloraxis", hoverongaps=False, **shared),
        marks(
            empty,
            cross,
            "no effect can be said (0/0)" if nan else absent(x, y).partition(":")[0],
            show=first and bool(empty),
        ),
        marks(marked, dot, told_apart(table), show=first),
    ]


def marks(cells: Sequence[tuple[int, int]], marker: dict[str, Any], name: str, *, show: bool) -> "go.Scatter":
    import plotly.graph_objects as go

    # A legend shows only what has a point; None is one that is not drawn.
    x, y = zip(*cells, strict=True) if cells else ([None], [None])
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, name=name, showlegend=show, hoverinfo="skip")


def absent(x: str, y: str) -> str:
    if (y, x) == ("sender", "receiver"):
        return "no path: the receiver does not come after the sender"
    if x == "key":
        return "comes after: it cannot be attended to"
    return "each pair is shown once" if x == "other_layer" else "not among what was replaced"


def axis_of(ticks: Sequence[str], width: float | None) -> dict[str, Any]:
    """An axis of places; across, its ticks are turned where they do not fit and thinned where even that is too much."""
    values, angle = list(range(len(ticks))), 0
    if width is not None and turned(ticks, width):
        angle, values = -60, values[:: ceil(14 * len(ticks) / width)]
    return {
        "tickvals": values,
        "ticktext": [ticks[value] for value in values],
        "tickangle": angle,
        "range": [-0.5, len(ticks) - 0.5],
        "showgrid": False,
        "ticks": "",
    }


def turned(ticks: Sequence[str], width: float) -> int:
    """Height in pixels that ticks take below what one line would, as they must be turned to fit; 0 where they need not."""
    longest = LETTER * max((len(unescape(tick.replace("<b>", "").replace("</b>", ""))) for tick in ticks), default=0)
    return round(longest * 0.87) if ticks and longest > width / len(ticks) else 0


def colours(table: "pd.DataFrame", title: str = "effect") -> dict[str, Any]:
    """Diverging around 0, which is the page itself, light or dark."""
    found: Any = table["effect"].abs().dropna()
    limit = max(0.05, float(found.max())) if len(found) else 1.0
    return {
        "colorscale": [
            [0, AWAY],
            [0.5, translucent(AWAY, 0.03)],
            [0.5, translucent(TOWARDS, 0.03)],
            [1, TOWARDS],
        ],
        "cmin": -limit,
        "cmax": limit,
        "colorbar": {
            "title": {"text": title, "side": "top"},
            "thickness": 12,
            "outlinewidth": 0,
            "ticks": "outside",
        },
    }


def points(table: "pd.DataFrame", places: Sequence[int], *, up: bool, lines: bool) -> list["go.Scatter"]:
    """Effects and placebos with their intervals."""
    import plotly.graph_objects as go

    along, across = ("y", "x") if up else ("x", "y")
    series = [("effect", "effect", TOWARDS, "circle", 0.0)]
    if "placebo_effect" in table:
        series.append(("placebo_effect", "placebo", CONTROL["random"], "diamond", -0.25 if up else 0.12))
    traces = []
    for name, called, colour, symbol, aside in series:
        marked = [bool(it) or name != "effect" for it in table["marked"]]
        symbols = [symbol if it else f"{symbol}-open" for it in marked]
        shown: dict[str, Any] = {
            along: [place + aside for place in places],
            across: table[name].tolist(),
            f"error_{across}": _errors(table, name, colour),
        }
        trace = go.Scatter(
            **shown,
            mode="lines+markers" if lines else "markers",
            line={"color": translucent(colour, 0.6), "width": 1.5, "dash": "solid" if name == "effect" else "dot"},
            marker={"size": 9, "symbol": symbols, "color": colour, "line_width": 2},
            name=called,
            text=table["hover"],
            hovertemplate="%{text}<extra></extra>",
            cliponaxis=False,
        )
        traces.append(trace)
    return traces


def _errors(table: "pd.DataFrame", name: str, colour: str) -> dict[str, Any]:
    ends: Any = table[[name, f"{name}_low", f"{name}_high"]].where(table["n_usable"] > 1)
    return {
        "type": "data",
        "symmetric": False,
        "array": (ends[f"{name}_high"] - ends[name]).tolist(),
        "arrayminus": (ends[name] - ends[f"{name}_low"]).tolist(),
        "color": colour,
        "thickness": 2,
        "width": 4,
    }


def _goals(figure: "go.Figure", table: "pd.DataFrame", *, up: bool) -> None:
    """Lines where nothing and where all is brought back; the latter only if something comes near."""
    near: Any = table["effect"].abs().max()
    for value, dash in ((0, "solid"), (1, "dot")):
        line: dict[str, Any] = {"color": BLANK, "width": 1, "dash": dash}
        if value == 0 or near > 0.3:
            draw: Any = figure.add_vline if up else figure.add_hline
            draw(value, line=line)


def told_apart(table: "pd.DataFrame") -> str:
    return f"differs from {'its placebo' if 'p_versus_placebo' in table else '0'}, adjusted p < 0.05"
