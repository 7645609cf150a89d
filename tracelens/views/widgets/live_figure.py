"""plotly's `FigureWidget`, with the five megabytes of its script sent to the page once instead of with every figure."""

from functools import cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go


@cache
def _kinds() -> tuple[Any, Any]:
    """The figure's class, and that of the model that carries the script."""
    import ipywidgets as widgets
    import plotly
    import plotly.graph_objects as go
    import traitlets
    from plotly.serializers import custom_serializers

    def told() -> Any:
        """What the page tells Python, which need not be sent back to it."""
        return traitlets.Dict(allow_none=True).tag(sync=True, echo_update=False, **custom_serializers)

    class Script(widgets.Widget):
        code = traitlets.Unicode().tag(sync=True)

    class LiveFigure(go.FigureWidget):
        _esm = Path(__file__).with_name("live_figure.js")
        _plotly = traitlets.Unicode().tag(sync=True)
        """Which model carries the script."""
        _plotly_version = traitlets.Unicode(plotly.__version__).tag(sync=True)

        @traitlets.default("_plotly")
        def _the_script(self) -> str:
            return _script().model_id

        _js2py_pointsCallback = told()
        _js2py_relayout = told()

        @traitlets.observe("_js2py_pointsCallback")
        def _handler_js2py_pointsCallback(self, change: Any) -> None:
            said = change["new"]
            if said and said["event_type"] == "plotly_selected":
                # FigureWidget would send the page what the page has just painted, and all would be drawn again.
                taken: list[list[int]] = [[] for _ in self._data]
                for trace, point in zip(said["points"]["trace_indexes"], said["points"]["point_indexes"], strict=True):
                    taken[trace].append(point)
                for values, points in zip(self._data, taken, strict=True):
                    values["selectedpoints"] = points
            super()._handler_js2py_pointsCallback(change)  # pyright: ignore[reportCallIssue]

        def get_state(self, key: Any = None, drop_defaults: bool = False) -> Any:
            """What is sent. JSON knows no NaN and no infinity: gaps are null there."""
            return finite(self._state(key, drop_defaults))

        def _state(self, key: Any, drop_defaults: bool) -> Any:
            state = super().get_state(key, drop_defaults)
            # A page that is opened later asks for all, and FigureWidget would answer with the figure as it was made.
            if key is None and "_layout_obj" in vars(self):
                serialise: Any = self.trait_metadata("_widget_data", "to_json")
                state["_widget_data"] = serialise(self._data, self)
                state["_widget_layout"] = serialise(self._layout_obj._props, self)
            return state

    return LiveFigure, Script


def finite(value: Any) -> Any:
    """The same with None for every float in it that is not a number or not finite; arrays in buffers stay."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    # Text, of which there may be one for each of many points, is not looked into.
    return [v if type(v) is str else finite(v) for v in value] if isinstance(value, list | tuple) else value


_SCRIPTS: list[Any] = []
"""The one model of this process that carries the script."""


def _script() -> Any:
    """It; made anew if it was closed (`Widget.close_all()`)."""
    import plotly.graph_objects as go

    if not _SCRIPTS or _SCRIPTS[0].comm is None:
        _SCRIPTS[:] = [_kinds()[1](code=str(go.FigureWidget._esm))]
    return _SCRIPTS[0]


def live_figure(figure: "go.Figure") -> Any:
    """The figure as a widget: a `FigureWidget` whose changes are drawn at once and whose points can be clicked."""
    live = _kinds()[0](figure)
    live.add_class("tracelens-figure")
    return live
