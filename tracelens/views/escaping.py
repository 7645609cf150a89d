"""Text from outside (tokens, prompts, labels, names) on its way into HTML and into plotly figures: it arrives as text."""

import re
from html import escape
from unicodedata import category

SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\u2028": "↵", "\u2029": "¶", "\ufeff": "⟨U+FEFF⟩", "\u200b": "⟨U+200B⟩"}
"""Characters that break lines or cannot be seen → what stands for them."""

# Among them the marks that turn the direction of what follows: they would reorder the page around them.
SPECIAL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u200b\ufeff\u202a-\u202e\u2066-\u2069]")
LONGEST = 120
"""Characters of one token that are shown."""


def visible(text: str, longest: int | None = None) -> str:
    """The text in one line in which every character can be seen (spaces aside) and encoded; not escaped.

    A line break is ↵, a control character its picture (␀) or its number, half of a surrogate pair U+FFFD. Joiners between letters or emoji
    stay as they are. Beyond `longest` characters the rest is an ellipsis and its length.
    """
    left = "" if longest is None or len(text) <= longest else f"… ({len(text):,} characters)"
    return SPECIAL.sub(_sign, text if not left else text[:longest]) + left


def brief(text: str, longest: int = 24) -> str:
    """The beginning of a text for where there is no room for more, as beside an axis: a tick as long as a figure leaves it no place to
    draw in; not escaped."""
    text = visible(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def in_html(text: object) -> str:
    """The text for HTML: between tags and inside quoted attributes."""
    return escape(visible(str(text)))


def in_figure(text: object) -> str:
    """The text for any field of a plotly figure: titles, names, ticks, hover text, templates.

    Plotly reads a few tags and a few entities, not `&quot;`, which `html.escape` writes; it fills in `%{…}` inside templates; and gives
    what stands between two dollars to MathJax, where the page has one that it knows. It decodes numeric entities after all of these.
    """
    plain = escape(visible(str(text)), quote=False)
    return plain.replace("$", "&#36;").replace("%{", "%&#123;")


def _sign(match: re.Match[str]) -> str:
    character = match[0]
    if character in SIGNS:
        return SIGNS[character]
    code = ord(character)
    if category(character) == "Cs":
        return "\ufffd"
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
