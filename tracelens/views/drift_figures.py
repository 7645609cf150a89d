"""The figure of the drift explorer: every live feature at two of its statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from tracelens.views.escaping import in_figure
from tracelens.views.style import CAPABILITY, SAFETY, dressed, template
from tracelens.views.widgets.drift_table import AXES, AxisName, DamageKind, LiveFeatures

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.audit_report import AuditReport

GL_FROM = 2_000
"""Features from which points are drawn by WebGL: SVG is sharper, but slow beyond."""
KINDS: tuple[DamageKind, ...] = get_args(DamageKind)
SHAPES: dict[DamageKind, str] = {
    "survived": "circle",
    "blurred": "diamond",
    "damaged": "x",
    "muted": "triangle-down",
    "constant": "square",
}
"""What happened to a feature → its marker; muted (a muting rate of .9 or more) before the class of its correlation."""
SETS = {"capability": (False, CAPABILITY, 6, 0.5), "safety": (True, SAFETY, 9, 0.95)}
"""Set → whether safety, colour, size, opacity. Few and the point of it all: safety features are drawn last, and larger."""
QUIET = "#8A8F98"
HEIGHT = 640
RADIUS = 10
"""Of the ring around the selected point, in pixels."""


@dataclass(frozen=True)
class Layers:
    """Which traces of the figure are what, by their index."""

    groups: tuple[tuple[str, DamageKind], ...]
    """Set and kind of the first traces, one for each."""

    @property
    def diagonal(self) -> int:
        return len(self.groups)

    @property
    def floors(self) -> int:
        return len(self.groups) + 1


def drift_figure(report: "AuditReport", x: AxisName = "mean_reference", y: AxisName = "mean_quantized") -> "go.Figure":
    """Every live feature at two of its statistics (`drift_table.AXES`), on logarithmic axes where they span orders of magnitude."""
    from tracelens.views.widgets.choosing import thinned

    live = LiveFeatures(report)
    rows = thinned(live, np.arange(len(live)))
    figure = scatter(live, layers_of(live), rows, x, y, log=True)
    left_out = f" A sample: {len(rows):,} of {len(live):,} features are drawn." if len(rows) < len(live) else ""
    title = f"Features of {in_figure(report.label)}"
    return dressed(figure, title, f"{len(live):,} live features; dotted: what is 0.{left_out}", HEIGHT, legend_rows=2)


def layers_of(live: LiveFeatures) -> Layers:
    pairs: list[tuple[str, bool, DamageKind]] = [
        (name, safety, kind) for name, (safety, *_) in SETS.items() for kind in KINDS
    ]
    return Layers(tuple((name, kind) for name, safety, kind in pairs if _group(live, safety, kind).any()))


def scatter(live: LiveFeatures, layers: Layers, rows: Any, x: AxisName, y: AxisName, *, log: bool) -> "go.Figure":
    """The bare figure with the points `rows`; its traces are in the order of `layers`."""
    import plotly.graph_objects as go

    kind = go.Scattergl if len(live) > GL_FROM else go.Scatter
    figure = go.Figure()
    for name, damage in layers.groups:
        _, colour, size, opacity = SETS[name]
        # Crosses and triangles of one size look smaller than circles.
        bigger = {"damaged": 1, "muted": 2, "blurred": 1}.get(damage, 0)
        line = {"width": 1, "color": "white"} if name == "safety" else {"width": 0}
        figure.add_trace(
            kind(
                mode="markers",
                name=f"{name}, {damage}",
                marker={
                    "color": colour,
                    "size": size + bigger,
                    "opacity": opacity,
                    "symbol": SHAPES[damage],
                    "line": line,
                },
                showlegend=False,
            )
        )
    quiet = {"mode": "lines", "hoverinfo": "skip", "showlegend": False}
    figure.add_trace(go.Scatter(line={"color": QUIET, "width": 1}, **quiet))
    figure.add_trace(go.Scatter(line={"color": QUIET, "width": 1, "dash": "dot"}, **quiet))
    figure.add_traces(_legend(layers))
    traces: Any = figure.data
    for trace, change in zip(traces, changes(live, layers, rows, x, y, log=log), strict=False):
        trace.update(change)
    figure.update_layout(
        axes(live, x, y, log=log), legend={"itemclick": False, "itemdoubleclick": False, "y": 1}, shapes=[_ring()]
    )
    if not len(live):
        figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", text="no live features", showarrow=False)
    return figure


def ring(live: LiveFeatures, row: int | None, x: AxisName, y: AxisName, *, log: bool) -> dict[str, Any]:
    """Where the ring around the selected point is, as changes of the figure's only shape: a trace of its own would have all drawn anew."""
    if row is None or not live:
        return {"visible": False}
    at = [float(live.drawn_at(name, log=log)[row]) for name in (x, y)]
    if not all(map(isfinite, at)):
        return {"visible": False}
    return {"visible": True, "xanchor": at[0], "yanchor": at[1]}


def _ring() -> dict[str, Any]:
    line = {"color": ink(dark=False), "width": 3}
    return {
        # Not a "circle": on a logarithmic axis plotly takes its negative ends, pixels though they are, for 0.
        "type": "path",
        "path": _circle(RADIUS),
        "xref": "x",
        "yref": "y",
        "xsizemode": "pixel",
        "ysizemode": "pixel",
        "line": line,
        "visible": False,
    }


def _circle(radius: int) -> str:
    """A circle around (0, 0) as a path of four curves."""
    r, c = f"{radius:g}", f"{radius * 0.5523:g}"
    return f"M0,-{r} C{c},-{r} {r},-{c} {r},0 C{r},{c} {c},{r} 0,{r} C-{c},{r} -{r},{c} -{r},0 C-{r},-{c} -{c},-{r} 0,-{r} Z"


def group_rows(live: LiveFeatures, layers: Layers, rows: Any) -> list[np.ndarray]:
    """The rows that each group's trace draws."""
    return [rows[_group(live, SETS[name][0], kind)[rows]] for name, kind in layers.groups]


def changes(
    live: LiveFeatures,
    layers: Layers,
    rows: Any,
    x: AxisName,
    y: AxisName,
    *,
    log: bool,
    shown: Any = None,
    text: bool = True,
    ends: bool = True,
) -> list[dict[str, Any]]:
    """What the first traces hold: points of `rows`, those not in the mask `shown` without a place; diagonal; where 0 is drawn.

    Args:
        text, ends: whether with names of features, and with their intervals on these axes, for hovering.
    """
    xs, ys = (live.drawn_at(name, log=log).astype(np.float32) for name in (x, y))
    if shown is not None:
        xs = np.where(shown, xs, np.float32(np.nan))
    hover = hover_template(live, x, y, log=log)
    found = []
    for of in group_rows(live, layers, rows):
        points: dict[str, Any] = {"x": xs[of], "y": ys[of], "hovertemplate": hover}
        points |= {"text": labels(live, of)} if text else {}
        found.append(points | ({"customdata": intervals(live, of, x, y)} if ends and _with_ends(live, x, y) else {}))
    return [*found, _diagonal(live, x, y, log=log), _floors(live, x, y, log=log)]


def labels(live: LiveFeatures, rows: Any) -> np.ndarray:
    known: dict[tuple[str, str], str] = {}
    found = []
    for site, feature, behaviour in zip(
        live.site[rows], live.feature[rows].tolist(), live.behaviour[rows], strict=True
    ):
        if (behaviour, site) not in known:
            known[behaviour, site] = f"{in_figure(behaviour)}<br>{in_figure(site)}"
        found.append(f"<b>#{feature}</b> {known[behaviour, site]}")
    return np.array(found, dtype=object)


def intervals(live: LiveFeatures, rows: Any, x: AxisName, y: AxisName) -> np.ndarray:
    """A line for each feature: the ends on the axes that have them."""
    parts = []
    for name in _with_ends(live, x, y):
        what = ENDS.get(name, f"{name}, 95 %: ")
        low, high = live.ends[name][:, rows].tolist()
        parts.append([f"{what}{a:.3f} to {b:.3f}" if a == a else "" for a, b in zip(low, high, strict=True)])
    return np.array(["<br>".join(filter(None, lines)) for lines in zip(*parts, strict=True)], dtype=object)


ENDS: dict[AxisName, str] = {"fidelity_noise": "draws of noise: "}
"""What the ends on an axis are, where they are no 95 % interval over prompts."""


def _with_ends(live: LiveFeatures, x: AxisName, y: AxisName) -> list[AxisName]:
    """Axes of these two on which some feature has an interval."""
    return [name for name in dict.fromkeys((x, y)) if name in live.ends and np.isfinite(live.ends[name]).any()]


def axes(live: LiveFeatures, x: AxisName, y: AxisName, *, log: bool) -> dict[str, Any]:
    """Titles, kinds and ranges of both axes, as layout."""
    found = {}
    sides: list[tuple[str, AxisName]] = [("xaxis", x), ("yaxis", y)]
    for side, name in sides:
        axis = AXES[name]
        logarithmic = log and axis.log
        found[side] = {
            "title": {"text": axis.title},
            "type": "log" if logarithmic else "linear",
            "range": span(live, name, log=log),
            "dtick": 1 if logarithmic else None,
            # Plotly sets powers of ten a quarter larger.
            "tickfont": {"size": 10 if logarithmic else 12},
        }
    return found


def span(live: LiveFeatures, name: AxisName, *, log: bool) -> list[float]:
    """The axis' range for all live features, so that filters do not move it; of a logarithmic axis in powers of ten."""
    if AXES[name].bounded:
        return [-0.04, 1.05]
    names: list[AxisName] = [other for other, axis in AXES.items() if axis.unit and axis.unit == AXES[name].unit] or [
        name
    ]
    values = np.concatenate([live.drawn_at(other, log=log) for other in names])
    values = values[np.isfinite(values)]
    if not len(values):
        return [0.0, 1.0]
    ends = np.array([values.min(), values.max()])
    low, high = np.log10(ends) if log and AXES[name].log else ends
    room = 0.05 * (high - low) or 0.5
    return [float(low - room), float(high + room)]


def hover_template(live: LiveFeatures, x: AxisName, y: AxisName, *, log: bool) -> str:
    sides: list[tuple[str, AxisName]] = [("x", x), ("y", y)]
    lines = [
        f"{AXES[name].title}: %{{{side}:.3g}}{' (dotted line: 0)' if _has_floor(live, name, log=log) else ''}"
        for side, name in sides
    ]
    lines += ["%{customdata}"] if _with_ends(live, x, y) else []
    return "%{text}<br>" + "<br>".join(lines) + "<extra></extra>"


def ink(*, dark: bool) -> str:
    """The template's colour of text: what rings the selected point."""
    house: Any = template(dark=dark).layout
    return house.font.color


def _group(live: LiveFeatures, safety: bool, kind: str) -> np.ndarray:
    return (live.safety == safety) & (live.kind == kind)


def _diagonal(live: LiveFeatures, x: AxisName, y: AxisName, *, log: bool) -> dict[str, Any]:
    if x == y or not AXES[x].unit or AXES[x].unit != AXES[y].unit or AXES[x].unit == "share":
        return {"x": [], "y": []}
    low, high = span(live, x, log=log)
    ends = [10**low, 10**high] if log and AXES[x].log else [low, high]
    return {"x": ends, "y": ends}


def _floors(live: LiveFeatures, x: AxisName, y: AxisName, *, log: bool) -> dict[str, Any]:
    """A line where 0 is drawn, on each logarithmic axis on which something is 0."""
    places: dict[str, list[float | None]] = {"x": [], "y": []}
    sides: list[tuple[str, str, AxisName, AxisName]] = [("x", "y", x, y), ("y", "x", y, x)]
    for side, other, name, across in sides:
        if _has_floor(live, name, log=log):
            ends = span(live, across, log=log)
            ends = [10**end for end in ends] if log and AXES[across].log else ends
            places[side] += [live.floor(name)] * 2 + [None]
            places[other] += [*ends, None]
    return dict(places)


def _has_floor(live: LiveFeatures, name: AxisName, *, log: bool) -> bool:
    return log and AXES[name].log and bool((live.values[name] == 0).any())


def _legend(layers: Layers) -> "Sequence[go.Scatter]":
    """Entries for colours and shapes, each once; the traces themselves would be all their combinations."""
    import plotly.graph_objects as go

    sets = list(dict.fromkeys(name for name, _ in layers.groups))
    kinds: list[DamageKind] = [kind for kind in KINDS if any(kind == other for _, other in layers.groups)]
    looks = [(f"{name} features", SETS[name][1], "circle") for name in reversed(sets)]
    looks += [(kind, QUIET, SHAPES[kind]) for kind in kinds]
    return [
        go.Scatter(x=[None], y=[None], mode="markers", name=name, marker={"color": colour, "symbol": symbol, "size": 9})
        for name, colour, symbol in looks
    ]
