"""`Explorer`: what all widgets share. A box, its figures, a message line, the theme, and a still picture for where it cannot live."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tracelens.views.style import template

if TYPE_CHECKING:
    import plotly.graph_objects as go

VIEW = "application/vnd.jupyter.widget-view+json"


class Explorer:
    """A widget that shows one result.

    A subclass builds its controls in `__init__`, passes the whole layout to `_assemble`, and overrides `still` and `__str__`.
    Figures that it shows are made by `self._live(figure)`, which dresses them for the notebook's theme and keeps them so.

    In a notebook it makes two outputs: a still picture with a sentence, and the widget, which hides the picture while it lives. The picture
    is what is left in a saved notebook whose kernel is gone, or on a page that knows no widgets.

    Attributes:
        box: the ipywidgets box; what Jupyter shows.
        figures: the live plotly figures (`FigureWidget`), in the order in which they were made.
        dark: whether the notebook's theme is dark; the browser says it once the widget is drawn.

    Raises:
        MissingLibraryError: if ipywidgets, anywidget or plotly cannot be imported.
    """

    box: Any

    def __init__(self) -> None:
        _check_libraries()
        from tracelens.views.widgets.sensor import page_line

        self.figures: list[Any] = []
        self.dark = False
        self._key = uuid4().hex
        self._line = page_line(self._key)
        self._line.observe(lambda change: self._wear(change["new"]), "dark")

    def still(self) -> "go.Figure":
        """The same as a static figure, as it stands now."""
        raise NotImplementedError

    @property
    def message(self) -> str:
        """The sentence that stands below the widget now; "" if none."""
        return self._line.text

    def _assemble(self, *rows: Any) -> None:
        """Puts the rows one under the other, the message line below."""
        import ipywidgets as widgets

        self.box = widgets.VBox([*rows, self._line])
        self.box.add_class("tracelens")

    def _live(self, figure: "go.Figure") -> Any:
        """The figure as a widget whose points can be clicked, in the notebook's theme."""
        from tracelens.views.widgets.live_figure import live_figure

        live = live_figure(figure)
        live.update_layout(template=template(dark=self.dark))
        self.figures.append(live)
        return live

    def _say(self, text: str) -> None:
        """Shows a sentence below the widget, as text; "" takes it away."""
        self._line.text = text

    @contextmanager
    def _busy(self, what: str) -> Iterator[None]:
        """Says that something is under way, with a wheel that turns, for as long as the block runs. For long work, in its thread."""
        self._line.busy = what
        try:
            yield
        finally:
            self._line.busy = ""

    def _guarded(self, change: Callable[[], None]) -> None:
        """Runs a reaction to the user; what goes wrong by the user's doing (`TracelensError`) is said in place."""
        from tracelens.errors import TracelensError

        try:
            self._say("")
            change()
        except TracelensError as error:
            self._say(str(error))

    def _wear(self, dark: bool) -> None:
        self.dark = dark
        for figure in self.figures:
            figure.update_layout(template=template(dark=dark))

    def _still_html(self) -> str:
        from tracelens.views.widgets.fallback import still_html

        return still_html(self.still(), str(self), self._key)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display({"text/html": self._still_html(), "text/plain": str(self)}, raw=True)
        display({VIEW: self._view()}, raw=True)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """All in one output, for who puts it together by hand: the widget, and for others the sentence and the still figure."""
        return {VIEW: self._view(), "text/html": self._still_html(), "text/plain": str(self)}

    def _view(self) -> dict[str, Any]:
        return {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}


def _check_libraries() -> None:
    from importlib import import_module

    from tracelens.errors import MissingLibraryError

    for name in ("ipywidgets", "anywidget", "plotly"):
        try:
            import_module(name)
        except ImportError as error:
            raise MissingLibraryError(
                f"a widget needs {name}, which cannot be imported ({error}): "
                f"pip install {name}, in the environment of the notebook's kernel, and restart it"
            ) from error
