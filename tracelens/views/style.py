"""What all figures share: colours, and a template for light and dark.

Every colour that means something stands here, so that it means the same in every figure. They are taken from the palettes for colour-blind
readers of Okabe & Ito (2008) and of Tol (muted scheme, 2021), and `tests/views/test_colours.py` measures that those which stand beside each
other are told apart with each kind of colour blindness; where two are close, a marker, a dash or a place of its own tells them apart too.
"""

from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

REFERENCE, QUANTIZED = "#5B6470", "#BF4396"
SAFETY = "#D55E00"
CAPABILITY = "#2F7FC1"
FLIP = {"refuse→comply": "#CC79A7", "comply→refuse": "#56B4E9"}
CONTROL = {"noise": "#8A8F98", "permuted": "#6A4C93", "bf16": "#009E73", "random": "#E69F00", "labels": "#6B4423"}
CAUSE = {"moved": "#56B4E9", "clipped": "#CC79A7"}
SURVIVAL = {"survived": "#44AA99", "blurred": "#DDCC77", "damaged": "#882255"}
STEP = {"compute": "#009E73", "weights": "#88CCEE", "activations": "#999933", "kv_cache": "#882255"}
PREDICTOR, SECOND_PREDICTOR = "#88CCEE", "#999933"
TOWARDS, AWAY = "#0F8B8D", "#A6611A"
"""Of patching: towards the run whose activations are put in, and away from it."""
CHOSEN = "#E69F00"
"""What a reader has selected."""
SERIES = ("#332288", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#882255", "#999933", "#6B4423")
"""Of things that have no colour of their own (models, orders, kinds of matrices); each also has a marker of its own."""
QUIET = "#8A8F98"
"""Lines and points that are there to be compared with."""
WHISKER = "#5B6470"
INK, PAPER = "#24292F", "#FFFFFF"
"""Only on top of a colour: on a dark page they would not be seen."""
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif"

SUBTITLE, LINE = 110, 19
"""Characters of a subtitle's line, which fill some 700 pixels, and a line's height in pixels."""


def translucent(colour: str, alpha: float) -> str:
    """A `#rrggbb` colour as CSS rgba."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"


def dressed(figure: "go.Figure", title: str, subtitle: str, height: int, *, legend_rows: int = 1) -> "go.Figure":
    """The figure with the template, its titles, and room for them: plotly breaks no lines, and lets a legend grow into what is above it.

    `height` is that with two lines of subtitle and one of legend; every further one adds to it.
    """
    lines = wrap(subtitle, SUBTITLE, break_on_hyphens=False)
    house: Any = template().layout
    more = LINE * (max(0, len(lines) - 2) + legend_rows - 1)
    return figure.update_layout(
        template=template(),
        title={"text": title, "subtitle": {"text": "<br>".join(lines)}},
        height=height + more,
        margin_t=house.margin.t + more,
        legend_y=1,
    )


def template(*, dark: bool = False) -> "go.layout.Template":
    """The one plotly template: quiet axes, no chart junk, the same on paper and on a dark page."""
    import plotly.graph_objects as go

    ink, grid, paper = ("#D9DDE3", "#333A44", "#15181D") if dark else ("#24292F", "#E6E9ED", "#FFFFFF")
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "tickcolor": grid,
        "ticklen": 4,
        "title": {"font": {"size": 13}, "standoff": 8},
        "automargin": True,
        "exponentformat": "power",
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": ink},
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "title": {
                "font": {"size": 18},
                "subtitle": {"font": {"size": 13}},
                **{
                    "x": 0,
                    "xref": "container",
                    "pad": {"l": 20, "t": 18},
                    "yref": "container",
                    "y": 1,
                    "yanchor": "top",
                },
            },
            "margin": {"l": 80, "r": 24, "t": 116, "b": 56},
            "xaxis": axis,
            "yaxis": axis,
            "annotationdefaults": {
                "font": {"size": 12, "color": ink},
                "showarrow": False,
                "bgcolor": translucent(paper, 0.75),
            },
            "legend": {
                "orientation": "h",
                "x": 0,
                "yanchor": "bottom",
                "font": {"size": 12},
                "bgcolor": "rgba(0,0,0,0)",
            },
            "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
            "hovermode": "closest",
            "bargap": 0.05,
        }
    )
