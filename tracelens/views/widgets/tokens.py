"""`tokens_widget`: tokens coloured by one value each, or by several to choose from, as CircuitsVis draws them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tracelens.errors import MetricInputError
from tracelens.views import token_html
from tracelens.views.escaping import LONGEST, visible
from tracelens.views.style import QUANTIZED, REFERENCE
from tracelens.views.widgets.circuitsvis import circuitsvis_widget, redraw

Values = Sequence[Any] | np.ndarray
"""[token] or [token, kind]."""
MOST = 512
"""Tokens that are drawn; each is an element of the page with a tooltip of its own."""


def tokens_widget(
    tokens: Sequence[str],
    values: Values,
    *,
    labels: Sequence[str] | None = None,
    top: float | None = None,
    colour: str = QUANTIZED,
    negative: str = REFERENCE,
) -> "TokensView":
    """Tokens coloured by their values; the tooltip of each has the number.

    Args:
        values: one for each token; or for each token one of each kind, of which the reader chooses what to colour by.
        labels: of the kinds.
        top: the value of the full colour; the largest |value| without it. Says nothing where there are kinds: each has its own scale.
        colour, negative: of values above and below 0; kinds are blue above and red below.

    Raises `MissingLibraryError` without CircuitsVis (`token_html.strip` needs none), and `MetricInputError` for values that do not fit the
    tokens.
    """
    return TokensView(tokens, values, labels=labels, top=top, colour=colour, negative=negative)


def one_line(token: str) -> str:
    """A token as it is drawn: all characters seen, of a very long one the beginning; a newline also breaks the line."""
    return (visible(token, LONGEST) or "∅") + "\n" * ("\n" in token)


class TokensView:
    """What `tokens_widget` returns.

    Attributes:
        box: the ipywidgets box; what goes into other boxes.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        values: Values,
        *,
        labels: Sequence[str] | None = None,
        top: float | None = None,
        colour: str = QUANTIZED,
        negative: str = REFERENCE,
    ) -> None:
        import ipywidgets as widgets

        self._looks = {"labels": labels, "top": top, "colour": colour, "negative": negative}
        props, plain, note = self._drawn(tokens, values)
        self._kinds = "labels" in props
        self._view = circuitsvis_widget("ColoredTokensMulti" if self._kinds else "ColoredTokens", props, plain=plain)
        self._note = widgets.HTML(note)
        self.box = widgets.VBox([self._view, self._note])
        self.box.add_class("tracelens-tokens")

    def show(self, tokens: Sequence[str], values: Values) -> None:
        """Other tokens and values in the same place, as many kinds of them as before."""
        props, plain, note = self._drawn(tokens, values)
        if self._kinds != ("labels" in props):
            raise MetricInputError(
                "one value for each token and several kinds are two widgets: call tokens_widget again"
            )
        # The component keeps the bounds of the first values that it saw.
        redraw(self._view, props, plain=plain, key=f"{id(props)}" if self._kinds else "")
        self._note.value = note

    def _drawn(self, tokens: Sequence[str], values: Values) -> tuple[dict[str, Any], str, str]:
        """The component's props, the plain HTML, and what was left out."""
        table = np.asarray(values, dtype=float)
        if table.ndim not in (1, 2) or len(table) != len(tokens):
            raise MetricInputError(
                f"values of shape {list(table.shape)} for {len(tokens)} tokens: expected [{len(tokens)}] or [{len(tokens)}, kind]"
            )
        finite = np.isfinite(table)
        table = np.where(finite, table, 0.0)
        first = table if table.ndim == 1 else table[:, 0] if table.size else np.zeros(len(tokens))
        plain = token_html.css() + token_html.strip(tokens, first.tolist(), colour=self._looks["colour"])
        props: dict[str, Any] = {
            "tokens": [one_line(t) for t in tokens[:MOST]],
            "values": table[:MOST].round(6).tolist(),
        }
        if table.ndim == 2:
            labels = self._looks["labels"] or [str(i) for i in range(table.shape[1])]
            if len(labels) != table.shape[1]:
                raise MetricInputError(
                    f"{len(labels)} labels for {table.shape[1]} kinds of values: expected one for each"
                )
            props["labels"] = [visible(str(label), LONGEST) for label in labels]
        else:
            top = self._looks["top"] or float(np.abs(table).max(initial=0.0)) or 1.0
            props |= {"minValue": -top, "maxValue": top}
            props |= {
                "positiveColor": self._looks["colour"],
                "negativeColor": self._looks["negative"],
                "paddingBottom": 8,
            }
        notes = [f"The first {MOST} of {len(tokens):,} tokens are shown."] * (len(tokens) > MOST)
        if missing := int((~finite).sum()):
            notes.append(f"{missing:,} values that are not numbers are shown as 0.")
        return props, plain, " ".join(notes)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)
