"""Figures of importance and fragility: what a metric depends on, and whether that drifts less."""

from math import ceil, floor, isnan, log10
from typing import TYPE_CHECKING, Any

from tracelens.views.escaping import in_figure
from tracelens.views.style import CONTROL, QUANTIZED, REFERENCE, SERIES, dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.causal.ablation_result import Importance
    from tracelens.causal.fragility_result import Association, Fragility

COLOUR = {"head": QUANTIZED, "mlp": SERIES[1], "attn": SERIES[4], "layer": REFERENCE, "feature": SERIES[2]}
OTHER = CONTROL["permuted"]
TITLE = {"head": "heads", "mlp": "MLPs", "attn": "attention layers", "layer": "layers", "feature": "features"}
BY_LAYER = ("mlp", "attn", "layer")
COLUMNS = 3
PANEL, ROW, LINE = 400, 34, 19
"""Heights of a scatter, of a layer's or bar's row, and of a line of a panel's title, in pixels."""


def fragility_figure(fragility: "Fragility", *, n_labels: int = 3, noise: bool = True) -> "go.Figure":
    """Importance against drift on logarithmic axes, a panel for each quantized model, matched noise in grey.

    The `n_labels` most important components of each kind are named.
    """
    from plotly.subplots import make_subplots

    labels = list(fragility.drifts)
    columns = min(COLUMNS, len(labels))
    rows = ceil(len(labels) / columns)
    titles = ["<br>".join(_panel_title(fragility, label)) for label in labels]
    lines = max(title.count("<br>") + 1 for title in titles)
    inner = rows * (PANEL + LINE * lines)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",  # pyright: ignore[reportArgumentType]
        subplot_titles=titles,
        horizontal_spacing=0.07,
        vertical_spacing=(LINE * lines + 75) / inner if rows > 1 else 0,
    )
    figure.update_annotations(font_size=11, yshift=4)
    table: Any = fragility.table
    drawn = table[(table["drift"] > 0) & (table["importance"] > 0)]
    seen: set[Any] = set()
    for i, label in enumerate(labels):
        cell: Any = {"row": i // columns + 1, "col": i % columns + 1}
        shown = drawn[drawn["model"] == label]
        traces: list[Any] = _panel(shown, n_labels, noise=noise) or [_nothing(drawn)]
        for trace in traces:
            figure.add_trace(trace.update(showlegend=bool(trace.name) and trace.name not in seen), **cell)
            seen.add(trace.name)
        drift = [shown["drift"], shown["noise_drift"]] if noise else [shown["drift"]]
        across = _log_ticks([drawn["importance"]], narrow=columns > 1)
        figure.update_xaxes(**across, tickangle=0, title_text=f"importance, {_unit(fragility.importance)}", **cell)
        figure.update_yaxes(**_log_ticks(drift), title_text="relative drift" if cell["col"] == 1 else None, **cell)
    importance = fragility.importance
    kept = len(table) - len(drawn)
    subtitle = (
        f"Points: components. Importance: mean |Δ {in_figure(importance.metric)}| under {importance.method} ablation in the reference; "
        f"drift: mean ‖a_ref\u00a0−\u00a0a_quant‖\u00a0/\u00a0‖a_ref‖; {len(importance.prompts)} prompts. "
        "[ ]: 95 % over prompts, p: permutations of components."
        + (f" {kept} points at 0 or unknown are left out." if kept else "")
    )
    return dressed(figure, "Do important components drift less?", subtitle, 150 + inner).update_layout(
        margin_t=140 + LINE * lines, legend={"y": 1 + (LINE * lines + 14) / inner}
    )


def _panel_title(fragility: "Fragility", label: str) -> list[str]:
    found = [each for each in fragility.associations if each.label == label]
    return [f"<b>{in_figure(label)}</b>", *(line for each in found for line in _association_lines(each))]


def _association_lines(found: "Association") -> list[str]:
    """Two lines, since three panels stand side by side."""
    rho = found.correlation
    name = f"{found.n_components} {TITLE.get(found.kind, in_figure(found.kind))}"
    if isnan(rho.value):
        return [f"{name}: ρ undefined"]
    beside = "" if found.noise is None or isnan(found.noise.value) else f"; noise: ρ = {found.noise.value:.2f}"
    return [f"{name}: ρ = {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]", f"p = {found.p_value:.2g}{beside}"]


def _panel(shown: Any, n_labels: int, *, noise: bool) -> list["go.Scatter"]:
    """Of one quantized model: noise beneath the points, kind by kind."""
    kinds = {kind: shown[shown["kind"] == kind] for kind in dict.fromkeys(shown["kind"])}
    beneath = [_noise_points(rows) for rows in kinds.values() if noise and rows["noise_drift"].gt(0).any()]
    return beneath + [_points(rows, kind, n_labels) for kind, rows in kinds.items()]


def _nothing(drawn: Any) -> "go.Scatter":
    """An empty panel that says so."""
    import plotly.graph_objects as go

    middle = drawn["importance"].median() if len(drawn) else 1.0
    return go.Scatter(x=[middle], y=[1.0], mode="text", text=["nothing drifts"], hoverinfo="skip")


def _log_ticks(columns: list[Any], *, narrow: bool = False) -> dict[str, Any]:
    """A logarithmic axis with some three to ten marks, or half as many, however many powers of ten it spans."""
    values = [value for column in columns for value in column if value > 0]
    if not values:
        return {"type": "log", "showticklabels": False}
    low, high = log10(min(values)), log10(max(values))
    dense = ((1, 2, 5), (1, 3)) if narrow else ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 5))
    steps = dense[0] if high - low < 1.2 else dense[1] if high - low < 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(floor(low) - 1, ceil(high) + 2) for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks], "showticklabels": True}


def _points(rows: Any, kind: str, n_labels: int) -> "go.Scatter":
    import plotly.graph_objects as go

    # Neighbours in rank are often neighbours in the plane: their names go to different sides.
    ranked = {index: rank for rank, index in enumerate(rows.nlargest(n_labels, "importance").index)}
    sides = ("top center", "bottom center")
    colour = COLOUR.get(kind, OTHER)
    hover = [
        f"<b>{in_figure(r.component)}</b><br>importance {r.importance:.3g} [{r.importance_low:.3g}, {r.importance_high:.3g}]"
        f"<br>drift {r.drift:.3g} [{r.drift_low:.3g}, {r.drift_high:.3g}], under noise {r.noise_drift:.3g}"
        f"<br>output norm {r.norm:.3g}"
        for r in rows.itertuples()
    ]
    return go.Scatter(
        x=rows["importance"],
        y=rows["drift"],
        mode="markers+text",
        marker={"size": 6 if len(rows) > 100 else 9, "color": colour, "opacity": 0.85},
        text=[in_figure(r.component) if r.Index in ranked else "" for r in rows.itertuples()],
        textposition=[sides[ranked.get(index, 0) % 2] for index in rows.index],
        textfont={"size": 11, "color": colour},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        name=TITLE.get(kind, in_figure(kind)),
        legendgroup=kind,
    )


def _noise_points(rows: Any) -> "go.Scatter":
    import plotly.graph_objects as go

    return go.Scatter(
        x=rows["importance"],
        y=rows["noise_drift"],
        mode="markers",
        marker={"size": 5 if len(rows) > 100 else 7, "color": CONTROL["noise"], "symbol": "diamond-open"},
        text=[in_figure(name) for name in rows["component"]],
        hovertemplate="%{text} under matched noise: drift %{y:.3g}<extra></extra>",
        name="matched noise",
        legendgroup="noise",
    )


def importance_figure(importance: "Importance", *, n_ranked: int = 20) -> "go.Figure":
    """Heads as a heatmap of layers and heads, MLPs, attention layers and layers as bars beside it, intervals on hover; below,
    the `n_ranked` most important features and other components.
    """
    from plotly.subplots import make_subplots

    table: Any = importance.table
    heads = table[(table["kind"] == "head") & (table["site"] == "z")]
    bars = table[table["kind"].isin(BY_LAYER)]
    rest = table.drop(index=[*heads.index, *bars.index]).nlargest(n_ranked, "importance")
    layers = sorted({*heads["layer"], *bars["layer"]})
    upper, lower = ROW * len(layers) + 30, ROW * 0.7 * len(rest)
    panels: list[Any] = [
        [{}, {}] if len(heads) and len(bars) else [{"colspan": 2}, None],
        [{"colspan": 2}, None],
    ]
    chosen = [panel for panel, there in zip(panels, (layers, len(rest)), strict=True) if there]
    gap = 80 if len(chosen) == 2 else 0
    inner = (upper if layers else 0) + gap + (lower if len(rest) else 0)
    figure = make_subplots(
        rows=len(chosen),
        cols=2,
        specs=chosen,
        row_heights=[upper, lower] if len(chosen) == 2 else None,
        horizontal_spacing=0.16,
        vertical_spacing=gap / inner,
    )
    if len(heads):
        _draw_heads(figure, heads, importance, layers)
    if len(bars):
        _draw_bars(figure, bars, importance, layers, column=2 if len(heads) else 1)
    if len(rest):
        _draw_ranked(figure, rest, importance, row=len(chosen))
    subtitle = (
        f"Mean |Δ {in_figure(importance.metric)}| when a component alone is ablated ({importance.method} ablation), "
        f"{len(importance.prompts)} prompts; 95 % intervals. What later components make up for looks unimportant."
    )
    dressed(figure, "What the metric depends on", subtitle, int(190 + inner))
    # The legend is of the bars, not of the heatmap.
    return figure.update_layout(legend_x=0.58) if len(heads) and len(bars) else figure


def _draw_heads(figure: "go.Figure", heads: Any, importance: "Importance", layers: list[int]) -> None:
    import plotly.graph_objects as go

    count = int(heads["index"].max()) + 1
    values: list[list[Any]] = [[None] * count for _ in layers]
    hover = [[""] * count for _ in layers]
    for r in heads.itertuples():
        at = layers.index(r.layer)
        values[at][r.index], hover[at][r.index] = r.importance, _hover(r, importance)
    few = len(layers) * count <= 150
    figure.add_trace(
        go.Heatmap(
            z=values,
            x=[str(i) for i in range(count)],
            y=[str(layer) for layer in layers],
            colorscale=[[0, "#F7F2F6"], [1, QUANTIZED]],
            zmin=0,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            texttemplate="%{z:.2f}" if few else None,
            xgap=2,
            ygap=2,
            showscale=not few,
            colorbar={"thickness": 10, "x": 0.44, "title": {"text": in_figure(importance.unit)}} if not few else None,
        ),
        row=1,
        col=1,
    )
    figure.update_xaxes(title_text="head", type="category", showgrid=False, row=1, col=1)
    figure.update_yaxes(title_text="layer", type="category", autorange="reversed", showgrid=False, row=1, col=1)


def _draw_bars(figure: "go.Figure", bars: Any, importance: "Importance", layers: list[int], column: int) -> None:
    for kind in dict.fromkeys(bars["kind"]):
        rows = bars[bars["kind"] == kind]
        figure.add_trace(_bar(rows, rows["layer"].astype(str), importance, kind), row=1, col=column)
    order = [str(layer) for layer in layers[::-1]]
    figure.update_yaxes(
        title_text="layer", type="category", categoryorder="array", categoryarray=order, row=1, col=column
    )
    figure.update_xaxes(title_text=f"importance, {_unit(importance)}", rangemode="tozero", row=1, col=column)


def _draw_ranked(figure: "go.Figure", rest: Any, importance: "Importance", row: int) -> None:
    for kind in dict.fromkeys(rest["kind"]):
        rows = rest[rest["kind"] == kind]
        figure.add_trace(_bar(rows, [in_figure(name) for name in rows["component"]], importance, kind), row=row, col=1)
    names = [in_figure(name) for name in rest["component"]][::-1]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names, showgrid=False, row=row, col=1)
    figure.update_xaxes(title_text=f"importance, {_unit(importance)}", rangemode="tozero", row=row, col=1)


def _bar(rows: Any, y: Any, importance: "Importance", kind: str) -> "go.Bar":
    import plotly.graph_objects as go

    ends = {
        "array": rows["importance_high"] - rows["importance"],
        "arrayminus": rows["importance"] - rows["importance_low"],
    }
    return go.Bar(
        x=rows["importance"],
        y=y,
        orientation="h",
        error_x={"type": "data", "symmetric": False, "thickness": 1.5, "width": 4, "color": REFERENCE, **ends},
        marker_color=COLOUR.get(kind, OTHER),
        name=TITLE.get(kind, in_figure(kind)),
        showlegend=True,
        hovertext=[_hover(r, importance) for r in rows.itertuples()],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _hover(row: Any, importance: "Importance") -> str:
    unit = in_figure(importance.unit)
    text = (
        f"<b>{in_figure(row.component)}</b><br>mean |Δ| {row.importance:.3g} [{row.importance_low:.3g}, {row.importance_high:.3g}] {unit}"
        f"<br>mean Δ {row.change:+.3g} [{row.change_low:+.3g}, {row.change_high:+.3g}], p = {row.p_value:.2g}"
    )
    beside = getattr(row, "placebo_importance", None)
    return text if beside is None else f"{text}<br>random displacement as large: {beside:.3g}"


def _unit(importance: "Importance") -> str:
    return in_figure(importance.unit or importance.metric)
