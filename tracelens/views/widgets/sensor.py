"""What a widget must know of the page it is on, and what it says there: the theme, a line of text, whether something is under way."""

from functools import cache
from pathlib import Path
from typing import Any


@cache
def _kind() -> Any:
    import anywidget
    import traitlets

    class PageLine(anywidget.AnyWidget):
        _esm = Path(__file__).with_name("sensor.js")
        dark = traitlets.Bool(False, help="Whether the page's theme is dark.").tag(sync=True)
        text = traitlets.Unicode("", help="A sentence for the person; shown as text, never as HTML.").tag(sync=True)
        busy = traitlets.Unicode("", help="What is under way; empty if nothing is.").tag(sync=True)
        still = traitlets.Unicode("", help="Name of the pictures that stand in for the widget, which it hides.").tag(
            sync=True
        )

    return PageLine


def page_line(still: str) -> Any:
    """A line below the widget that is read out when it changes; its `dark` says whether the page's theme is dark."""
    return _kind()(still=still)
