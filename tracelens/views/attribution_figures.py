"""Figures of attribution: the drift-weighted bound beside what happened, and what weights account for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tracelens.stats import Estimate
from tracelens.views.escaping import in_figure
from tracelens.views.numbers import interval, percent
from tracelens.views.style import AWAY, CONTROL, REFERENCE, SERIES, TOWARDS, dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.causal.attribution_check import AttributionCheck
    from tracelens.causal.attribution_result import WeightAttribution
    from tracelens.causal.bound_result import DriftBound, DriftBounds

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
LESS, MORE = AWAY, TOWARDS
"""Of the metric: what lowers it, what raises it."""
SIGNED = [[0, LESS], [0.5, "#F7F7F7"], [1, MORE]]
ORDER = (
    "W_Q",
    "W_K",
    "W_V",
    "W_O",
    "W_gate",
    "W_in",
    "W_out",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
KINDS = {
    "elementwise": "Σ |∇| |δ|",
    "norms": "Σ ‖∇‖ ‖δ‖ over components",
    "signed": "|Σ ∇ · δ|, a prediction and no bound",
}


def bound_figure(bounds: "DriftBounds", *, kind: Any = "elementwise") -> "go.Figure":
    """Measured change against the bound, a point for each prompt, on logarithmic axes; below the line the bound holds."""
    import plotly.graph_objects as go

    from tracelens.causal.effects import MIN_DIFFERENCE

    figure = go.Figure()
    ends: list[float] = []
    left_out = 0
    for number, (name, one) in enumerate(bounds.items()):
        found, measured, bound = one.summary(kind), one.measured, one.bound(kind)
        moved = (measured >= MIN_DIFFERENCE) & (bound > 0)
        left_out += int((~moved).sum())
        x, y = bound[moved].tolist(), measured[moved].tolist()
        ends += [*x, *y]
        violated: Estimate = found["violated"]
        share = "no prompt moves" if not found["n_usable"] else f"above it: {percent(violated)}"
        texts = (
            [text for text, kept in zip(one.prompts, moved.tolist(), strict=True) if kept]
            if one.prompts
            else [""] * len(x)
        )
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="markers",
                name=f"{in_figure(name)} ({share})",
                marker=_marker(number) | {"size": 7, "opacity": 0.75, "line_width": 0},
                text=[_short(text) for text in texts],
                hovertemplate=f"{in_figure(name)}<br>%{{text}}<br>bound %{{x:.3g}}, measured %{{y:.3g}}<extra></extra>",
            )
        )
    if ends:
        low, high = min(ends) / 1.5, max(ends) * 1.5
        line = {"color": REFERENCE, "width": 1.5, "dash": "dash"}
        figure.add_trace(
            go.Scatter(
                x=[low, high],
                y=[low, high],
                mode="lines",
                line=line,
                name="equal: the bound is tight",
                hoverinfo="skip",
            )
        )
    else:
        _nothing(figure)
    first = next(iter(bounds.values()))
    unit = f" ({in_figure(first.unit)})" if first.unit else ""
    figure.update_xaxes(type="log", dtick=1, title_text=f"{KINDS[kind]}{unit}")
    figure.update_yaxes(type="log", dtick=1, title_text=f"|Δ {in_figure(first.metric)}|{unit}")
    subtitle = (
        f"{len(first.components)} components, {first.errors} errors, gradient at the reference; a point is a prompt. "
        f"{_looseness(bounds, kind)}"
    )
    if left_out:
        subtitle += f" {left_out} points that do not move are not shown."
    rows = 1 + len(bounds) // 3
    return dressed(figure, "Drift-weighted bound and measured change", subtitle, 560, legend_rows=rows)


def carriers_figure(bound: "DriftBound", *, top: int = 30) -> "go.Figure":
    """The components that carry most of the bound, with the first-order change that their errors predict beside it."""
    import plotly.graph_objects as go

    table: Any = bound.top(top)
    figure = go.Figure()
    names = table["component"].tolist()
    for column, title, colour, symbol in (
        ("elementwise", "Σ |∇| |δ|: what it could move", REFERENCE, "circle"),
        ("signed", "Σ ∇ · δ: what it is predicted to move", SERIES[5], "diamond"),
    ):
        figure.add_trace(
            go.Scatter(
                x=table[column],
                y=names,
                mode="markers",
                name=title,
                marker={"color": colour, "symbol": symbol, "size": 9},
                error_x=_errors(table, column, colour),
                text=[_said(row, column) for row in table.to_dict("records")],
                customdata=(100 * table["share"]).round(1),
                hovertemplate="%{y}<br>%{text}<br>%{customdata} % of the bound<extra></extra>",
            )
        )
    unit = f" ({in_figure(bound.unit)})" if bound.unit else ""
    figure.update_xaxes(title_text=f"mean over prompts{unit}", zeroline=True, zerolinecolor=REFERENCE)
    figure.update_yaxes(autorange="reversed", type="category", dtick=1)
    more = f", the {top} largest shown" if len(bound.components) > top else ""
    subtitle = f"{len(bound.components)} components{more}; {bound.errors} errors; 95 % intervals over {len(bound.reference)} prompts."
    height = 200 + 20 * len(names)
    return dressed(figure, f"What carries the bound in {in_figure(bound.label)}", subtitle, height, legend_rows=1)


def attribution_figure(attribution: "WeightAttribution", *, value: Any = "first_order") -> "go.Figure":
    """Matrices by layer and kind, experts of a layer together.

    Args:
        value: "first_order", the mean change of the metric; or "change", how far towards the reference restoring the matrix is
            predicted to take a prompt.
    """
    import plotly.graph_objects as go

    table: Any = attribution.table
    kinds = _kinds(table)
    layers = sorted(set(table["layer"]))
    cells: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        cells.setdefault((row["layer"], row["kind"]), []).append(row)
    z = [
        [sum(row[value] for row in cells[layer, kind]) if (layer, kind) in cells else None for kind in kinds]
        for layer in layers
    ]
    texts = [
        [_cell(cells.get((layer, kind), []), value, in_figure(attribution.unit)) for kind in kinds] for layer in layers
    ]
    most = max((abs(v) for line in z for v in line if v is not None and v == v), default=0) or 1
    figure = go.Figure(
        go.Heatmap(
            x=[in_figure(kind) for kind in kinds],
            y=layers,
            z=z,
            zmin=-most,
            zmax=most,
            colorscale=SIGNED,
            text=texts,
            hovertemplate="%{text}<extra></extra>",
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": in_figure(attribution.unit), "side": "top"}, "thickness": 14},
        )
    )
    for layer in layers:
        for kind in kinds:
            rows = cells.get((layer, kind), [])
            if len(rows) == 1 and _stands_out(rows[0], value):
                figure.add_annotation(x=in_figure(kind), y=layer, text="•", bgcolor="rgba(0,0,0,0)")
    if not attribution.change.any() and not attribution.first_order.any():
        _nothing(figure)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(title_text="layer", type="category", autorange="reversed", showgrid=False)
    found = attribution.summary
    what = {
        "first_order": f"Change of the {in_figure(attribution.metric)} that each matrix accounts for",
        "change": f"What restoring each matrix should bring back of the {in_figure(attribution.metric)}",
    }[value]
    dots = {
        "first_order": "Dots: the 95 % interval over prompts leaves out 0.",
        "change": "Dots: it moves prompts one way, adjusted p < .05.",
    }[value]
    change, total = found["change"], found["first_order"]
    subtitle = (
        f"First order, gradient at {_end(attribution.at)}; {change.n} prompts. Mean change {interval(change)}, accounted for "
        f"{interval(total)} (over prompts r = {found['pearson']:.2f}). {dots}"
    )
    return dressed(figure, what, subtitle, max(330, 190 + 26 * len(layers)))


def check_figure(check: "AttributionCheck") -> "go.Figure":
    """Exact against predicted mean change, a point with its intervals for each matrix."""
    import plotly.graph_objects as go

    table: Any = check.table
    figure = go.Figure()
    ends = [0.0]
    kinds = _kinds(table)
    for number, kind in enumerate(kinds):
        rows = table[table["kind"] == kind]
        colour = SERIES[number % len(SERIES)]
        ends += [
            float(rows[f"{name}_{end}"].agg(pick))
            for name in ("predicted", "exact")
            for end, pick in (("low", "min"), ("high", "max"))
        ]
        figure.add_trace(
            go.Scatter(
                x=rows["predicted"],
                y=rows["exact"],
                mode="markers",
                name=in_figure(kind),
                marker=_marker(number) | {"size": 9},
                error_x=_errors(rows, "predicted", colour),
                error_y=_errors(rows, "exact", colour),
                text=[
                    f"{in_figure(row['name'])}<br>predicted {_said(row, 'predicted')}<br>exact {_said(row, 'exact')}"
                    for row in rows.to_dict("records")
                ],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    line = {"color": CONTROL["noise"], "width": 1.5, "dash": "dash"}
    span = [min(ends), max(ends)]
    figure.add_trace(go.Scatter(x=span, y=span, mode="lines", line=line, name="equal", hoverinfo="skip"))
    unit = f" ({in_figure(check.unit)})" if check.unit else ""
    exact = {"restore": "restored alone, sign turned", "alone": "quantized alone"}[check.how]
    figure.update_xaxes(title_text=f"predicted mean change of the {in_figure(check.metric)}{unit}")
    figure.update_yaxes(title_text=f"exact: {exact}{unit}")
    found = check.summary
    subtitle = (
        f"Gradient at {_end(check.at)}. Over {len(check.names)} matrices × {len(check.reference)} prompts r = {found['pearson']:.2f}, "
        f"slope {found['slope']:.2f}; rank correlation of the matrices {found['ranks']}. Bars: 95 % intervals over prompts."
    )
    return dressed(
        figure, "First-order attribution against the exact change", subtitle, 540, legend_rows=1 + len(kinds) // 8
    )


def _kinds(table: Any) -> list[str]:
    return sorted(dict.fromkeys(table["kind"]), key=lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))


def _stands_out(row: Mapping[str, Any], value: str) -> bool:
    if value == "change":
        return row["p_adjusted"] < 0.05
    return row["first_order_low"] > 0 or row["first_order_high"] < 0


def _looseness(bounds: Mapping[str, Any], kind: str) -> str:
    found = {name: one.summary(kind)["looseness"] for name, one in bounds.items()}
    said = [f"{in_figure(name)} {e.value:.1f}" for name, e in found.items() if e.value == e.value]
    return f"Bound over measured, of means: {', '.join(said)}." if said else ""


def _cell(rows: Sequence[Mapping[str, Any]], value: str, unit: str) -> str:
    if not rows:
        return "the layer has no such matrix"
    if len(rows) == 1:
        row = rows[0]
        told = f"{in_figure(row['name'])}<br>first order {_said(row, 'first_order')} {unit}"
        return f"{told}<br>towards the reference {_said(row, 'change')}, adjusted p {row['p_adjusted']:.3g}"
    largest = max(rows, key=lambda row: abs(row[value]))
    told = f"{len(rows)} matrices, sum {sum(row[value] for row in rows):.4f} {unit}"
    return f"{told}<br>largest: {in_figure(largest['name'])} {_said(largest, value)}"


def _said(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.4f} [{row[f'{name}_low']:.4f}, {row[f'{name}_high']:.4f}]"


def _end(at: str) -> str:
    return {"reference": "the reference", "quantized": "the quantized model", "both": "both models, mean"}[at]


def _errors(table: Any, name: str, colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": table[f"{name}_high"] - table[name],
        "arrayminus": table[name] - table[f"{name}_low"],
        "color": colour,
        "thickness": 1.2,
        "width": 3,
    }


def _marker(number: int) -> dict[str, Any]:
    return {"color": SERIES[number % len(SERIES)], "symbol": SYMBOLS[number % len(SYMBOLS)]}


def _short(text: str, length: int = 90) -> str:
    return in_figure(text if len(text) <= length else text[: length - 1] + "…")


def _nothing(figure: "go.Figure") -> None:
    figure.add_annotation(
        x=0.5, y=0.5, xref="paper", yref="paper", text="the models do not differ on these prompts (0/0)"
    )
