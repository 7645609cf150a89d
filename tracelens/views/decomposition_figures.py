"""Waterfalls of a decomposition: what each step changes of every metric."""

from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.views.escaping import in_figure
from tracelens.views.style import REFERENCE, STEP, dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.studies.decomposition_result import Contribution, Decomposition

TITLES = {"compute": "compute", "weights": "weights", "activations": "activations", "kv_cache": "KV cache"}
METRICS = {
    "cpfr_safety": "CPFR, safety features",
    "cpfr_capability": "CPFR, capability features",
    "survived": "features that survived, share",
    "kl": "KL, nats per token",
    "perplexity": "perplexity",
    "flips": "flipped decisions, share",
    "margin": "mean margin, nats",
}
UNITS = {
    "cpfr_safety": "CPFR",
    "cpfr_capability": "CPFR",
    "survived": "share",
    "kl": "nats per token",
    "perplexity": "perplexity",
    "flips": "share",
    "margin": "nats",
}
COLUMNS, PANEL = 2, 230


def decomposition_figure(decomposition: "Decomposition") -> "go.Figure":
    """One panel for each metric: bars run from its value before a step to that after it, with the interval of the change."""
    from plotly.subplots import make_subplots

    metrics = [name for name in decomposition.metrics if not isnan(decomposition.start[name].value)]
    rows = max(1, -(-len(metrics) // COLUMNS))
    titles = [in_figure(METRICS.get(name, name)) for name in metrics]
    figure = make_subplots(
        rows=rows, cols=COLUMNS, subplot_titles=titles, vertical_spacing=0.28 / rows, horizontal_spacing=0.1
    )
    for i, metric in enumerate(metrics):
        place: dict[str, Any] = {"row": 1 + i // COLUMNS, "col": 1 + i % COLUMNS}
        start = decomposition.start[metric].value
        figure.add_trace(_level(start), **place)
        before, ends = start, [start]
        for step, found in decomposition.of(metric).items():
            figure.add_trace(_bar(step, before, found, show=i == 0), **place)
            ends += [found.value.value, before + found.change.low, before + found.change.high]
            before = found.value.value
        figure.update_yaxes(range=_range(ends), title_text=UNITS.get(metric, metric), **place)
    if not metrics:
        figure.add_annotation(x=0.5, xref="paper", y=0.5, yref="paper", text="no metric could be measured")
    title = f"What each step to {in_figure(decomposition.precision)} changes of {in_figure(decomposition.reference)}"
    subtitle = (
        "Bars run from the value before a step to that after it; whiskers: 95 % intervals of the change over prompts."
    )
    figure.update_xaxes(tickangle=0, tickfont={"size": 10})
    figure.update_layout(barmode="overlay", showlegend=False, bargap=0.35)
    return dressed(figure, title, subtitle, 160 + PANEL * rows)


def _level(start: float) -> "go.Scatter":
    import plotly.graph_objects as go

    hover = "reference: %{y:.4g}<extra></extra>"
    marker = {"symbol": "line-ew", "size": 22, "line": {"width": 3, "color": REFERENCE}}
    return go.Scatter(x=["reference"], y=[start], mode="markers", marker=marker, hovertemplate=hover)


def _bar(step: str, before: float, found: "Contribution", *, show: bool) -> "go.Bar":
    import plotly.graph_objects as go

    change = found.change
    p = "" if found.p is None else f"<br>p = {found.p:.3g} (sign flips)"
    interval = f"{change.value:+.4g} [{change.low:+.4g}, {change.high:+.4g}]"
    text = f"{TITLES.get(step, step)}<br>{interval}{p}<br>after it: {found.value.value:.4g}"
    return go.Bar(
        x=[TITLES.get(step, step)],
        y=[change.value],
        base=[before],
        marker={"color": STEP.get(step, REFERENCE)},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, change.high - change.value)],
            "arrayminus": [max(0.0, change.value - change.low)],
            "thickness": 2,
            "width": 5,
            "color": REFERENCE,
        },
        hovertemplate=f"{text}<extra></extra>",
        name=TITLES.get(step, step),
        showlegend=show,
    )


def _range(ends: list[float]) -> list[float]:
    """Around the values and not from 0: a CPFR that falls from 1 to .99 is to be seen."""
    finite = [end for end in ends if not isnan(end)]
    low, high = min(finite), max(finite)
    if low == high == 0:
        return [-0.005, 0.05]
    room = 0.08 * (high - low) or 0.05 * max(1.0, abs(high))
    return [low - room, high + room]
