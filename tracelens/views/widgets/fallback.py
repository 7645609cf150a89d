"""What stands where a widget cannot live: a sentence and a picture that need neither scripts nor a network."""

import logging
from base64 import b64encode
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

HOW = "A still picture: run this cell again, in a notebook with a running kernel, to explore."

CSS = """
.jp-OutputArea-child:has([data-tracelens-still="{key}"]) + .jp-OutputArea-child .jp-OutputArea-output:not(:has(*)) { display: none; }
"""
"""Hides what JupyterLab writes in the widget's place while it looks for its model, and when there is none: text without elements."""


def still_html(figure: "go.Figure", sentence: str, key: str) -> str:
    """The sentence, how to get the widget, and the figure as an image."""
    picture, drawn = "", _drawn(figure)
    if drawn:
        # As an image: whatever the labels hold, nothing in it can run.
        source = b64encode(drawn.encode()).decode()
        picture = f'<img style="max-width:100%" alt="{escape(sentence)}" src="data:image/svg+xml;base64,{source}">'
    return (
        f'<div data-tracelens-still="{escape(key)}" class="tracelens-still"><style>{CSS.replace("{key}", key)}</style>'
        f"<p>{escape(sentence)}</p><p><em>{HOW}</em></p>{picture}</div>"
    )


def _drawn(figure: "go.Figure") -> str:
    from tracelens.views.widgets.svg import svg_of

    try:
        return svg_of(figure)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        # The widget that it stands in for must be shown all the same.
        log.warning("no still picture of this figure", exc_info=True)
        return ""
