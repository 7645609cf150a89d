"""Figures of what happens to features: survival against bits, overlap of damage, prediction of survival."""

from collections.abc import Sequence
from math import isnan, log10
from typing import TYPE_CHECKING, Any

from tracelens.metrics.survival import CLASSES
from tracelens.stats import Estimate
from tracelens.views.escaping import in_figure
from tracelens.views.style import CONTROL, PREDICTOR, QUANTIZED, REFERENCE, SURVIVAL, dressed, translucent

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.studies.forecast_check import ForecastCheck
    from tracelens.studies.overlap import DamageOverlap
    from tracelens.studies.prediction import SurvivalPrediction
    from tracelens.studies.survival import FeatureSet, SurvivalCurve

PREDICTORS = {
    "peak": "peak activation",
    "mean": "mean activation",
    "mean_active": "mean when active",
    "firing_rate": "firing rate",
    "decoder_norm": "decoder norm",
    "nearest_cosine": "nearest neighbour",
    "layer": "layer",
}
GL_FROM = 10_000


def survival_figure(curve: "SurvivalCurve", features: "FeatureSet" = "all") -> "go.Figure":
    """Shares of survived, blurred and damaged features against bits per weight; perplexity below."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, row_heights=[0.6, 0.4], vertical_spacing=0.05)
    draw_survival(figure, curve, features, 1, 1)
    figure.update_xaxes(showticklabels=False, ticks="", title_text="", row=1, col=1)
    draw_perplexity(figure, curve, 2, 1)
    rows = curve.of(features)
    n = int(rows["n"].iloc[0])
    title = f"What fewer bits leave of the features of {in_figure(curve.reference)}"
    which = {"all": "live", "safety": "live safety", "capability": "live capability"}[features]
    return in_order(figure, title, f"{n} {which} features. {class_bounds(curve)} Bars: 95 % intervals.", 560)


def overlap_figure(overlap: "DamageOverlap") -> "go.Figure":
    """Damage 1 − ρ of each feature by either treatment, on logarithmic axes, with the thresholds of damage."""
    import plotly.graph_objects as go

    figure = go.Figure()
    table = overlap.table
    cut = 1 - overlap.damaged_at
    both = (table["damage_a"] > cut) & (table["damage_b"] > cut)
    either = (table["damage_a"] > cut) | (table["damage_b"] > cut)
    scatter = go.Scattergl if len(table) >= GL_FROM else go.Scatter
    groups = [
        ("damaged by neither", ~either, SURVIVAL["survived"]),
        ("damaged by one", either & ~both, SURVIVAL["blurred"]),
        ("damaged by both", both, SURVIVAL["damaged"]),
    ]
    for name, mask, colour in groups:
        rows = table.loc[mask]
        figure.add_trace(
            scatter(
                x=rows["damage_a"].to_numpy(float).clip(1e-6),
                y=rows["damage_b"].to_numpy(float).clip(1e-6),
                mode="markers",
                marker={"size": 5, "color": translucent(colour, 0.7)},
                name=f"{name} ({len(rows)})",
                text=[f"#{i} {in_figure(str(b))}" for i, b in zip(rows["feature"], rows["behaviour"], strict=True)],
                hovertemplate="%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
            )
        )
    line: Any = {"color": REFERENCE, "width": 1, "dash": "dot"}
    figure.add_hline(y=cut, line=line)
    figure.add_vline(x=cut, line=line)
    a, b = in_figure(overlap.label_a), in_figure(overlap.label_b)
    powers: Any = {
        "tickvals": [10.0**n for n in range(-6, 1)],
        "ticktext": ["10⁻⁶", "10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1", "1"],
    }
    figure.update_xaxes(type="log", title_text=f"damage 1 − ρ by {a} (10⁻⁶ and less drawn at 10⁻⁶)", **powers)
    figure.update_yaxes(type="log", title_text=f"damage 1 − ρ by {b}", **powers)
    subtitle = f"Jaccard {overlap.jaccard} (by chance {overlap.sets.chance:.3f}, at the same firing rates {overlap.matched.chance:.3f}); "
    return in_order(
        figure, f"Features that are damaged: {a} against {b}", f"{subtitle}Spearman {overlap.spearman}", 520
    )


def prediction_figure(prediction: "SurvivalPrediction") -> "go.Figure":
    """AUC of the model, of its control and of each predictor alone, as bars from .5."""
    import plotly.graph_objects as go

    rows = [("all together, out of fold", prediction.auc, SURVIVAL["survived"])]
    rows += [("survival shuffled", prediction.permuted, CONTROL["noise"])]
    strongest = sorted(prediction.single.items(), key=lambda item: -abs(item[1].value - 0.5))
    rows += [(PREDICTORS.get(name, name), estimate, PREDICTOR) for name, estimate in strongest]
    rows = [row for row in rows if not isnan(row[1].value)]
    figure = go.Figure()
    figure.add_trace(
        go.Bar(
            x=[e.value - 0.5 for _, e, _ in rows],
            base=0.5,
            y=[name for name, _, _ in rows],
            orientation="h",
            marker_color=[colour for _, _, colour in rows],
            error_x=errors_of([e for _, e, _ in rows]),
            text=[f"{e.value:.3f}" for _, e, _ in rows],
            hovertemplate="%{y}: %{text}<extra></extra>",
            textposition="none",
        )
    )
    if prediction.reason:
        figure.add_annotation(x=0.5, xref="paper", y=0.5, yref="paper", text=in_figure(prediction.reason))
    figure.update_xaxes(range=[0, 1], title_text="AUC (.5 = chance; below, features with more of it survive less)")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    label = in_figure(prediction.label)
    what = f"survive {label}" if prediction.target == "survived" else f"{label} does not damage"
    title = f"Which features {what}, told from the reference alone"
    subtitle = (
        f"{prediction.n_true} of {prediction.n} live features reach ρ ≥ {prediction.threshold:g}. Bars: 95 % intervals."
    )
    return in_order(figure, title, subtitle, 140 + 34 * max(3, len(rows)))


def forecast_figure(check: "ForecastCheck") -> "go.Figure":
    """Measured shares of survivors, and those that were forecast from the other precisions."""
    import plotly.graph_objects as go

    table = check.table
    x = list(range(len(table)))
    figure = go.Figure()
    measured = _estimates(table, "measured")
    figure.add_trace(line_of(x, measured, "measured", SURVIVAL["survived"]))
    hollow = ["circle-open" if outside else "circle" for outside in table["extrapolated"]]
    trace = line_of(x, [Estimate(v, v, v) for v in table["forecast"]], "forecast from the others", REFERENCE)
    figure.add_trace(trace.update(marker={"symbol": hollow, "size": 11}, line_dash="dash", error_y=None))
    _precision_axis(figure, table)
    figure.update_yaxes(range=[-0.03, 1.04], tickformat=".0%", title_text=f"features {check.target}")
    subtitle = (
        f"ρ ≥ {check.threshold:g}. Hollow: the weight error lies outside of those that the forecast was fitted on."
    )
    return in_order(figure, "Survival forecast before a precision is run", subtitle, 460)


def draw_survival(figure: "go.Figure", curve: "SurvivalCurve", features: "FeatureSet", row: int, col: int) -> None:
    import plotly.graph_objects as go

    table = curve.of(features)
    x = list(range(len(table)))
    for name in CLASSES:
        estimates = _estimates(table, name)
        figure.add_trace(
            go.Bar(
                x=x,
                y=[e.value for e in estimates],
                name=name,
                marker_color=SURVIVAL[name],
                text=[str(e) for e in estimates],
                textposition="none",
                hovertemplate=f"{name}: %{{text}}<extra></extra>",
            ),
            row=row,
            col=col,
        )
    figure.update_layout(barmode="stack")
    # Bars hide the upper ends of the intervals of those below them.
    own = line_of(x, _estimates(table, "survived"), "survived: 95 % interval", REFERENCE).update(mode="markers")
    figure.add_trace(own.update(marker={"symbol": "line-ew", "size": 1}, showlegend=False), row=row, col=col)
    controls = (("noise", "survived, matched noise", 0.2), ("permuted", "survived, permuted error", 0.3))
    for control, title, aside in controls:
        estimates = _estimates(table, f"{control}_survived")
        if any(not isnan(e.value) for e in estimates):
            trace = line_of([place + aside for place in x], estimates, title, CONTROL[control]).update(mode="markers")
            marker = {
                "symbol": "diamond",
                "size": 10,
                "color": CONTROL[control],
                "line": {"color": "white", "width": 1.5},
            }
            figure.add_trace(trace.update(marker=marker, cliponaxis=False), row=row, col=col)
    _precision_axis(figure, table, row=row, col=col)
    figure.update_yaxes(tickformat=".0%", range=[0, 1], title_text="features", row=row, col=col)


def draw_perplexity(figure: "go.Figure", curve: "SurvivalCurve", row: int, col: int) -> None:
    table = curve.table.drop_duplicates("precision")
    x = list(range(len(table)))
    trace = line_of(x, _estimates(table, "perplexity"), "quantized", QUANTIZED)
    figure.add_trace(trace.update(showlegend=False), row=row, col=col)
    reference = float(table["perplexity_reference"].iloc[0])
    line: Any = {"color": REFERENCE, "width": 1.5, "dash": "dot"}
    figure.add_hline(y=reference, line=line, row=row, col=col)  # pyright: ignore[reportArgumentType]
    note = f"reference {reference:.2f}"
    figure.add_annotation(
        x=len(x) - 0.42, y=log10(reference), text=note, xanchor="right", yanchor="bottom", row=row, col=col
    )
    _precision_axis(figure, table, row=row, col=col)
    figure.update_yaxes(type="log", title_text="perplexity", tickformat=".3~g", row=row, col=col)


def _precision_axis(figure: "go.Figure", table: Any, **where: Any) -> None:
    ticks = [f"{in_figure(label)}<br>{bits:.3g}" for label, bits in zip(table["label"], table["bits"], strict=True)]
    x = list(range(len(table)))
    figure.update_xaxes(tickvals=x, ticktext=ticks, range=[-0.6, len(x) - 0.4], **where)
    figure.update_xaxes(title_text="bits per weight, scales included", **where)


def line_of(x: Sequence[Any], estimates: list[Estimate], name: str, colour: str) -> "go.Scatter":
    import plotly.graph_objects as go

    return go.Scatter(
        x=x,
        y=[e.value for e in estimates],
        error_y=errors_of(estimates),
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        marker={"size": 8, "color": colour},
        name=name,
        text=[str(e) for e in estimates],
        hovertemplate=f"{name}: %{{text}}<extra></extra>",
    )


def errors_of(estimates: list[Estimate]) -> dict[str, Any]:
    ends = {"array": [e.high - e.value for e in estimates], "arrayminus": [e.value - e.low for e in estimates]}
    return {"type": "data", "symmetric": False, "color": REFERENCE, "thickness": 1.5, "width": 4, **ends}


def _estimates(table: Any, name: str) -> list[Estimate]:
    columns = (table[name], table[f"{name}_low"], table[f"{name}_high"])
    return [Estimate(float(value), float(low), float(high)) for value, low, high in zip(*columns, strict=True)]


def class_bounds(curve: "SurvivalCurve") -> str:
    return f"Survived: ρ ≥ {curve.survived_at:g}; damaged: ρ < {curve.damaged_at:g}."


def in_order(figure: "go.Figure", title: str, subtitle: str, height: int, *, legend_rows: int = 1) -> "go.Figure":
    figure.update_layout(legend_traceorder="normal")
    return dressed(figure, title, subtitle, height, legend_rows=legend_rows)
