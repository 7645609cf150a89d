"""Figures of smearing: who merges, in which groups, and what leaks between the classes."""

from html import escape
from typing import TYPE_CHECKING, Any

from tracelens.views.style import CAPABILITY, CONTROL, QUANTIZED, SAFETY, dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.studies.smearing import SmearingTrace

JOINED = {"safety": SAFETY, "safety and capability": "#CC79A7", "capability": CAPABILITY}
LARGEST = 15
"""Groups that are drawn."""
HEIGHT = 660


def smearing_figure(trace: "SmearingTrace") -> "go.Figure":
    """Above, the share of features in a smeared pair and the leakage between classes, beside matched noise; below, the
    largest groups by what they join."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=2, specs=[[{}, {}], [{"colspan": 2}, None]], vertical_spacing=0.26, horizontal_spacing=0.12
    )
    shares: Any = trace.shares
    leakage: Any = trace.leakage
    pairs = leakage["class_reference"].str.cat(leakage["class_quantized"], sep=" →<br>")
    panels = [
        (1, shares.assign(what=shares["class"], y=shares["share"])),
        (2, leakage.assign(what=pairs, y=leakage["ratio"])),
    ]
    for column, table in panels:
        places = list(dict.fromkeys(table["what"]))
        table["x"] = [places.index(what) for what in table["what"]]
        figure.update_xaxes(
            tickvals=list(range(len(places))), ticktext=places, range=[-0.5, len(places) - 0.5], row=1, col=column
        )
        for model, shift in (("quantized", -0.08), ("noise", 0.08)):
            rows = table[table["model"] == model].assign(x=lambda rows, shift=shift: rows["x"] + shift)
            if len(rows):
                figure.add_trace(_points(rows, model, trace.label, showlegend=column == 1), row=1, col=column)
    figure.add_hline(y=1, line={"color": CONTROL["noise"], "width": 1, "dash": "dot"}, row=1, col=2)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(title_text="features in a smeared pair", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="leakage (1 = the reference's)", row=1, col=2)
    figure.update_xaxes(title_text="features", row=1, col=1)
    figure.update_xaxes(title_text="in the reference → in the quantized model", row=1, col=2)
    _draw_groups(figure, trace)
    subtitle = (
        f"A pair is smeared if its cosine over tokens rises by {trace.delta:g} to {trace.tau:g} or more; {len(trace.pairs)} "
        f"pairs, {len(trace.groups)} groups, {trace.n_prompts} prompts. Bars: 95 % intervals."
    )
    return dressed(figure, f"What merges in {escape(trace.label)}", subtitle, HEIGHT)


def _points(rows: Any, model: str, label: str, *, showlegend: bool) -> "go.Scatter":
    import plotly.graph_objects as go

    colour = QUANTIZED if model == "quantized" else CONTROL["noise"]
    name = escape(label) if model == "quantized" else "matched noise"
    errors = {"array": rows["high"] - rows["y"], "arrayminus": rows["y"] - rows["low"]}
    return go.Scatter(
        x=rows["x"],
        y=rows["y"],
        error_y={"type": "data", "symmetric": False, "color": colour, "thickness": 2, "width": 5, **errors},
        mode="markers",
        marker={"size": 11, "color": colour, "symbol": "circle" if model == "quantized" else "diamond"},
        name=name,
        legendgroup=model,
        showlegend=showlegend,
        text=rows["what"],
        hovertemplate=name + ", %{text}: %{y:.3f}<extra></extra>",
    )


def _draw_groups(figure: "go.Figure", trace: "SmearingTrace") -> None:
    import plotly.graph_objects as go

    largest: Any = trace.groups.head(LARGEST)
    for joins, colour in JOINED.items():
        rows = largest[largest["joins"] == joins]
        if not len(rows):
            continue
        hover = [
            f"{escape(r.site)}<br>{r.size} features ({r.n_safety} safety), {r.n_pairs} pairs, density {r.density:.2f}"
            for r in rows.itertuples()
        ]
        bar = go.Bar(
            x=rows.index,
            y=rows["size"],
            name=f"groups of {joins} features",
            marker={"color": colour, "line_width": 0},
            text=hover,
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
        figure.add_trace(bar, row=2, col=1)
    if not len(largest):
        figure.add_annotation(x=0.5, xref="x3 domain", y=0.5, yref="y3 domain", text="nothing is smeared")
    figure.update_xaxes(title_text="groups, largest first", showticklabels=False, ticks="", row=2, col=1)
    figure.update_yaxes(title_text="features in the group", row=2, col=1)
