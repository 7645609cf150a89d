"""A repair plan: which layers it keeps, by block and kind, and what was measured of it beside the same bytes spent otherwise."""

from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.loading.description import size
from tracelens.stats import Estimate
from tracelens.views.bands import errors
from tracelens.views.escaping import in_figure
from tracelens.views.style import CONTROL, INK, PAPER, QUANTIZED, REFERENCE, SERIES, TOWARDS, WHISKER, dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.causal.repair.plan_result import RepairPlan
    from tracelens.causal.repair.plan_units import Unit

BARS = {
    "plan": ("plan", TOWARDS),
    "random": ("random", CONTROL["noise"]),
    "magnitude": ("by error", CONTROL["permuted"]),
    "relative magnitude": ("by relative<br>error", SERIES[4]),
}
SHORT = 10
"""Characters of a kind of layer beyond which it is broken over lines."""
ROW = 34


def plan_figure(plan: "RepairPlan") -> "go.Figure":
    """Left: every linear layer that can be kept, coloured by its predicted recovery (by the relative size of its error where
    nothing was predicted); a frame and its bytes where it is kept. Right: measured recovery on the held-out prompts.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.16,
        subplot_titles=[_what(plan), "Measured recovery"],
    )
    if plan.units:
        _grid(figure, plan)
    if plan.outcome("plan") is not None:
        _bars(figure, plan)
    else:
        figure.add_annotation(x=0.5, xref="x2 domain", y=0.5, yref="y2 domain", text="nothing is kept")
    held = len(plan.held_out.tokens)
    title = f"Keep {len(plan.kept)} of {len(plan.units)} in 16 bit: {size(plan.bytes)} more than {in_figure(plan.quantized)}"
    subtitle = (
        f"Frames: kept in 16 bit, with bytes. Chosen by {plan.by} on {plan.n_choosing} prompts, measured on {held} others "
        f"({in_figure(plan.metric)}); whiskers: 95 % intervals over prompts. Dots: single random choices of the same bytes; the diamond "
        "is what was predicted."
    )
    n_layers = len({unit.layer for unit in plan.units})
    return dressed(figure.update_layout(showlegend=False), title, subtitle, 250 + max(ROW * n_layers, 180))


def _what(plan: "RepairPlan") -> str:
    return "Predicted recovery of each layer alone" if _predicted(plan) else "Relative size of each layer's error"


def _predicted(plan: "RepairPlan") -> bool:
    return not any(isnan(unit.gain) for unit in plan.units)


def _grid(figure: "go.Figure", plan: "RepairPlan") -> None:
    import plotly.graph_objects as go

    kinds, layers = list(dict.fromkeys(u.kind for u in plan.units)), sorted({u.layer for u in plan.units})
    predicted = _predicted(plan)
    values: list[list[float | None]] = [[None] * len(kinds) for _ in layers]
    hover = [[""] * len(kinds) for _ in layers]
    for i, unit in enumerate(plan.units):
        row, column = layers.index(unit.layer), kinds.index(unit.kind)
        values[row][column] = unit.gain if predicted else unit.relative_error
        hover[row][column] = _hover(unit, kept=i in plan.kept)
    largest = max((abs(v) for row in values for v in row if v is not None), default=1.0) or 1.0
    scale = (
        {"colorscale": "RdBu", "zmid": 0, "zmin": -largest, "zmax": largest}
        if predicted
        else {"colorscale": "Purples", "zmin": 0}
    )
    figure.add_trace(
        go.Heatmap(
            z=values,
            x=list(range(len(kinds))),
            y=layers,
            text=hover,
            hovertemplate="%{text}<extra></extra>",
            xgap=2,
            ygap=2,
            colorbar={"thickness": 10, "x": 0.545, "len": 0.9, "outlinewidth": 0, "tickfont": {"size": 10}},
            **scale,
        ),
        row=1,
        col=1,
    )
    for unit in plan.keep:
        x, y = kinds.index(unit.kind), unit.layer
        figure.add_shape(
            type="rect",
            x0=x - 0.46,
            x1=x + 0.46,
            y0=y - 0.44,
            y1=y + 0.44,
            line={"color": INK, "width": 2.5},
            row=1,
            col=1,
        )
        dark = predicted and abs(unit.gain) > 0.6 * largest
        figure.add_annotation(
            x=x,
            y=y,
            text=size(unit.bytes),
            font={"size": 10, "color": PAPER if dark else INK},
            bgcolor="rgba(0,0,0,0)",
            row=1,
            col=1,
        )
    ticks = [kind.replace(".", ".<br>").replace("+", "+<br>") if len(kind) > SHORT else kind for kind in kinds]
    figure.update_xaxes(
        tickvals=list(range(len(kinds))), ticktext=ticks, tickfont={"size": 10}, tickangle=0, row=1, col=1
    )
    figure.update_yaxes(title="layer", autorange="reversed", dtick=1 if len(layers) <= 16 else 4, row=1, col=1)


def _hover(unit: "Unit", *, kept: bool) -> str:
    gain = "" if isnan(unit.gain) else f"<br>predicted recovery alone {unit.gain:+.3f}"
    return (
        f"{in_figure(unit.name)}<br>{'kept in 16 bit' if kept else 'quantized'}{gain}<br>relative error {unit.relative_error:.3f}"
        f"<br>{size(unit.bytes)} to keep, {unit.n_weights:,} weights"
    )


def _bars(figure: "go.Figure", plan: "RepairPlan") -> None:
    import plotly.graph_objects as go

    found: dict[str, Estimate] = {"plan": plan.recovery, "random": plan.random_recovery}
    found |= {name: o.recovery for name in ("magnitude", "relative magnitude") if (o := plan.outcome(name)) is not None}
    names = [BARS[name][0] for name in found]
    place: Any = {"row": 1, "col": 2}
    figure.add_trace(
        go.Bar(
            x=names,
            y=[e.value for e in found.values()],
            marker={"color": [BARS[name][1] for name in found]},
            error_y=errors(list(found.values()), REFERENCE),
            text=[str(e) for e in found.values()],
            textposition="none",
            hovertemplate="%{x}: %{text}<extra></extra>",
        ),
        **place,
    )
    figure.add_trace(
        go.Scatter(
            x=[BARS["random"][0]] * len(plan.random),
            y=[outcome.recovery.value for outcome in plan.random],
            mode="markers",
            marker={"size": 6, "color": WHISKER, "line": {"color": PAPER, "width": 1}},
            text=[f"{outcome.name}: {outcome.recovery}" for outcome in plan.random],
            hovertemplate="%{text}<extra></extra>",
        ),
        **place,
    )
    if plan.predicted is not None:
        figure.add_trace(
            go.Scatter(
                x=[BARS["plan"][0]],
                y=[plan.predicted.value],
                mode="markers",
                marker={"size": 11, "symbol": "diamond", "color": PAPER, "line": {"width": 2, "color": INK}},
                hovertemplate=f"predicted: {plan.predicted}<extra></extra>",
            ),
            **place,
        )
    for level, colour, text, anchor in ((1.0, REFERENCE, "reference", "bottom"), (0.0, QUANTIZED, "quantized", "top")):
        figure.add_hline(y=level, line={"color": colour, "width": 1.5, "dash": "dot"}, row=1, col=2)  # pyright: ignore[reportArgumentType]
        figure.add_annotation(
            x=1,
            xref="x2 domain",
            xanchor="right",
            y=level,
            yref="y2",
            yanchor=anchor,
            text=text,
            font={"color": colour, "size": 11},
        )
    figure.update_xaxes(tickangle=0, tickfont={"size": 11}, row=1, col=2)
    figure.update_yaxes(title="recovery", row=1, col=2)
