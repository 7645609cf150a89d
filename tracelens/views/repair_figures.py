"""Figures of repair: recovery against components and bytes, by order; what one direction brings back."""

from typing import TYPE_CHECKING, Any, Literal

from tracelens.stats import Estimate
from tracelens.views.bands import errors
from tracelens.views.escaping import in_figure
from tracelens.views.numbers import interval
from tracelens.views.style import CONTROL, SAFETY, SERIES, WHISKER, dressed, translucent

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.causal.repair.curve_result import RepairCurve
    from tracelens.causal.repair.direction_result import DirectionRepair

HEIGHT = 480
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon")
MAGNITUDE = CONTROL["permuted"]
Shown = Literal["recovery", "closed"]
TITLES = {"recovery": "recovery of the {metric}", "closed": "closed of the gap in the {metric}"}
FLOOR, CEILING = -0.5, 2.0
"""Lines beyond are cut off; the hover and the table have them."""


def curve_figure(curve: "RepairCurve", *, measure: Shown = "recovery", intervals: bool = True) -> "go.Figure":
    """One line an order with 95 % intervals, random orders as a band from the least to the largest, against the number of components
    and against bytes.
    """
    from plotly.subplots import make_subplots

    costs = bool(curve.bytes.sum() > 0)
    figure = make_subplots(rows=1, cols=2 if costs else 1, shared_yaxes=True, horizontal_spacing=0.05)
    table: Any = curve.table
    looks = _looks([line for line in curve.lines if line not in ("random", "magnitude")])
    unit, scale = _unit(float(curve.bytes.sum()))
    for col, axis in enumerate(("count", "bytes")[: 1 + costs], start=1):
        by = 1 if axis == "count" else scale
        for line in ("random", "magnitude", *looks):
            rows = table[table["order"] == line]
            if line == "random" and measure == "recovery":
                figure.add_trace(_band(rows, rows[axis] / by), row=1, col=col)
            figure.add_trace(_line(rows, rows[axis] / by, line, measure, looks, intervals, col == 1), row=1, col=col)
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": CONTROL["noise"], "width": 1, "dash": "dot"})
    title = TITLES[measure].format(metric=in_figure(curve.metric))
    figure.update_yaxes(range=_range(table, measure), title_text=title, col=1)
    figure.update_xaxes(title_text=f"components restored, of {len(curve.names)}", col=1)
    if costs:
        figure.update_xaxes(title_text=_bytes_title(curve, unit), col=2)
    legend_rows = 1 + (len(looks) + 1) // 5
    return dressed(
        figure,
        f"What restoring {curve.restore} brings back",
        in_figure(_curve_subtitle(curve)),
        HEIGHT,
        legend_rows=legend_rows,
    )


def direction_figure(repair: "DirectionRepair", *, measure: Shown = "recovery") -> "go.Figure":
    """Bars by layers repaired: the refusal direction beside the controls, with 95 % intervals; random ones with the spread of single
    directions.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    table: Any = repair.table
    versions = list(dict.fromkeys(table["version"]))
    looks = {
        "refusal": ("refusal direction", SAFETY),
        "labels": ("shuffled labels (mean, spread)", CONTROL["labels"]),
        "random": ("random (mean, spread)", CONTROL["random"]),
        "largest error": ("largest error", MAGNITUDE),
        "everything": ("everything there", translucent(SERIES[4], 0.6)),
    }
    figure = make_subplots(rows=1, cols=len(versions), shared_yaxes=True, horizontal_spacing=0.05)
    for col, version in enumerate(versions, start=1):
        for direction, (name, colour) in looks.items():
            rows = table[(table["version"] == version) & (table["direction"] == direction)]
            estimates = _estimates(rows, measure)
            several = direction in ("labels", "random") and measure == "recovery"
            ends = [
                Estimate(e.value, low, high)
                for e, low, high in zip(estimates, rows["band_low"], rows["band_high"], strict=True)
            ]
            bar = go.Bar(
                x=rows["layers"].tolist(),
                y=[e.value for e in estimates],
                error_y=errors(ends if several else estimates, WHISKER) | {"thickness": 1.2, "width": 3},
                name=name,
                legendgroup=name,
                showlegend=col == 1,
                marker={"color": colour, "line_width": 0},
                customdata=[[interval(e), f"{cost:,.0f}"] for e, cost in zip(estimates, rows["bytes"], strict=True)],
                hovertemplate=f"{in_figure(name)}, layer %{{x}}: %{{customdata[0]}}<br>%{{customdata[1]}} bytes<extra></extra>",
            )
            figure.add_trace(bar, row=1, col=col)
        figure.update_xaxes(title_text=f"layers repaired in {version}", type="category", col=col)
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": CONTROL["noise"], "width": 1, "dash": "dot"})
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_yaxes(
        range=_bars_range(table, measure), title_text=TITLES[measure].format(metric=in_figure(repair.metric)), col=1
    )
    dressed(
        figure,
        "The refusal direction put right, and nothing else",
        in_figure(_direction_subtitle(repair)),
        HEIGHT,
        legend_rows=1,
    )
    return figure


def _looks(lines: list[str]) -> dict[str, tuple[str, str]]:
    return {line: (SERIES[i % len(SERIES)], SYMBOLS[i % len(SYMBOLS)]) for i, line in enumerate(lines)}


def _line(
    rows: Any, x: Any, name: str, measure: str, looks: dict[str, tuple[str, str]], intervals: bool, legend: bool
) -> "go.Scatter":
    import plotly.graph_objects as go

    controls = {"random": (CONTROL["random"], "line-ns"), "magnitude": (MAGNITUDE, "x-thin")}
    colour, symbol = (controls | looks)[name]
    estimates = _estimates(rows, measure)
    control = name in controls
    return go.Scatter(
        x=x.tolist(),
        y=[e.value for e in estimates],
        error_y=errors(estimates, translucent(colour, 0.6)) | {"thickness": 1, "width": 2}
        if intervals and not control
        else None,
        mode="lines" if control else "lines+markers",
        line={"color": colour, "width": 2, "dash": {"random": "dot", "magnitude": "dash"}.get(name, "solid")},
        marker={"size": 7, "color": colour, "symbol": symbol},
        name={"random": "random (mean, range)", "magnitude": "magnitude of the error"}.get(name, name),
        legendgroup=name,
        showlegend=legend,
        text=[f"{count} restored: {interval(e)}" for count, e in zip(rows["count"], estimates, strict=True)],
        hovertemplate=f"{in_figure(name)}, %{{text}}<extra></extra>",
    )


def _band(rows: Any, x: Any) -> "go.Scatter":
    import plotly.graph_objects as go

    x = x.tolist()
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*rows["band_high"], *reversed(rows["band_low"].tolist())],
        fill="toself",
        fillcolor=translucent(CONTROL["random"], 0.2),
        line_width=0,
        mode="lines",
        legendgroup="random",
        showlegend=False,
        hoverinfo="skip",
    )


def _estimates(rows: Any, measure: str) -> list[Estimate]:
    names = [measure, f"{measure}_low", f"{measure}_high"]
    return [
        Estimate(float(v), float(low), float(high)) for v, low, high in rows[names].itertuples(index=False, name=None)
    ]


def _range(table: Any, measure: str) -> list[float]:
    low, high = (float(table[f"{measure}_{end}"].agg(agg)) for end, agg in (("low", "min"), ("high", "max")))
    if low != low:
        return [-0.1, 1.1]
    return [max(FLOOR, min(low, 0) - 0.05), min(CEILING, max(high, 1) + 0.05)]


def _bars_range(table: Any, measure: str) -> list[float]:
    """Down to the lowest bar, that none looks shorter than it is; whiskers and spreads may be cut at `CEILING`."""
    low, high = _range(table, measure)
    spread = float(table["band_high"].max()) + 0.05 if measure == "recovery" else high
    lowest = float(table[measure].min()) - 0.05
    return [
        low if lowest != lowest else min(low, lowest),
        high if spread != spread else min(CEILING, max(high, spread)),
    ]


def _unit(total: float) -> tuple[str, float]:
    for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if total >= size:
            return name, size
    return "bytes", 1.0


def _bytes_title(curve: "RepairCurve", unit: str) -> str:
    return f"{unit} added" if curve.restore == "weights" else f"{unit} of reference activations by token"


def _curve_subtitle(curve: "RepairCurve") -> str:
    if not curve.n_usable:
        return curve.verdict
    won = {axis: ", ".join(curve.winners(axis)) or "nothing" for axis in ("components", "bytes")}
    return (
        f"{len(curve.prompts)} prompts, other than those the orders were chosen on; bars: 95 % intervals. Both in recovery and in what "
        f"is closed of the gap, random and magnitude are beaten by {won['components']} (area over components) and by {won['bytes']} "
        "(over bytes)."
    )


def _direction_subtitle(repair: "DirectionRepair") -> str:
    if not repair.n_usable:
        return repair.verdict
    table: Any = repair.table
    won = [
        f"{version}, {layers}"
        for version, layers in table[table["wins"]][["version", "layers"]].itertuples(index=False)
    ]
    return (
        f"{len(repair.prompts)} held-out prompts. Bars: 95 % intervals; of random directions and shuffled labels the range. "
        f"Beats its controls in what it closes of the gap: {'; '.join(won) or 'nowhere'}."
    )
