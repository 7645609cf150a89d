"""Figures of patching: what each replacement brings back, over layers, positions, heads, features or paths."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tracelens.errors import UnknownNameError
from tracelens.stats import benjamini_hochberg
from tracelens.views.patching_panels import Drawn, heatmaps, profile, ranking
from tracelens.views.patching_words import hover, subtitle, title
from tracelens.views.style import dressed

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.causal.patching_result import PatchingResult

LEVEL = 0.05
"""Adjusted p below which a replacement is marked."""
RANKED = ("feature", "neuron")


def patching_figure(
    result: "PatchingResult",
    *,
    choose: Mapping[str, Any] | None = None,
    tokens: Sequence[str] | None = None,
    top: int = 30,
) -> "go.Figure":
    """Effects with their intervals: heatmaps over two axes, points over one, the `top` features or neurons in order.

    What differs from its placebo (from 0 where there is none) at a p below 0.05, adjusted over what is shown, carries a dot
    in a heatmap and is filled elsewhere. Grey cells have no effect that could be said; hover says why.

    Args:
        choose: axis → the one value to show, {"layer": 3, "head": 1}.
        tokens: of the prompt, as ticks of an axis of positions; by default what the result knows of them.

    Raises `UnknownNameError` for an axis or a value that the sweep does not have.
    """
    table = _chosen(result.table, result.axes, choose or {})
    table["marked"] = _marked(table)
    table["hover"] = [hover(row, result) for row in table.to_dict("records")]
    axes = [axis for axis in result.axes if len(table[axis].unique()) > 1] or [*result.axes[:1]]
    figure, said, height = _drawn(table, axes, result, tokens, top)
    layout: Any = figure.layout
    panels = len(layout.annotations) > 0
    dressed(figure, title(result, table), subtitle(result, said), height, legend_rows=2 if panels else 1)
    if panels:
        # Their titles stand where the legend would.
        figure.update_layout(legend_y=1 + 26 / (layout.height - layout.margin.t - 56))
    if not table["effect"].notna().any():
        text = "nothing to bring back: the two runs are equal on every prompt (0/0)"
        figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", text=text)
    return figure


def _drawn(
    table: "pd.DataFrame", axes: Sequence[str], result: "PatchingResult", tokens: Sequence[str] | None, top: int
) -> Drawn:
    if any(axis in axes for axis in RANKED):
        return ranking(table, axes, top)
    return profile(table, axes[0], result, tokens) if len(axes) == 1 else heatmaps(table, axes, result, tokens)


def _chosen(table: Any, axes: Sequence[str], choose: Mapping[str, Any]) -> "pd.DataFrame":
    for axis, value in choose.items():
        if axis not in axes:
            raise UnknownNameError.of("axis", axis, axes)
        rows: Any = table[axis] == value
        if not rows.any():
            raise UnknownNameError.of(axis, value, table[axis].unique())
        table = table[rows]
    return table.reset_index(drop=True)


def _marked(table: "pd.DataFrame") -> list[bool]:
    import torch

    p = torch.tensor(table["p_versus_placebo" if "p_versus_placebo" in table else "p_value"].to_numpy(float))
    adjusted = torch.full_like(p, torch.nan)
    adjusted[known] = benjamini_hochberg(p[known]) if (known := p.isfinite()).any() else torch.nan
    return (adjusted < LEVEL).tolist()
