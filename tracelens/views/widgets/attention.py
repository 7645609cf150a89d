"""Attention patterns: of one model, and of the two models of a pair side by side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tracelens.errors import MetricInputError
from tracelens.views import token_html
from tracelens.views.escaping import brief, in_html, visible
from tracelens.views.style import QUANTIZED, REFERENCE
from tracelens.views.widgets.circuitsvis import circuitsvis_widget, redraw

MOST_TOKENS = 64
"""Tokens of a pattern that are drawn, the last of them: a pattern has the square of it in cells."""
MOST_CELLS = 16_000
"""Cells of all small patterns together: on every move of the pointer over them CircuitsVis draws all of them again."""


LABEL = 14
"""Characters of a token beside a pattern."""
COLUMN = {"flex": "1 1 200px", "min_width": "0", "max_width": "420px"}


def attention_widget() -> "AttentionView":
    """An empty view of one model's heads; `.show(tokens, patterns, names)` fills it. Its `.box` goes into other boxes."""
    return AttentionView()


def total_variation(
    reference: Float[np.ndarray, "*layer head query key"], quantized: Float[np.ndarray, "*layer head query key"]
) -> Float[np.ndarray, "*layer head"]:
    """How much each head's pattern differs: ½ Σ_key |p_ref − p_quant|, mean over the queries. In [0, 1]; 0 only if they are the same.

    The total variation distance of two distributions. A causal model's first token can attend to itself only, so that it adds 0
    to every mean: on short prompts the heads' order is right and the numbers are small.
    """
    return np.abs(np.asarray(reference) - np.asarray(quantized)).sum(-1).mean(-1) / 2


class AttentionView:
    """The heads of one model as small patterns, of which one is enlarged; hovering enlarges, clicking keeps.

    Attributes:
        box: the ipywidgets box.
    """

    def __init__(self) -> None:
        import ipywidgets as widgets

        self._view = circuitsvis_widget("AttentionHeads", {"attention": [[[0.0]]], "tokens": [" "]}, plain=" ")
        self._note = widgets.HTML()
        self.box = widgets.VBox([self._view, self._note])
        self.box.add_class("tracelens-attention")

    def show(self, tokens: Sequence[str], patterns: np.ndarray, names: Sequence[str] | None = None) -> None:
        """Patterns of some heads on one prompt, [head, query, key]; a row of a pattern is what one token attends to, and adds to 1."""
        patterns = _checked(tokens, patterns)
        names = [f"Head {i}" for i in range(len(patterns))] if names is None else list(names)
        if len(names) != len(patterns):
            raise MetricInputError(f"{len(names)} names for {len(patterns)} heads: expected one for each")
        cut, shown, left = _last(tokens, patterns)
        heads = max(1, MOST_CELLS // max(1, len(cut)) ** 2)
        notes = [left] if left else []
        if heads < len(patterns):
            notes.append(
                f"The first {heads} of {len(patterns)} heads are shown: more of this length would freeze the page."
            )
        props = {
            "tokens": cut,
            "attention": _listed(shown[:heads]),
            "attentionHeadNames": [visible(str(name), 40) for name in names[:heads]],
            "maxValue": 1,
            "minValue": -1,
            "positiveColor": QUANTIZED,
        }
        redraw(self._view, props, plain=_plain(tokens, patterns), key=f"{min(heads, len(patterns))}")
        self._note.value = " ".join(notes)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)


class AttentionPair:
    """The same head in both models, reference left, quantized right, their difference beside them.

    Heads are listed by `total_variation`, those that differ most first.

    Attributes:
        box: the ipywidgets box.
        layer: the dropdown of layers.
        head: the dropdown of the layer's heads.
        distances: total variation of every head; [layer, head].
    """

    def __init__(self) -> None:
        import ipywidgets as widgets

        self.layer = widgets.Dropdown(description="layer", layout={"width": "220px"})
        self.layer.add_class("tracelens-layer")
        tip = "Total variation distance between the head's two patterns, mean over the tokens: 0 the same, 1 nothing in common"
        self.head = widgets.Dropdown(description="head", tooltip=tip, layout={"width": "220px"})
        self.head.add_class("tracelens-head")
        self.distances: np.ndarray = np.zeros((0, 0))
        self._views = [self._pattern(colour) for colour in (REFERENCE, QUANTIZED, QUANTIZED)]
        key = '<b><span class="tl-k" style="background:{}"></span>{}</b>'
        titles = [
            key.format(REFERENCE, "reference"),
            key.format(QUANTIZED, "quantized"),
            f"<b>quantized {key.format(QUANTIZED, 'more')} or {key.format(REFERENCE, 'less')}</b>",
        ]
        columns = [
            widgets.VBox([widgets.HTML(token_html.css() + title), view], layout=COLUMN)
            for title, view in zip(titles, self._views, strict=True)
        ]
        self._note = widgets.HTML()
        self.box = widgets.VBox([widgets.HBox([self.layer, self.head]), widgets.HBox(columns), self._note])
        self.box.add_class("tracelens-attention-pair")
        self.layer.observe(lambda _: self._list_heads(), "value")
        self.head.observe(lambda _: self._draw(), "value")

    def show(
        self,
        tokens: Sequence[str],
        reference: np.ndarray,
        quantized: np.ndarray,
        names: Sequence[str] | None = None,
    ) -> None:
        """Both models' patterns on one prompt; the layer with the head that differs most is opened.

        Args:
            reference, quantized: [layer, head, query, key]; a causal model's are 0 above the diagonal.
            names: of the layers; their numbers without it.

        Raises `MetricInputError` if the shapes of the two and the tokens do not fit together.
        """
        self._reference, self._quantized = (_checked(tokens, side, dimensions=4) for side in (reference, quantized))
        if self._reference.shape != self._quantized.shape:
            shapes = f"{list(self._reference.shape)} and {list(self._quantized.shape)}"
            raise MetricInputError(f"patterns of the two models have shapes {shapes}: expected the same")
        names = [str(i) for i in range(len(self._reference))] if names is None else list(names)
        if len(names) != len(self._reference):
            raise MetricInputError(f"{len(names)} names for {len(self._reference)} layers: expected one for each")
        self._tokens = list(tokens)
        self.distances = total_variation(self._reference, self._quantized)
        worst = self.distances.max(axis=1, initial=0.0)
        # The list of heads follows the layer: drawn once, below, however much of the two changes.
        self._quiet = True
        try:
            self.layer.options = [
                (f"{name} (up to {d:.3f})", i) for i, (name, d) in enumerate(zip(names, worst, strict=True))
            ]
            self.layer.value = int(worst.argmax()) if len(worst) else None
        finally:
            self._quiet = False
        self._list_heads()

    _quiet = False

    def _list_heads(self) -> None:
        if self._quiet or self.layer.value is None:
            return
        found = self.distances[self.layer.value]
        self._quiet = True
        try:
            self.head.options = [(f"head {h}: {found[h]:.3f}", int(h)) for h in np.argsort(-found, kind="stable")]
            self.head.index = 0 if len(found) else None
        finally:
            self._quiet = False
        self._draw()

    def _draw(self) -> None:
        if self._quiet or self.head.value is None:
            return
        layer, head = self.layer.value, self.head.value
        r, q = self._reference[layer, head], self._quantized[layer, head]
        top = float(np.abs(q - r).max(initial=0.0)) or 1.0
        scales = (1.0, 1.0, top)
        left = ""
        for view, pattern, scale in zip(self._views, (r, q, q - r), scales, strict=True):
            cut, shown, left = _last(self._tokens, pattern[None])
            props = view.props | {"tokens": cut, "attention": _listed(shown)[0], "maxValue": scale, "minValue": -scale}
            redraw(view, props, plain=_plain(self._tokens, pattern[None]))
        same = "The two patterns are the same." if not (q - r).any() else f"Full colour of the difference: {top:.3g}."
        self._note.value = in_html(f"{same} {left}")

    def _pattern(self, colour: str) -> Any:
        props = {"tokens": [" "], "attention": [[0.0]], "zoomed": False, "minValue": -1, "maxValue": 1}
        props |= {"positiveColor": colour or QUANTIZED, "negativeColor": REFERENCE}
        return circuitsvis_widget("AttentionPattern", props, plain=" ")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)


def _checked(tokens: Sequence[str], patterns: Any, dimensions: int = 3) -> np.ndarray:
    array = np.asarray(patterns, dtype=float)
    n = len(tokens)
    if array.ndim != dimensions or array.shape[-2:] != (n, n):
        expected = f"[{'layer, ' * (dimensions == 4)}head, {n}, {n}]"
        raise MetricInputError(f"attention patterns of shape {list(array.shape)} for {n} tokens: expected {expected}")
    if not np.isfinite(array).all():
        raise MetricInputError(
            "attention patterns hold values that are not numbers: look at the model that they came from"
        )
    return array


def _last(tokens: Sequence[str], patterns: np.ndarray) -> tuple[list[str], np.ndarray, str]:
    """The last tokens, what they attend to among themselves, and a sentence about what that leaves out."""
    cut = [brief(token, LABEL) or "∅" for token in tokens[-MOST_TOKENS:]]
    if len(tokens) <= MOST_TOKENS:
        return cut, patterns, ""
    left = f"The last {MOST_TOKENS} of {len(tokens):,} tokens are shown; distances are over all."
    return cut, patterns[:, -MOST_TOKENS:, -MOST_TOKENS:], left


def _listed(patterns: np.ndarray) -> list[Any]:
    return patterns.round(4).tolist()


def _plain(tokens: Sequence[str], patterns: np.ndarray) -> str:
    """What the last token attends to, mean over the heads."""
    received = np.abs(patterns[:, -1]).mean(axis=0).tolist() if patterns.size else []
    title = "attention of the last token"
    return token_html.css() + token_html.strip(list(tokens)[: len(received)], received, colour=QUANTIZED, title=title)
