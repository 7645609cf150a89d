"""Figures of muting: thresholds on a ladder of precisions, and causes."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.sites import Site
from tracelens.views.escaping import in_figure
from tracelens.views.style import CAPABILITY, CAUSE, CHOSEN, CONTROL, SAFETY, dressed, template, translucent

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.studies.muting import MutingThresholds
    from tracelens.studies.muting_causes import MutingTrace

MOVED, CLIPPED = "#56B4E9", "#CC79A7"
HEIGHT = 460
DARK = "#3A4049"
"""Of a feature that is silent, on either paper."""
STATES = {
    "safety, fires": SAFETY,
    "capability, fires": CAPABILITY,
    "muted": DARK,
    "muted, it moved": CAUSE["moved"],
    "muted, clipped": CAUSE["clipped"],
    "chosen": CHOSEN,
    "": "rgba(0, 0, 0, 0)",
}
"""What a cell of the mosaic shows → its colour; the last, that there is no feature."""


def thresholds_figure(thresholds: "MutingThresholds") -> "go.Figure":
    """The share of live features that are muted against bits: safety and capability, over the random sets and the noise."""
    import plotly.graph_objects as go

    shares: Any = thresholds.shares
    figure = go.Figure(_share_traces(shares))
    bits = shares.drop_duplicates("precision")
    ticks = [f"<b>{in_figure(p)}</b><br>{b:.3g} bits" for p, b in zip(bits["precision"], bits["bits"], strict=True)]
    figure.update_xaxes(
        tickvals=bits["bits"].tolist(),
        ticktext=ticks,
        autorange="reversed",
        title_text="bits per weight, scales included",
    )
    top = max(0.01, shares["share"].max(), shares["high"].max())
    figure.update_yaxes(
        title_text="muted features", tickformat=".0%" if top > 0.03 else ".1%", range=[-0.03 * top, 1.06 * top]
    )
    c = thresholds.comparison
    subtitle = (
        f"Muted: silent on at least {100 * thresholds.muted_at:g} % of the tokens on which the reference fires it. {c.n_safety} safety and "
        f"{c.n_capability} capability features; bars and band: 95 % intervals."
    )
    figure.update_layout(legend_traceorder="reversed")
    return dressed(figure, "Features that fall silent with fewer bits", subtitle, HEIGHT, legend_rows=2)


def shares_panel(thresholds: "MutingThresholds", *, height: int = 178) -> "go.Figure":
    """`thresholds_figure` without its titles, small, on a plain axis of bits."""
    import plotly.graph_objects as go

    shares: Any = thresholds.shares
    figure = go.Figure(_share_traces(shares))
    top = _largest([0.01, *shares["share"], *shares["high"]])
    figure.update_xaxes(title_text="bits per weight", range=[16.5, 1.5])
    figure.update_yaxes(title_text="muted", tickformat=".0%" if top > 0.03 else ".1%", range=[-0.04 * top, 1.08 * top])
    return _panel(figure, height)


def mosaic_panel(safety: np.ndarray, capability: np.ndarray, *, height: int = 285) -> "go.Figure":
    """One cell per feature, safety features above; colours as in `STATES`.

    Args:
        safety, capability: index into `STATES`; [row, column].
    """
    from plotly.subplots import make_subplots

    both = bool(safety.size)
    figure = make_subplots(
        rows=2, cols=1, row_heights=[0.36, 0.64] if both else [0.08, 0.92], vertical_spacing=0.13,
        subplot_titles=("safety features" if both else "no live safety feature", "capability features"),
    )  # fmt: skip
    for row, z in enumerate((safety, capability), 1):
        figure.add_trace(_cells(z), row=row, col=1)
        figure.update_yaxes(autorange="reversed", row=row, col=1)
    figure.update_xaxes(visible=False, fixedrange=True)
    figure.update_yaxes(visible=False, fixedrange=True)
    _panel(figure, height).update_annotations(x=0, xanchor="left", font_size=12)
    return figure.update_layout(margin={"l": 8, "r": 8, "t": 20, "b": 4})


def curve_panel(
    name: str,
    bits: Sequence[float],
    rate: np.ndarray,
    interval: np.ndarray,
    others: np.ndarray,
    muted_at: float,
    *,
    colour: str = SAFETY,
    height: int = 178,
) -> "go.Figure":
    """One feature's muting rate against bits with its interval, over other features of its site.

    Args:
        rate: [precision]; interval: its low and high end, [2, precision].
        others: rates of other features, [precision, feature].
    """
    import plotly.graph_objects as go

    x, n = np.asarray(bits, float), others.shape[1]
    gap = np.full((1, n), np.nan)
    faint = np.concatenate([others, gap]).T.ravel()
    low, high = interval
    errors = {
        "type": "data",
        "symmetric": False,
        "array": high - rate,
        "arrayminus": rate - low,
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }
    figure = go.Figure(
        [
            go.Scatter(
                x=np.tile(np.append(x, np.nan), n), y=faint, mode="lines", name="others of its site", hoverinfo="skip",
                line={"color": translucent(CONTROL["noise"], 0.25), "width": 1},
            ),
            go.Scatter(
                x=x, y=rate, error_y=errors, mode="lines+markers", name=in_figure(name), line={"color": colour, "width": 2.5},
                marker={"size": 8, "color": colour}, hovertemplate="%{y:.1%} at %{x:g} bits<extra></extra>", cliponaxis=False,
            ),
            go.Scatter(
                x=[16.5, 1.5], y=[muted_at, muted_at], mode="lines", name=f"muted: {muted_at:.0%}", hoverinfo="skip",
                line={"color": CONTROL["noise"], "width": 1.5, "dash": "dot"},
            ),
        ]
    )  # fmt: skip
    figure.update_xaxes(title_text="bits per weight", range=[16.5, 1.5])
    figure.update_yaxes(title_text="muting rate", tickformat=".0%", range=[-0.04, 1.05])
    return _panel(figure, height)


def at_bits(bits: float) -> list[dict[str, Any]]:
    """A line at the current number of bits."""
    line = {"color": CHOSEN, "width": 2}
    return [
        {
            "type": "line",
            "x0": bits,
            "x1": bits,
            "y0": 0,
            "y1": 1,
            "xref": "x",
            "yref": "paper",
            "line": line,
            "layer": "below",
        }
    ]


def causes_figure(trace: "MutingTrace") -> "go.Figure":
    """Muted firings of each site by cause; beside them, what an integer grid of so many bits would clip."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.16)
    sums: Any = trace.table.groupby("site")[["n_active", "n_moved", "n_clipped"]].sum()
    names = {"moved": f"the {trace.unit} itself moved", "clipped": "the format clipped it"}
    ticks, where = _places(sums.index)
    for (name, title), colour in zip(names.items(), (MOVED, CLIPPED), strict=True):
        share = sums[f"n_{name}"] / sums["n_active"]
        bar = go.Bar(
            x=ticks,
            y=share.tolist(),
            name=title,
            marker={"color": colour, "line_width": 0},
            hovertemplate="%{x}<br>" + title + ": %{y:.1%} of the firings<extra></extra>",
        )
        figure.add_trace(bar, row=1, col=1)
    profile: Any = trace.clipping
    figure.add_trace(
        go.Scatter(
            x=profile["bits"],
            y=profile["firings_clipped"],
            mode="lines+markers",
            name="firings that a grid would clip",
            line={"color": CONTROL["noise"], "width": 2, "dash": "dot"},
        ),
        row=1,
        col=2,
    )
    muted = profile.rename(columns={"units_muted": "share"})
    figure.add_trace(_line(muted, f"{trace.unit}s that it would mute", CLIPPED, "solid", "circle"), row=1, col=2)
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title_text="firings that are silenced", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text=where, type="category", tickangle=0, row=1, col=1)
    figure.update_yaxes(
        title_text="share, from the reference alone", tickformat=".0%", range=[-0.02, 1.05], row=1, col=2
    )
    figure.update_xaxes(
        title_text=f"bits of a grid with one scale per {trace.scale}", autorange="reversed", dtick=1, row=1, col=2
    )
    subtitle = f"{len(trace.table)} live {trace.unit}s, {trace.n_tokens} tokens; a {trace.unit} fires above {in_figure(trace.fires_above)}."
    figure.update_traces(legend="legend2", col=2)
    house: Any = template().layout
    legend = house.legend.to_plotly_json() | {"traceorder": "normal", "orientation": "v", "y": 1}
    figure.update_layout(legend=legend, legend2=legend | {"x": 0.58})
    return dressed(
        figure, f"Why {trace.unit}s fall silent in {in_figure(trace.label)}", subtitle, HEIGHT, legend_rows=2
    )


def _share_traces(shares: Any) -> list["go.Scatter"]:
    """Safety and capability, over the random sets and the noise."""
    random = shares[shares["set"] == "random"]
    traces = _band(random, CONTROL["random"], "random features") if len(random) else []
    looks = [
        ("capability, noise", "capability features, matched noise", CAPABILITY, "dash", "square-open"),
        ("safety, noise", "safety features, matched noise", SAFETY, "dash", "circle-open"),
        ("capability", "capability features", CAPABILITY, "solid", "square"),
        ("safety", "safety features", SAFETY, "solid", "circle"),
    ]
    for shift, (name, title, colour, dash, symbol) in zip((-0.016, 0.008, -0.008, 0.0), looks, strict=True):
        rows = shares[shares["set"] == name]
        if len(rows):
            aside = shift * (shares["bits"].max() - shares["bits"].min())
            traces.append(_line(rows.assign(bits=rows["bits"] + aside), title, colour, dash, symbol))
    return traces


def _cells(z: np.ndarray) -> "go.Heatmap":
    import plotly.graph_objects as go

    colours = list(STATES.values())
    # Both ends of each colour's part; the last must be 1 to the digit, or plotly takes a scale of its own.
    steps = [((k + end) / len(colours), colour) for k, colour in enumerate(colours) for end in (0, 1)]
    gap = 1 if z.size < 3_000 else 0
    return go.Heatmap(
        z=z,
        zmin=-0.5,
        zmax=len(colours) - 0.5,
        colorscale=steps,
        showscale=False,
        hoverongaps=False,
        xgap=gap,
        ygap=gap,
        hoverinfo="none",
    )


def _largest(values: Iterable[float]) -> float:
    return max(float(v) for v in values if v == v)


def _panel(figure: "go.Figure", height: int) -> "go.Figure":
    margin = {"l": 56, "r": 12, "t": 26, "b": 38}
    return figure.update_layout(
        template=template(), height=height, margin=margin, legend={"y": 1.0, "font": {"size": 10}}
    )


def _places(sites: Iterable[str]) -> tuple[list[str], str]:
    """Ticks and title of an axis of sites: their layers, and the name beside it only where they have several."""
    parsed = [Site.parse(site) for site in sites]
    if len(names := {site.name for site in parsed}) == 1:
        return [str(site.layer) for site in parsed], f"layer ({names.pop()})"
    return [f"{site.layer}<br>{site.name}" for site in parsed], "layer and site"


def _band(rows: Any, colour: str, name: str) -> list["go.Scatter"]:
    import plotly.graph_objects as go

    x = rows["bits"].tolist()
    edge = {"x": [*x, *reversed(x)], "y": [*rows["high"], *reversed(rows["low"].tolist())]}
    shared: dict[str, Any] = {"mode": "lines", "legendgroup": name, "name": name}
    return [
        go.Scatter(
            **edge, **shared, fill="toself", fillcolor=translucent(colour, 0.22), line_width=0, showlegend=False
        ),
        go.Scatter(x=x, y=rows["share"], **shared, line={"color": colour, "width": 2, "dash": "dot"}),
    ]


def _line(rows: Any, name: str, colour: str, dash: str, symbol: str) -> "go.Scatter":
    import plotly.graph_objects as go

    errors = {"array": rows["high"] - rows["share"], "arrayminus": rows["share"] - rows["low"]}
    return go.Scatter(
        x=rows["bits"],
        y=rows["share"],
        error_y={"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 4, **errors},
        mode="lines+markers",
        name=name,
        line={"color": colour, "width": 2.5, "dash": dash},
        marker={"size": 9, "color": colour, "symbol": symbol},
        cliponaxis=False,
        hovertemplate=name + ": %{y:.1%} at %{x:g} bits<extra></extra>",
    )
