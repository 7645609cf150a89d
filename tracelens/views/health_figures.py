"""Figure of how well SAEs fit both models of a pair."""

from typing import TYPE_CHECKING

from tracelens.stats import Estimate
from tracelens.views.escaping import in_figure
from tracelens.views.style import QUANTIZED, REFERENCE, dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.features.health_result import SAEHealth

PANELS = (
    ("explained_variance", "explained variance"),
    ("cross_entropy_recovered", "cross-entropy recovered"),
    ("l0", "features per token (L0)"),
)


def health_figure(health: "SAEHealth") -> "go.Figure":
    """Explained variance, cross-entropy recovered and L0 of each SAE, both models side by side, with the limits that count as broken."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    sites = list(health.sites)
    figure = make_subplots(rows=len(PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, (name, title) in enumerate(PANELS, start=1):
        for side, colour, label, shift in (
            ("reference", REFERENCE, health.reference, -0.1),
            ("quantized", QUANTIZED, health.quantized, 0.1),
        ):
            estimates: list[Estimate] = [getattr(getattr(health.sites[site], side), name) for site in sites]
            points = go.Scatter(
                x=[index + shift for index in range(len(sites))],
                y=[estimate.value for estimate in estimates],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [estimate.high - estimate.value for estimate in estimates],
                    "arrayminus": [estimate.value - estimate.low for estimate in estimates],
                },
                customdata=[[in_figure(site), str(estimate)] for site, estimate in zip(sites, estimates, strict=True)],
                hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra>" + in_figure(label) + "</extra>",
                mode="markers",
                marker={"color": colour, "size": 9},
                name=in_figure(label),
                legendgroup=side,
                showlegend=row == 1,
            )
            figure.add_trace(points, row=row, col=1)
        figure.update_yaxes(title_text=title, row=row, col=1)
    limits = health.thresholds
    for row, limit in enumerate((limits.min_explained_variance, limits.min_cross_entropy_recovered), start=1):
        figure.add_hline(y=limit, line={"color": REFERENCE, "dash": "dot", "width": 1}, row=row, col=1)  # pyright: ignore[reportArgumentType]
    names = [f"<b>{in_figure(site)}</b>" if not health.ok(site) else in_figure(site) for site in sites]
    figure.update_xaxes(tickvals=list(range(len(sites))), ticktext=names, range=[-0.5, len(sites) - 0.5])
    count = len(health.broken)
    finding = "All SAEs fit both models" if not count else f"{count} of {len(sites)} SAEs do not fit (bold)"
    subtitle = (
        f"{health.n_prompts} prompts, {health.tokens} tokens. Bars: 95 % intervals. A fit is above the dotted lines, loses "
        f"at most {limits.max_drop:g} of the variance, and its L0 changes by less than a factor of {limits.max_l0_ratio:g}."
    )
    return dressed(figure, finding, subtitle, 720)
