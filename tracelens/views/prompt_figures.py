"""Figures of one prompt in both models."""

from math import isfinite
from typing import TYPE_CHECKING, Any

from tracelens.views.escaping import in_figure, visible
from tracelens.views.style import FLIP, QUANTIZED, REFERENCE, dressed, template

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.auditing.prompt_result import PromptLook

TOKEN = 18
"""Characters of a token beside its bar."""
TRUTH = "#E69F00"


def next_tokens_figure(look: "PromptLook", *, k: int = 8) -> "go.Figure":
    """Probabilities of the likeliest first tokens of the answer, in both models; the likeliest on top."""
    import plotly.graph_objects as go

    rows = look.next_tokens[:k][::-1]
    labels = [in_figure(repr(visible(row.text, TOKEN))) for row in rows]
    figure = go.Figure()
    for name, colour in (("quantized", QUANTIZED), ("reference", REFERENCE)):
        figure.add_bar(
            y=[f"{label}<span> </span>" if labels.count(label) > 1 else label for label in labels],
            x=[getattr(row, name) for row in rows],
            orientation="h",
            name=name,
            marker_color=colour,
            text=[f"{getattr(row, name):.1%}" if getattr(row, name) >= 5e-4 else "<0.05%" for row in rows],
            textposition="outside",
            cliponaxis=False,
            customdata=[[row.id] for row in rows],
            hovertemplate=f"%{{y}} (token %{{customdata[0]}})<br>{name}: %{{x:.4%}}<extra></extra>",
        )
    figure.update_layout(barmode="group", legend_traceorder="reversed")
    figure.update_xaxes(title="probability of the first answer token", tickformat=".0%", range=[0, 1.12])
    figure.update_yaxes(title="", type="category")
    return dressed(figure, "First token of the answer", _kl(look), 330)


def margins_figure(look: "PromptLook") -> "go.Figure":
    """Each behaviour's margin in both models, in nats; above 0 the model shows the behaviour. The organism's log-odds z beside them."""
    import plotly.graph_objects as go

    rows = [margin for margin in look.margins if isfinite(margin.reference) and isfinite(margin.quantized)][::-1]
    names = [in_figure(row.behaviour) for row in rows]
    figure = go.Figure()
    for name, row in zip(names, rows, strict=True):
        figure.add_scatter(
            x=[row.reference, row.quantized],
            y=[name, name],
            mode="lines",
            line={"color": FLIP["refuse→comply"] if row.flipped else REFERENCE, "width": 3},
            hoverinfo="skip",
            showlegend=False,
        )
    for side, colour in (("reference", REFERENCE), ("quantized", QUANTIZED)):
        figure.add_scatter(
            x=[getattr(row, side) for row in rows],
            y=names,
            mode="markers",
            name=side,
            marker={"color": colour, "size": 12},
            hovertemplate=f"%{{y}}<br>{side}: %{{x:+.3f}} nats<extra></extra>",
        )
    if look.truth is not None and look.truth.z is not None:
        figure.add_scatter(
            x=[look.truth.z],
            y=[in_figure(look.truth.behaviour)],
            mode="markers",
            name="z, the truth",
            marker={"color": TRUTH, "size": 15, "symbol": "line-ns", "line": {"width": 3, "color": TRUTH}},
            hovertemplate="%{y}<br>z: %{x:+.3f} nats<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": REFERENCE, "width": 1, "dash": "dot"})
    figure.update_xaxes(title="margin, nats (above 0: the behaviour is shown)")
    figure.update_yaxes(title="", type="category")
    return dressed(figure, "Margins", _text(look), 250 + 30 * max(0, len(rows) - 2))


def look_figure(look: "PromptLook | None") -> "go.Figure":
    """Margins beside the next tokens: a prompt at a glance, for where no widget can be shown."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if look is None:
        return dressed(go.Figure(), "No prompt has been run", "explorer.run('a prompt') runs one", 180)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.16)
    for column, part in enumerate((margins_figure(look), next_tokens_figure(look)), start=1):
        traces: Any = part.data
        for trace in traces:
            trace.showlegend = trace.showlegend is not False and (column == 1)
            figure.add_trace(trace, row=1, col=column)
        axes: Any = part.layout
        figure.update_xaxes(axes.xaxis.to_plotly_json(), row=1, col=column)
        figure.update_yaxes(axes.yaxis.to_plotly_json(), row=1, col=column)
    figure.update_layout(barmode="group", template=template())
    return dressed(figure, "One prompt in both models", f"{_text(look)} {_kl(look)}", 420)


def _text(look: "PromptLook") -> str:
    return in_figure(visible(look.reading.text, 90))


def _kl(look: "PromptLook") -> str:
    return f"KL(reference ‖ quantized) {look.kl_answer:.3g} nats there"
