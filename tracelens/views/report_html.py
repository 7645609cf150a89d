"""What the page of an audit is built of: sections, tables and folded parts, as HTML that needs no script to be read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from tracelens.stats import Estimate, wilson
from tracelens.views.escaping import in_html
from tracelens.views.numbers import NOTHING, Section


@dataclass(frozen=True)
class Part:
    """A section of the page, and the numbers in it that the report itself does not hold under a name."""

    anchor: str
    """Its id on the page, and its key in the JSON."""
    title: str
    """As text."""
    body: str
    """As HTML."""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def html(self) -> str:
        return f'<section id="{self.anchor}">\n<h2>{in_html(self.title)}</h2>\n{self.body}\n</section>'


@dataclass(frozen=True)
class Column:
    """How a column of `table` is set."""

    title: str
    text: bool = False
    """Words, set to the left."""
    wraps: bool = False
    """A long text, such as a prompt."""
    tip: str = ""
    """Definition, shown on hovering."""

    @property
    def kind(self) -> str:
        return ' class="prompt"' if self.wraps else ' class="text"' if self.text else ""


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[Any]],
    *,
    tools: bool = False,
) -> str:
    """A table; the first cell of a row is its heading. Cells are HTML already, captions and titles text.

    With `tools`, and where scripts run, its columns can be sorted and its rows filtered.
    """
    head = "".join(
        f'<th scope="col"{c.kind.replace("prompt", "text")}{_tip(c.tip)}>{in_html(c.title)}</th>' for c in columns
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row"{c.kind}>{cell}</th>' if i == 0 else f"<td{c.kind}>{cell}</td>"
            for i, (c, cell) in enumerate(zip(columns, row, strict=True))
        )
        + "</tr>\n"
        for row in rows
    )
    return _framed(caption, f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>", tools=tools)


def sections_table(caption: str, heads: Sequence[str], sections: Iterable[Section]) -> str:
    """A table whose sections have a title across it; the first number of each row is the report's own."""
    head = "<td></td>" + "".join(f'<th scope="col">{in_html(name)}</th>' for name in heads)
    bodies = []
    for section in sections:
        title = (
            f'<tr><th scope="rowgroup" colspan="{len(heads) + 1}" class="group">{in_html(section.title)}</th></tr>\n'
        )
        rows = "".join(
            f'<tr><th scope="row">{indented(what)}</th><td><b>{in_html(own)}</b></td>'
            + "".join(f"<td>{in_html(cell)}</td>" for cell in beside)
            + "</tr>\n"
            for what, own, *beside in section.rows
        )
        bodies.append(f"<tbody>\n{title}{rows}</tbody>")
    return _framed(caption, f"<thead><tr>{head}</tr></thead>\n" + "\n".join(bodies))


def _framed(caption: str, inner: str, *, tools: bool = False) -> str:
    """In a frame that scrolls by itself, also by keyboard, so that the page does not."""
    label = in_html(caption)
    kind = ' class="tools"' if tools else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f"<table{kind}><caption>{in_html(caption)}</caption>\n{inner}</table></div>"
    )


def folded(summary: str, body: str, *, anchor: str = "", kind: Literal["", "card", "appendix"] = "") -> str:
    """A part that can be opened; `summary` and `body` are HTML.

    Cards of a section can be opened all at once; all is opened for printing but an appendix, which is long and in the JSON.
    """
    place = f' id="{anchor}"' if anchor else ""
    kind_of = f' class="{kind}"' if kind else ""
    return f"<details{place}{kind_of}><summary>{summary}</summary>\n{body}</details>"


def paragraph(text: str, kind: str = "") -> str:
    """Text as a paragraph."""
    css = f' class="{kind}"' if kind else ""
    return f"<p{css}>{in_html(text)}</p>"


def isolated(text: str) -> str:
    """Text from outside: escaped, its line breaks shown, its direction kept from the text around it."""
    return f'<bdi dir="auto">{in_html(text)}</bdi>'


def coloured(behaviour: str) -> str:
    """A behaviour's name in the colour of its set of features."""
    kind = "capability" if behaviour == "capability" else "safety"
    return f'<span class="{kind}">{in_html(behaviour)}</span>'


def number(value: Any, places: int = 3, *, least: bool = False, sign: bool = False) -> str:
    """With so many decimals, a dash for what is none; with `least`, what would read 0.000 is said to be below the last of them."""
    if value is None or not isfinite(value):
        return NOTHING
    if least and value < 10**-places:
        return f"&lt; {10**-places:.{places}f}"
    return f"{value:{'+' if sign else ''}.{places}f}"


def indented(text: str) -> str:
    return in_html(text).replace("  ", "&emsp;")


def _tip(text: str) -> str:
    return f' title="{in_html(text)}"' if text else ""


def rate_of(share: float, n: float | int) -> Estimate | None:
    """A share of so many tokens, with Wilson's interval; None if there are none, or no share."""
    if not isfinite(share) or not n:
        return None
    return wilson(min(int(n), round(share * int(n))), int(n))
