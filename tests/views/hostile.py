"""Text that must arrive as text: what to put into results, and what a reader of a figure then sees."""

import copy
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from html import unescape
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd

from tracelens.causal.places import Place
from tracelens.sites import Site

HOSTILE = {
    "script": "<script>window.hacked=1</script>",
    "closing": "</script><script>window.hacked=2</script>",
    "image": "<img/src=x/onerror=window.hacked=3>",
    "vector": "<svg/onload=window.hacked=4>",
    "link": '<a href="javascript:window.hacked=5">here</a>',
    "bold": "<b>bold</b><br>",
    "quotes": "\"double\" 'single' `back`",
    "entity": "&lt;i&gt; &amp; &quot;",
    "template": "%{hacked} ${window.hacked=6} {0}",
    "formula": "$\\frac{1}{2}$",
    "emoji": "😀👩‍👧",
    "right to left": "שלום עולם",
    "override": "\u202eabc",
    "newline": "one\ntwo\r\nthree",
    "separator": "one\u2028two\u2029three",
    "control": "a\x00b\x1bc",
    "surrogate": "a\ud800b",
    "long": "x" * 3000,
}
"""Name → text."""

EVIL = '"q" <b>b</b><script>window.hacked=1</script> $y$ %{hacked} &lt; 😀 שלום'
"""Of all in one what a figure could take for markup."""

FREE = {
    *("label", "label_a", "label_b", "reference", "quantized", "metric", "unit", "reason", "fires_above"),
    *("name", "names", "prompts", "precision", "precisions", "architecture"),
}
"""Fields that hold whatever a caller or a checkpoint says."""
COLUMNS = ("label", "precision", "prompt", "behaviour", "behaviour_i", "behaviour_j", "component")
MEANT = ("capability", "safety", "feature", "neuron")
"""Words of a column that have a meaning in the code."""

OURS = re.compile(r"</?(?:b|br|i|sub|sup|extra|span)(?: style='[^'<>]*')?>")
"""Tags that our own figures write; all else in angle brackets is somebody else's."""
FILLED = re.compile(
    r"%\{(?:x|y|z|text|hovertext|customdata(?:\[\d+\])*|marker\.\w+|label|value|fullData\.name)(?::[^{}]*)?\}"
)
SHOWN = (
    "text",
    "hovertext",
    "hovertemplate",
    "texttemplate",
    "name",
    "ticktext",
    "customdata",
    "title",
    "label",
    "x",
    "y",
)
"""Keys of a figure under which strings are drawn."""


def poisoned(result: Any) -> Any:
    """A copy of a result in which every text that could come from outside ends in `EVIL`."""
    # A place in the model is no free text: whatever has another name is refused where it is read.
    if is_dataclass(result) and not isinstance(result, type | Site | Place):
        made = copy.copy(result)
        for field in fields(made):
            old = getattr(made, field.name)
            object.__setattr__(made, field.name, _text(old) if field.name in FREE else poisoned(old))
        return made
    if isinstance(result, pd.DataFrame):
        return result.assign(
            **{c: [_text(v) for v in result[c]] for c in COLUMNS if c in result and _is_text(result[c])}
        )
    if isinstance(result, list | tuple) and type(result) in (list, tuple):
        return type(result)(poisoned(part) for part in result)
    if isinstance(result, dict):
        return {key: poisoned(value) for key, value in result.items()}
    return result


def strings(part: Any, key: str = "") -> Iterator[str]:
    """Every string of a figure's dict that is drawn."""
    if isinstance(part, dict):
        for name, value in part.items():
            # A template's own texts are ours, a type's name is not drawn.
            if name not in ("template", "type", "legendgroup", "uid", "meta"):
                yield from strings(value, name)
    elif isinstance(part, list | tuple | np.ndarray):
        for value in part:
            yield from strings(value, key)
    elif isinstance(part, str) and key in SHOWN:
        yield part


def read(text: str) -> str:
    """What plotly shows of a text: our tags acted upon, everything else read as it stands."""
    left = FILLED.sub("", OURS.sub("", text))
    assert not re.search(r"<\s*/?\s*[a-z!]", left, re.IGNORECASE), f"a tag: {text[:300]}"
    assert "%{" not in left, f"a template: {text[:300]}"
    assert "$" not in left, f"a formula: {text[:300]}"
    assert "&quot;" not in left.replace("&amp;quot;", ""), f"plotly knows no &quot;: {text[:300]}"
    assert left.replace("\u200d", "").replace("\xa0", "").isprintable(), (
        f"characters that cannot be seen: {left[:300]!r}"
    )
    return unescape(left)


def _is_text(column: pd.Series) -> bool:
    return len(column) > 0 and all(isinstance(value, str) for value in column)


def _text(value: Any) -> Any:
    if isinstance(value, str):
        return value if value in MEANT else f"{value} {EVIL}"
    if isinstance(value, tuple):
        return tuple(_text(part) for part in value)
    return poisoned(value)


class Seen(HTMLParser):
    """What a browser would make of HTML: its text, and whether anything in it could act."""

    ACTS = ("script", "iframe", "object", "embed", "form", "meta", "link", "base")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self._styled = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in self.ACTS, f"<{tag}>"
        self._styled = tag == "style"
        for name, value in attrs:
            assert not name.startswith("on"), f"<{tag} {name}>"
            # A picture of our own is in the page itself.
            assert name not in ("src", "href") or (value or "").startswith(("data:image/", "#")), (
                f"<{tag} {name}={value}>"
            )
            self.text += f" {value}" * (name in ("title", "aria-label", "alt"))

    def handle_endtag(self, tag: str) -> None:
        self._styled = False

    def handle_data(self, data: str) -> None:
        self.text += data * (not self._styled)


def written(widget: Any) -> str:
    """All that an ipywidgets tree says, as a reader sees it; raises where text from outside could act."""
    said = []
    for part in (widget, *_inside(widget)):
        name = type(part).__name__
        if name == "HTML":
            said.append(Seen(part.value).text)
        elif name in ("Label", "Text", "Textarea", "Combobox"):
            said.append(part.value)
        assert not getattr(part, "description_allow_html", False), name
        said += [str(option) for option in getattr(part, "_options_labels", ())]
        said += [part.description] if isinstance(getattr(part, "description", None), str) else []
        if hasattr(part, "to_plotly_json"):
            said += map(read, strings(part.to_dict()))
    return " ".join(said)


def _inside(widget: Any) -> Iterator[Any]:
    for child in getattr(widget, "children", ()):
        yield child
        yield from _inside(child)
