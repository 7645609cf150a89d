"""Turns a live figure into another one of the same kinds of traces, in one message to the browser."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

KEPT = ("template", "autosize")
"""Of a live figure's layout: its theme and its width are the page's."""


def redraw(live: Any, figure: Any) -> None:
    """Gives the live figure the other one's traces and layout. What is the same already is not sent.

    A live figure keeps its traces, so that clicks on them go on being heard: where the new figure has fewer, the last ones are hidden.
    Raises `ValueError` if it has more, or another kind of trace in a place.
    """
    new = [trace.to_plotly_json() for trace in figure.data]
    kinds = [trace.type for trace in live.data]
    if [trace["type"] for trace in new] != kinds[: len(new)]:
        raise ValueError(f"a figure of {[trace['type'] for trace in new]} cannot be drawn over one of {kinds}")
    with live.batch_update():
        for trace, values in zip(live.data, new, strict=False):
            trace.update(_changes(trace, {"visible": True} | values, kept=("type", "uid")), overwrite=True)
        for trace in live.data[len(new) :]:
            trace.update(visible=False)
        live.update_layout(_changes(live.layout, figure.layout.to_plotly_json(), kept=KEPT), overwrite=True)


def padded(figure: Any, n_traces: int) -> "go.Figure":
    """The figure with hidden scatters behind its own, for what may come to be drawn over it."""
    import plotly.graph_objects as go

    return figure.add_traces([go.Scatter(visible=False) for _ in range(n_traces - len(figure.data))])


def _changes(part: Any, values: dict[str, Any], kept: tuple[str, ...]) -> dict[str, Any]:
    """What must be set for the part to have these values and no others, but for `kept`."""
    old = part.to_plotly_json()
    gone = {name: None for name in old if name not in values and name not in kept}
    new = {name: value for name, value in values.items() if name not in KEPT and _differs(old.get(name), value)}
    return {name: value for name, value in (gone | new).items() if name != "type"}


def _differs(old: Any, new: Any) -> bool:
    try:
        return bool(old != new)
    except ValueError:  # arrays
        return True
