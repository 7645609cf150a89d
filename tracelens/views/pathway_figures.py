"""Figure of new pathways: what they do to the margin, beside random features."""

from typing import TYPE_CHECKING, Any

from tracelens.views.escaping import in_figure
from tracelens.views.style import CONTROL, SERIES, dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.studies.pathways import NewPathways

NEW = SERIES[3]
ROW = 22
"""Height of a feature's row, in pixels."""


def pathways_figure(pathways: "NewPathways") -> "go.Figure":
    """Effects of the new features with their intervals, strongest first; in each row, the random feature of that rank."""
    import plotly.graph_objects as go

    tables: Any = (pathways.table, pathways.control)
    new, control = (table[table["effect"].notna()] for table in tables)
    figure = go.Figure()
    for rows, name, colour, symbol, shift in (
        (control, "random features that are not new, by rank", CONTROL["random"], "diamond", 0.25),
        (new, "new features", NEW, "circle", 0.0),
    ):
        if len(rows):
            figure.add_trace(_points(rows, name, colour, symbol, shift))
    if not len(new):
        figure.add_annotation(x=0.5, xref="x domain", y=0.5, yref="y domain", text="no feature is new")
    labels = [f"#{r.feature} {in_figure(str(r.site))}" for r in new.itertuples()]
    figure.update_yaxes(tickvals=list(range(len(new))), ticktext=labels, autorange="reversed", showgrid=False)
    figure.update_xaxes(
        title_text="effect on the margin: with the feature minus without it (nats, mean over all prompts)"
    )
    figure.add_vline(x=0, line={"color": CONTROL["noise"], "width": 1, "dash": "dot"})
    beside = "" if pathways.n_novel_noise is None else f" ({pathways.n_novel_noise} under matched noise)"
    subtitle = (
        f"{pathways.n_novel} of {pathways.n_candidates} active features are new in it{beside}: on at least "
        f"{100 * pathways.novel_at:g} % of the tokens on which it fires them, the reference does not. Bars: 95 % intervals."
    )
    return dressed(figure, f"What fires only in {in_figure(pathways.label)}", subtitle, 220 + ROW * max(6, len(new)))


def _points(rows: Any, name: str, colour: str, symbol: str, shift: float) -> "go.Scatter":
    import plotly.graph_objects as go

    errors = {"array": rows["high"] - rows["effect"], "arrayminus": rows["effect"] - rows["low"]}
    text = [
        f"#{r.feature} {in_figure(str(r.site))}<br>effect {r.effect:+.3f} [{r.low:+.3f}, {r.high:+.3f}] nats, q {r.q_value:.2g}"
        f"<br>fires on {r.n_quant} tokens of {r.n_prompts} prompts, novelty {r.novelty:.2f}"
        for r in rows.itertuples()
    ]
    return go.Scatter(
        x=rows["effect"],
        y=[i + shift for i in range(len(rows))],
        error_x={"type": "data", "symmetric": False, "color": colour, "thickness": 2, "width": 4, **errors},
        mode="markers",
        marker={"size": 9, "color": colour, "symbol": symbol},
        name=name,
        text=text,
        hovertemplate="%{text}<extra></extra>",
    )
