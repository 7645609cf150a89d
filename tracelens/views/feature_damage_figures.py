"""Figure of the study of feature damage: survival, perplexity, overlap of damaged sets, and prediction, side by side."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tracelens.stats import Estimate
from tracelens.views.escaping import in_figure
from tracelens.views.style import CONTROL, PREDICTOR, SECOND_PREDICTOR, SURVIVAL, translucent
from tracelens.views.survival_figures import (
    PREDICTORS,
    class_bounds,
    draw_perplexity,
    draw_survival,
    errors_of,
    in_order,
    line_of,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.studies.feature_damage import FeatureDamage
    from tracelens.studies.overlap import DamageOverlap
    from tracelens.studies.prediction import SurvivalPrediction

SINGLE = {"mean": SECOND_PREDICTOR, "peak": PREDICTOR}
"""Colours of single predictors."""


def feature_damage_figure(study: "FeatureDamage") -> "go.Figure":
    """Survival against bits over perplexity; overlap of damaged sets over the AUC of their prediction."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2,
        cols=2,
        row_heights=[0.56, 0.44],
        column_widths=[0.55, 0.45],
        vertical_spacing=0.16,
        horizontal_spacing=0.13,
        subplot_titles=("Survival", "Damaged sets: Jaccard", "Perplexity", "Survival told from the reference: AUC"),
    )
    draw_survival(figure, study.curve, "all", 1, 1)
    draw_perplexity(figure, study.curve, 2, 1)
    _draw_overlaps(figure, study.overlaps, 1, 2)
    _draw_aucs(figure, study.predictions, 2, 2)
    n = int(study.curve.of("all")["n"].iloc[0])
    title = f"Feature damage in {in_figure(study.curve.reference)}"
    dressed = in_order(figure, title, f"{n} live features. {class_bounds(study.curve)} Bars: 95 % intervals.", 800)
    return dressed.update_layout(legend_y=-0.12, legend_yanchor="top", margin_b=110)  # panels have titles above


def _draw_overlaps(figure: "go.Figure", overlaps: "Sequence[DamageOverlap]", row: int, col: int) -> None:
    import plotly.graph_objects as go

    where: Any = {"row": row, "col": col}
    names = [f"{in_figure(o.label_a)} and<br>{in_figure(o.label_b)}" for o in overlaps]
    bars = go.Bar(
        x=[o.jaccard.value for o in overlaps],
        y=names,
        orientation="h",
        marker_color=translucent(SURVIVAL["damaged"], 0.55),
        width=0.5,
        error_x=errors_of([o.jaccard for o in overlaps]),
        name="both damaged / either damaged",
        text=[f"{o.jaccard}, Spearman {o.spearman}" for o in overlaps],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
    figure.add_trace(bars, **where)
    marks: list[tuple[str, str, str, Callable[[Any], float]]] = [
        ("by chance", "line-ns", CONTROL["noise"], lambda o: o.sets.chance),
        ("by chance at equal firing rates", "diamond", CONTROL["random"], lambda o: o.matched.chance),
    ]
    for name, symbol, colour, read in marks:
        marker = {"symbol": symbol, "size": 12, "color": colour, "line": {"width": 2, "color": colour}}
        x = [read(o) for o in overlaps]
        trace = go.Scatter(x=x, y=names, mode="markers", marker=marker, name=name, hovertemplate="%{x:.3f}")
        figure.add_trace(trace, **where)
    if not overlaps:
        figure.add_annotation(text="none measured", x=0.5, y=0.5, showarrow=False, **where)
    figure.update_yaxes(autorange="reversed", showgrid=False, **where)
    figure.update_xaxes(range=[0, 1], title_text="both damaged / either damaged", **where)


def _draw_aucs(figure: "go.Figure", predictions: "Sequence[SurvivalPrediction]", row: int, col: int) -> None:
    x = list(range(len(predictions)))
    rows: list[tuple[str, str, list[Estimate]]] = [
        ("all predictors", SURVIVAL["survived"], [p.auc for p in predictions]),
        ("survival shuffled", CONTROL["noise"], [p.permuted for p in predictions]),
    ]
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    for name, colour in SINGLE.items():
        rows.append((f"{PREDICTORS[name]} alone", colour, [p.single.get(name, nothing) for p in predictions]))
    for name, colour, estimates in rows:
        figure.add_trace(line_of(x, estimates, name, colour), row=row, col=col)
    labels = [in_figure(p.label) for p in predictions]
    figure.update_xaxes(
        tickvals=x, ticktext=labels, range=[-0.4, len(x) - 0.6], title_text="precision", row=row, col=col
    )
    figure.update_yaxes(range=[0, 1.03], title_text="AUC (0.5 = chance)", row=row, col=col)
