"""Figures on a page: their data as text, drawn by the page's one script; a sentence where no script runs."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from html import unescape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tracelens.views.escaping import in_html
from tracelens.views.style import LINE, template

if TYPE_CHECKING:
    import plotly.graph_objects as go

HEADING = 40
"""Pixels of a figure's title, which a page sets above it, where it can break lines."""
WEBGL = ("scattergl", "heatmapgl", "splom", "parcoords", "scatter3d", "surface")
"""Kinds of traces whose drawing builds code at run time, which the page must then allow."""


def figure_html(figure: "go.Figure", name: str, *, numbers_in: str) -> str:
    """The figure as HTML; `numbers_in` says where the same numbers stand as text."""
    drawn = json.loads(str(figure.to_json()))
    layout = drawn["layout"]
    layout.pop("template", None)
    heading = layout.pop("title", {})
    title, subtitle = heading.get("text", ""), heading.get("subtitle", {}).get("text", "")
    spare = HEADING + LINE * (subtitle.count("<br>") + 1)
    layout["height"] = layout.get("height", 450) - spare
    margin = layout.setdefault("margin", {})
    house: Any = template().layout
    margin["t"] = max(24, margin.get("t", house.margin.t) - spare)
    layout["autosize"] = True
    said, more = plain(title), plain(subtitle)
    label = in_html(f"Figure: {said}. {more}")
    return (
        f'<figure id="figure-{name}"><figcaption><b>{in_html(said)}.</b> {in_html(more)} The numbers stand in {in_html(numbers_in)}.'
        f'</figcaption>\n<div class="wide" role="region" tabindex="0" aria-label="{in_html(said)}">'
        f'<div class="plot" role="img" aria-label="{label}" style="height:{layout["height"]}px">'
        '<p class="soft">This figure is drawn by a script in this page, and scripts are switched off or failed here. '
        "All numbers are in the tables.</p></div>\n"
        f'<script type="application/json">{embedded(drawn)}</script></div></figure>'
    )


def scripts() -> list[str]:
    """plotly.js and the page's own script, in this order."""
    from plotly.offline import get_plotlyjs

    own = files("tracelens.views").joinpath("page.js").read_text(encoding="utf-8")
    # A browser reads line ends as \n before it compares hashes.
    return [text.replace("\r\n", "\n").replace("\r", "\n") for text in (get_plotlyjs(), own)]


def themes() -> str:
    """The light and the dark template, as data for the script."""
    import plotly.io as pio

    both = [json.loads(str(pio.to_json(template(dark=dark)))) for dark in (False, True)]
    return f'<script type="application/json" id="themes">{embedded(both)}</script>'


def policy(allowed: list[str], body: str) -> str:
    """A Content-Security-Policy under which these scripts run and no others, and nothing is fetched.

    Where a figure is drawn by WebGL its library builds code at run time, and `unsafe-eval` is needed for it.
    """
    hashes = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in allowed)
    evaluated = " 'unsafe-eval'" if any(f'"type":"{kind}"' in body for kind in WEBGL) else ""
    return (
        f"default-src 'none'; script-src {hashes}{evaluated}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(value: Any) -> str:
    """JSON that cannot end the script that it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def plain(text: str) -> str:
    """Text of a plotly figure without its tags."""
    return unescape(re.sub(r"<[^>]*>", "", text.replace("<br>", " "))).strip()
