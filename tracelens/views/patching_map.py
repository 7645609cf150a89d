"""One panel of a sweep of patching, and the prompts behind one of its replacements: what the explorer draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracelens.views.escaping import in_figure
from tracelens.views.patching_panels import (
    AWAY,
    BLANK,
    TOWARDS,
    axis_of,
    cells,
    colours,
    directions,
    points,
    values_of,
)
from tracelens.views.patching_words import RUNS, axis_title, labels, place_of, prompt_labels
from tracelens.views.style import CONTROL, QUANTIZED, REFERENCE, template, translucent

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.causal.patching_result import PatchingResult

CHOSEN = "#E69F00"
"""Rings what is looked at."""
RANKED = ("feature", "neuron")
TOP = 14
"""Features or neurons that fit one below the other."""
HEIGHT, ACROSS = 330, 400.0
"""Of a figure, and about how many pixels its axis has."""
PROMPT = 60
"""Characters of a line of a prompt's text."""
ENDS = {"reference": REFERENCE, "clean": REFERENCE, "quantized": QUANTIZED, "corrupted": QUANTIZED}


@dataclass(frozen=True)
class Map:
    """A figure, and which arm (number of a row of the result) is drawn where."""

    figure: "go.Figure"
    cells: dict[tuple[int, int], int]
    """(row, column) of a heatmap → arm."""
    points: list[int]
    """Number of a point → arm."""
    rings: dict[int, tuple[float, float]]
    """Arm → where its ring stands; none for what is not drawn."""


def patching_map(
    table: "pd.DataFrame",
    axes: Sequence[str],
    result: "PatchingResult",
    *,
    measure: str,
    unit: str = "",
    prompt: int | None = None,
    chosen: int | None = None,
) -> Map:
    """Rows of a table (with `arm`, `effect`, `marked`, `hover`) as a heatmap over two axes, points over one, or the largest in order.

    Always the same traces, so that one can be drawn over another: blank cells, cells, their two kinds of marks, points, placebos, the ring.
    """
    import plotly.graph_objects as go

    title = f"{measure} ({in_figure(unit)})" if unit else measure
    hidden = [go.Heatmap(visible=False)] * 2 + [go.Scatter(visible=False)] * 2
    at: dict[tuple[int, int], int] = {}
    arms: list[int] = []
    layout: dict[str, Any]
    if len(axes) > 1 and not any(axis in RANKED for axis in axes):
        x, y = directions(table, axes)
        across, up = (values_of(table[axis]) for axis in (x, y))
        at = {(up.index(i), across.index(j)): arm for i, j, arm in zip(table[y], table[x], table["arm"], strict=True)}
        traces = [*cells(table, x, y, across, up, first=True), *[go.Scatter(visible=False)] * 2]
        traces[3].showlegend = bool(table["marked"].any())
        xs, ys = (_ticks(axis, values, result, prompt) for axis, values in ((x, across), (y, up)))
        layout = {
            "xaxis": axis_of(xs, ACROSS) | {"title_text": axis_title(x, table)},
            "yaxis": axis_of(ys, None) | {"title_text": axis_title(y, table)},
            "coloraxis": colours(table, title),
        }
        rings = {arm: (float(j), float(i)) for (i, j), arm in at.items()}
    else:
        up = any(axis in RANKED for axis in axes)
        shown = _largest(table) if up else table
        arms = shown["arm"].tolist()
        places = list(range(len(shown)))
        # The placebo is drawn beside effects alone: other measures hold it already, or have none.
        drawn = points(shown, places, up=up, lines=axes[0] in ("layer", "position"))
        traces = [*hidden, *drawn, *[go.Scatter(visible=False)] * (2 - len(drawn))]
        traces[4].name = measure
        ticks = [" · ".join(place_of(axis, row[axis]) for axis in axes) for row in shown.to_dict("records")]
        named = [*map(in_figure, ticks)] if up else _ticks(axes[0], list(shown[axes[0]]), result, prompt)
        along: dict[str, Any] = axis_of(named, None if up else ACROSS)
        other: dict[str, Any] = {"title_text": title, "showgrid": True}
        across_title = "" if up else axis_title(axes[0], table)
        layout = (
            {"xaxis": other, "yaxis": along} if up else {"xaxis": along | {"title_text": across_title}, "yaxis": other}
        )
        layout["shapes"] = [_zero(up=up)]
        found = [(arm, float(place), float(v)) for arm, place, v in zip(arms, places, shown["effect"], strict=True)]
        rings = {arm: (v, place) if up else (place, v) for arm, place, v in found if v == v}
    figure = go.Figure([*traces, _ring(None if chosen is None else rings.get(chosen))])
    figure.update_layout(template=template(), height=HEIGHT, margin=MARGIN, legend=LEGEND, **layout)
    if not table["effect"].notna().any():
        figure.add_annotation(
            x=0.5,
            y=0.5,
            xref="paper",
            yref="paper",
            text="nothing to show: no effect can be said (0/0), or all is hidden",
        )
    return Map(figure, at, arms, rings)


MARGIN = {"l": 56, "r": 12, "t": 34, "b": 44}
LEGEND = {"x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 11}}


def prompts_figure(
    result: "PatchingResult",
    arm: int,
    *,
    chosen: int | None = None,
    height: int = HEIGHT,
    order: Sequence[int] | None = None,
) -> "go.Figure":
    """Each prompt's metric: unpatched, with the replacement, with its placebo, and in the run whose activations are put in.

    Prompts that lack the replaced positions are left out; those whose two runs are equal (0/0) are grey.

    Args:
        order: of the prompts, lowest first; by default by how far they move towards the other run.
    """
    import plotly.graph_objects as go

    rows = prompt_order(result, arm) if order is None else [*order]
    d = result.goal - result.start
    usable = result.per_prompt()[arm].isfinite().tolist()
    start, goal, patched = (values.tolist() for values in (result.start, result.goal, result.patched[arm]))
    toward = ((result.patched[arm] - result.start) * d.sign() >= 0).tolist()
    colour = [BLANK if not usable[i] else TOWARDS if toward[i] else AWAY for i in rows]
    places = list(range(len(rows)))
    text = prompt_texts(result, arm, rows)
    names = RUNS.get(result.direction, ("unpatched", "other"))
    shared: dict[str, Any] = {"y": places, "mode": "markers", "text": text, "hovertemplate": "%{text}<extra></extra>"}
    placebo = None if result.placebo is None else result.placebo[arm].tolist()

    def segments(to: list[float]) -> dict[str, Any]:
        return {
            "x": [x for i in rows for x in (start[i], to[i], None)],
            "y": [y for place in places for y in (place, place, None)],
            "mode": "lines",
            "hoverinfo": "skip",
            "showlegend": False,
        }

    def dots(values: list[float], name: str, marker: dict[str, Any]) -> "go.Scatter":
        return go.Scatter(x=[values[i] for i in rows], name=name, marker={"size": 8} | marker, **shared)

    ends = [ENDS.get(name, BLANK) for name in names]
    traces = [
        go.Scatter(line={"color": translucent(BLANK, 0.35), "width": 1}, **segments(goal)),
        go.Scatter(line={"color": translucent(TOWARDS, 0.7), "width": 3}, **segments(patched)),
        dots(
            start,
            f"{names[0]} run",
            {"symbol": "circle-open", "color": ends[0], "line": {"width": 2, "color": ends[0]}},
        ),
        dots(goal, f"{names[1]} run", {"symbol": "line-ns", "size": 10, "line": {"width": 2, "color": ends[1]}}),
        dots(placebo, "placebo", {"symbol": "diamond", "size": 6, "color": CONTROL["random"]})
        if placebo
        else go.Scatter(visible=False),
        dots(patched, "patched (brown: away)", {"color": colour}),
        _ring((patched[chosen], float(rows.index(chosen))) if chosen in rows else None),
    ]
    unit = f" ({in_figure(result.unit)})" if result.unit else ""
    figure = go.Figure(traces)
    figure.update_layout(template=template(), height=height, margin={**MARGIN, "l": 30}, legend=LEGEND)
    figure.update_xaxes(title_text=f"{in_figure(result.metric)}{unit}")
    figure.update_yaxes(
        title_text="prompts, those that move most above", showticklabels=False, ticks="", showgrid=False
    )
    figure.update_yaxes(range=[-0.8, max(len(rows), 1) - 0.2])
    if not rows:
        figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", text="no prompt has these positions")
    return figure


def prompt_order(result: "PatchingResult", arm: int) -> list[int]:
    """Prompts that have the arm's positions: the undetermined first, then by how far they move towards the other run."""
    d = result.goal - result.start
    gain = ((result.patched[arm] - result.start) * d.sign()).tolist()
    usable = result.per_prompt()[arm].isfinite().tolist()
    there = range(len(gain)) if result.present is None else result.present[arm].nonzero().flatten().tolist()
    return sorted(there, key=lambda i: (usable[i], gain[i]))


def prompt_texts(result: "PatchingResult", arm: int, rows: Sequence[int]) -> list[str]:
    """Hover of prompts, beginning with their texts."""
    from textwrap import wrap

    effects = result.per_prompt()[arm].tolist()
    names = RUNS.get(result.direction, ("unpatched", "other"))
    unit = f" {in_figure(result.unit)}" if result.unit else ""
    found = []
    for i in rows:
        text = result.prompts[i] if i < len(result.prompts) else f"prompt {i}"
        lines = [
            in_figure(line)
            for line in wrap(text, PROMPT, max_lines=4, replace_whitespace=False, drop_whitespace=False) or [""]
        ]
        said = f"effect {effects[i]:.3f}" if effects[i] == effects[i] else "undetermined: the two runs are equal (0/0)"
        ends = f"{names[0]} {result.start[i]:.3f} → patched {result.patched[arm, i]:.3f}, {names[1]} {result.goal[i]:.3f}{unit}"
        placebo = "" if result.placebo is None else f"<br>placebo {result.placebo[arm, i]:.3f}{unit}"
        found.append("<br>".join([*lines, f"<b>{said}</b>", ends]) + placebo)
    return found


def _ticks(axis: str, values: Sequence[Any], result: "PatchingResult", prompt: int | None) -> list[str]:
    return labels(axis, values, result, None) if prompt is None else prompt_labels(axis, values, result, prompt)


def _largest(table: "pd.DataFrame") -> Any:
    found: Any = table[table["effect"].notna()]
    return found.loc[found["effect"].abs().sort_values(ascending=False).index[:TOP]].sort_values("effect")


def ring_xy(at: tuple[float, float] | None) -> dict[str, list[Any]]:
    """The ring's place, as the `x` and `y` of its trace, which is a figure's last."""
    return {"x": [at[0]], "y": [at[1]]} if at else {"x": [None], "y": [None]}


def _ring(at: tuple[float, float] | None) -> "go.Scatter":
    import plotly.graph_objects as go

    marker = {"symbol": "circle-open", "size": 18, "color": CHOSEN, "line": {"width": 3, "color": CHOSEN}}
    return go.Scatter(
        **ring_xy(at), mode="markers", marker=marker, hoverinfo="skip", showlegend=False, cliponaxis=False
    )


def _zero(*, up: bool) -> dict[str, Any]:
    across, along = ("x", "y") if up else ("y", "x")
    line = {"color": BLANK, "width": 1}
    return {
        "type": "line",
        f"{across}0": 0,
        f"{across}1": 0,
        f"{along}0": 0,
        f"{along}1": 1,
        f"{along}ref": "paper",
        "line": line,
    }
