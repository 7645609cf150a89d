"""Figures: one function each, a result in, a plotly figure out. Nothing is shown, read or run here.

Colours mean the same everywhere: safety and capability features, reference and quantized model, and each control.
Text that comes from a report (labels, behaviours, sites) is escaped, because plotly reads tags in text.
"""

from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.stats import Estimate
from tracelens.views.bands import column_bands, errors, in_percent, line, row_bands
from tracelens.views.escaping import in_figure
from tracelens.views.numbers import CONTROLS, feature_sets, interval, set_title
from tracelens.views.style import CAPABILITY, CONTROL, FLIP, PAPER, QUIET, SAFETY, dressed, template, translucent
from tracelens.views.text import material

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.audit_report import AuditReport
    from tracelens.optimization_auditor import SweepResult

GL_FROM = 10_000
"""Features from which points are drawn by WebGL: SVG is sharper, but slow beyond."""
POINTS = 20_000
"""Features that are drawn at most: all safety features, the worst of the others, and of the rest as many as fit, at random."""
WORST = 0.25
"""Share of the points that is kept for the worst features."""
HOVER = "%{text}<br>fidelity %{y:.3f}, correlation %{customdata[0]:.3f}<br>muted on %{customdata[1]:.0%} of %{x:,} tokens<extra></extra>"
BINS = 40
REACH = 0.36
"""How far a set's row reaches up and down; its controls have a lane each."""
SCATTER, DECAY, FLIPS, GAP, ROW = 360, 340, 190, 90, 56
"""Heights of panels, of the gap between two of them, and of a set's row, in pixels."""


def audit_figure(report: "AuditReport", max_points: int = POINTS) -> "go.Figure":
    """CPFRs with intervals over the bands of their controls; below, each live feature's fidelity against how often it fires.

    Of more than `max_points` features a sample is drawn (`sampled`), and the subtitle says so; histograms and numbers are of all.
    """
    from plotly.subplots import make_subplots

    strip = ROW * len(report.cpfr)
    inner = strip + GAP + SCATTER
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=[strip, SCATTER],
        column_widths=[0.84, 0.16],
        vertical_spacing=GAP / inner,
        horizontal_spacing=0.015,
    )
    _draw_cpfrs(figure, report)
    shown = sampled(report.features, max_points)
    _draw_features(figure, report, shown)
    marks = "Bars and bands: 95 % intervals."
    if (left := len(report.features) - len(shown)) > 0:
        marks += (
            f" Points: {len(shown):,} features; {left:,} others that are not among the worst are left out at random."
        )
    title = f"What {in_figure(report.label)} preserves of {in_figure(report.reference)}"
    _dress(figure, title, report, inner, marks, above_second=SCATTER / inner)
    return figure


def sweep_figure(sweep: "SweepResult") -> "go.Figure":
    """Decay of safety and capability CPFR with bits per weight, over the bands of the controls; below, the flips both ways."""
    from plotly.subplots import make_subplots

    entries = sorted(sweep.bits.items(), key=lambda entry: (isnan(entry[1]), -entry[1]))
    reports = [sweep.reports[name] for name, _ in entries]
    bits = ["bits not known" if isnan(b) else f"{b:.3g} bits" for _, b in entries]
    gap = GAP // 2  # no axis title in between
    inner = DECAY + gap + FLIPS
    figure = make_subplots(rows=2, cols=1, row_heights=[DECAY, FLIPS], vertical_spacing=gap / inner)
    _draw_decay(figure, reports)
    _draw_flips(figure, reports)
    ticks = [f"<b>{in_figure(r.label)}</b><br>{b}" for r, b in zip(reports, bits, strict=True)]
    figure.update_xaxes(tickvals=list(range(len(reports))), ticktext=ticks, range=[-0.4, len(reports) - 0.6])
    figure.update_xaxes(title_text="precision (bits per weight, scales included)", row=2, col=1)
    figure.update_xaxes(showticklabels=False, ticks="", row=1, col=1)
    title = f"What fewer bits preserve of {in_figure(reports[0].reference)}"
    marks = "Bands: the safety features in each control, and other sets of as many. Bars and bands: 95 % intervals."
    _dress(figure, title, reports[0], inner, marks, above_second=FLIPS / inner)
    return figure


def sampled(features: "pd.DataFrame", max_points: int = POINTS, seed: int = 0) -> "pd.DataFrame":
    """At most so many rows of a report's features, in their order: all safety features, the worst, others at random.

    Safety features are all kept, even if there are more of them than that.
    """
    import numpy as np

    if len(features) <= max_points:
        return features
    kept = (features["behaviour"] != "capability").to_numpy(copy=True)
    room = max(0, max_points - int(kept.sum()))
    others = np.flatnonzero(~kept)
    worst, rest = np.split(others, [int(WORST * room)])  # rows stand worst first
    kept[worst] = True
    kept[np.random.default_rng(seed).choice(rest, min(len(rest), room - len(worst)), replace=False)] = True
    return features.loc[kept]


def _dress(
    figure: "go.Figure", title: str, report: "AuditReport", inner: int, marks: str, *, above_second: float
) -> None:
    """Template, titles, height (for `inner` pixels of panels), and a legend above each of the two panels."""
    subtitle = f"{in_figure(material(report))} {marks}"
    subtitle = subtitle[0].upper() + subtitle[1:]
    house: Any = template().layout
    dressed(figure, title, subtitle, inner + house.margin.t + house.margin.b, legend_rows=2)
    figure.update_layout(legend2=house.legend.to_plotly_json() | {"y": above_second})


def _draw_cpfrs(figure: "go.Figure", report: "AuditReport") -> None:
    counts = feature_sets(report)
    names = list(counts)
    ends = []
    shown = [control for control in CONTROLS if control in report.controls]
    for lane, control in enumerate(shown):
        found = report.controls[control].cpfr
        height = 2 * REACH / len(shown)
        bands = [
            (i - REACH + lane * height, i - REACH + (lane + 1) * height, found[name])
            for i, name in enumerate(names)
            if name in found and not isnan(found[name].value)
        ]
        ends += [end for *_, e in bands for end in (e.value, e.low, e.high)]
        for trace in row_bands(bands, control, CONTROLS[control]):
            figure.add_trace(trace, row=1, col=1)
    for i, name in enumerate(names):
        estimate = report.cpfr[name]
        if not isnan(estimate.value):
            ends += [estimate.value, estimate.low, estimate.high]
            figure.add_trace(_point(i, estimate, name, in_figure(report.label)), row=1, col=1)
    titles = [
        f"{in_figure(set_title(name).strip())} ({n})<br><b>{interval(report.cpfr[name])}</b>"
        for name, n in counts.items()
    ]
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=titles, range=[len(names) - 0.4, -0.6], showgrid=False, row=1, col=1
    )
    ends = [end for end in ends if not isnan(end)]
    low, high = min([0.9, *ends]), max([1, *ends])
    figure.update_xaxes(
        title_text="CPFR: mean fidelity of a set of features (1 = unchanged)",
        range=[low - 0.03 * (high - low), high + 0.01 * (high - low)],
        row=1,
        col=1,
    )


def _point(row: int, estimate: Estimate, name: str, label: str) -> "go.Scatter":
    import plotly.graph_objects as go

    colour = CAPABILITY if name == "capability" else SAFETY
    part = name not in ("safety", "capability")
    return go.Scatter(
        x=[estimate.value],
        y=[row],
        error_x=errors([estimate], colour),
        mode="markers",
        marker={
            "size": 8 if part else 11,
            "color": colour,
            "symbol": "circle-open" if part else "circle",
            "line": {"color": colour, "width": 2},
        },
        hovertemplate=f"{label}, {in_figure(set_title(name).strip())}<br>CPFR {interval(estimate)}<extra></extra>",
        showlegend=False,
    )


def _draw_features(figure: "go.Figure", report: "AuditReport", shown: Any) -> None:
    import numpy as np
    import plotly.graph_objects as go

    everything: Any = report.features
    kind = go.Scattergl if len(shown) > GL_FROM else go.Scatter
    safety = shown["behaviour"] != "capability"
    whole = everything["behaviour"] != "capability"
    # Few and the point of it all: safety features are drawn last, larger and outlined.
    looks = [
        (~safety, ~whole, "capability features", {"size": 5, "color": CAPABILITY, "opacity": 0.45}),
        (
            safety,
            whole,
            "safety features",
            {"size": 9, "color": SAFETY, "opacity": 0.95, "line": {"color": PAPER, "width": 1}},
        ),
    ]
    for chosen, among_all, name, marker in looks:
        rows = shown[chosen]
        if not len(rows):
            continue
        figure.add_trace(
            kind(
                x=rows["n_active"],
                y=rows["fidelity"],
                mode="markers",
                name=name,
                legendgroup=name,
                marker=marker,
                legend="legend2",
                text=_hover(rows),
                customdata=rows[["correlation", "muting_rate"]].to_numpy(np.float32),
                hovertemplate=HOVER,
            ),
            row=2,
            col=1,
        )
        figure.add_trace(
            _margin_histogram(everything[among_all]["fidelity"].to_numpy(), marker["color"], name), row=2, col=2
        )
    threshold = report.settings["degradation_threshold"]
    figure.add_hline(y=threshold, line={"color": QUIET, "width": 1, "dash": "dot"}, row=2, col=1)  # pyright: ignore[reportArgumentType]
    figure.add_annotation(
        x=0,
        xref="x2 domain",
        y=threshold,
        yref="y2",
        text=f"degraded below {threshold:g}",
        xanchor="left",
        yanchor="top",
    )
    figure.update_xaxes(
        type="log", dtick=1, tickformat=",d", title_text="tokens on which the reference fires it", row=2, col=1
    )
    figure.update_yaxes(title_text="fidelity (1 = unchanged)", range=[-0.03, 1.04], row=2, col=1)
    figure.update_yaxes(range=[-0.03, 1.04], showticklabels=False, ticks="", row=2, col=2)
    figure.update_xaxes(title_text="share", tickformat=".0%", nticks=3, row=2, col=2)
    figure.update_layout(barmode="overlay")


def _hover(rows: Any) -> list[str]:
    return [
        f"<b>#{row.feature}</b> {in_figure(row.behaviour)}, {in_figure(row.survival) or 'constant'}<br>{in_figure(row.site)}"
        for row in rows.itertuples()
    ]


def _margin_histogram(fidelity: Any, colour: str, name: str) -> "go.Bar":
    """Shares of the features by fidelity, as bars along the fidelity axis."""
    import numpy as np
    import plotly.graph_objects as go

    counts, edges = np.histogram(fidelity, bins=BINS, range=(0, 1))
    return go.Bar(
        x=counts / counts.sum(),
        y=(edges[1:] + edges[:-1]) / 2,
        width=1 / BINS,
        orientation="h",
        marker={"color": translucent(colour, 0.55), "line_width": 0},
        legendgroup=name,
        showlegend=False,
        hovertemplate=f"%{{x:.1%}} of the {name}<br>around fidelity %{{y:.2f}}<extra></extra>",
    )


def _draw_decay(figure: "go.Figure", reports: list["AuditReport"]) -> None:
    for control, title in CONTROLS.items():
        points: list[Any] = [(i, r.controls[control]["safety"]) for i, r in enumerate(reports) if control in r.controls]
        for trace in column_bands(points, control, title):
            figure.add_trace(trace, row=1, col=1)
    for name, colour, symbol in (("capability", CAPABILITY, "square"), ("safety", SAFETY, "circle")):
        estimates = [(i, r.cpfr[name]) for i, r in enumerate(reports)]
        figure.add_trace(line(estimates, f"{name} features", colour, symbol).update(legendrank=1), row=1, col=1)
    figure.update_yaxes(title_text="CPFR (1 = unchanged)", row=1, col=1)


def _draw_flips(figure: "go.Figure", reports: list["AuditReport"]) -> None:
    noise = [
        (i - 0.1, c.flips) for i, r in enumerate(reports) if (c := r.controls.get("noise")) is not None and c.flips
    ]
    series = [
        (noise, "both ways, matched noise", CONTROL["noise"], "diamond"),
        ([(i, r.flips.refuse_to_comply) for i, r in enumerate(reports) if r.flips], "refuse→comply", None, "triangle-down"),
        ([(i + 0.1, r.flips.comply_to_refuse) for i, r in enumerate(reports) if r.flips], "comply→refuse", None, "triangle-up"),
    ]  # fmt: skip
    for points, name, colour, symbol in series:
        if points:
            trace = line([(x, in_percent(e)) for x, e in points], name, colour or FLIP[name], symbol)
            figure.add_trace(trace.update(mode="markers", legend="legend2"), row=2, col=1)
    if not any(points for points, *_ in series):
        figure.add_annotation(x=0.5, xref="x2 domain", y=0.5, yref="y2 domain", text="no prompt's decision can be read")
    # Room below 0, so that a marker at no flips is seen whole.
    top = max([1.0, *(100 * e.high for points, *_ in series for _, e in points if not isnan(e.high))])
    figure.update_yaxes(title_text="flipped decisions (%)", range=[-0.07 * top, 1.05 * top], row=2, col=1)
