"""Controls of the muting explorer, and how they stand on the screen."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.views.escaping import in_html, visible
from tracelens.views.muting_figures import STATES
from tracelens.views.widgets.muting_table import REFERENCE_BITS, MutedTable

if TYPE_CHECKING:
    from tracelens.views.widgets.muting import MutingExplorer

STYLE = """<style>
.tracelens-muting .tl-line, .tracelens-muting .tl-card { color: var(--jp-ui-font-color1, inherit); font-size: 12px; line-height: 1.4;
  overflow-wrap: anywhere; white-space: normal; }
.tracelens-muting .tl-card h3 { font-size: 14px; margin: 0 0 .2em; } .tracelens-muting .tl-card p { margin: .2em 0; }
.tracelens-muting .tl-key { white-space: nowrap; margin-right: 1em; }
.tracelens-muting .tl-key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 4px;
  vertical-align: -1px; }
.tracelens-muting .tracelens-card { max-height: 96px; overflow-y: auto; overflow-x: hidden; }
.tracelens-muting .widget-html, .tracelens-muting .widget-html-content { min-width: 0; max-width: 100%; white-space: normal;
  line-height: 1.4; }
.tracelens-muting .tracelens-list select { font-size: 12px; height: 100%; }
</style>"""


def steps(bits: list[float]) -> list[tuple[str, float]]:
    """Labels and values of the slider: 16 to 2 by halves, and the measured precisions' own bits where they lie between."""
    low = min([2.0, *bits])
    halves = [REFERENCE_BITS - k / 2 for k in range(int(2 * (REFERENCE_BITS - 2)) + 1)]
    found = sorted({*halves, *(b for b in bits if b < REFERENCE_BITS and b >= low)}, reverse=True)
    return [(f"{b:.4g}" + (" (reference)" if b == REFERENCE_BITS else ""), b) for b in found]


def controls_of(table: MutedTable) -> dict[str, Any]:
    """Name → control."""
    import ipywidgets as widgets

    options = steps(table.bits)
    who = [name for name, mask in (("safety", table.safety), ("capability", ~table.safety)) if mask.any()]
    sites = list(dict.fromkeys(table.site))
    return {
        "bits": widgets.SelectionSlider(
            options=options, index=0, description="bits", tooltip="bits per weight; nothing is interpolated between measured precisions"
        ),
        "play": widgets.Play(min=0, max=len(options) - 1, value=0, interval=350, tooltip="from 16 bits to 2"),
        "order": widgets.ToggleButtons(
            options=["by threshold", "by site"], style={"button_width": "auto"},
            tooltips=["those first that fall silent at most bits", "site after site, and so within each"],
        ),
        "site": widgets.Dropdown(
            options=[("all sites", ""), *((visible(name, 60), name) for name in sites)], description="list", tooltip="site",
        ),
        "who": widgets.ToggleButtons(
            options=who or ["safety"], style={"button_width": "auto"}, tooltips=["whose features are listed"] * max(1, len(who))
        ),
        "list": widgets.Select(options=[], rows=7, tooltip="features, those that fall silent first above"),
        "previous": widgets.Button(description="◀", tooltip="the feature before"),
        "next": widgets.Button(description="▶", tooltip="the next feature"),
    }  # fmt: skip


def key(table: MutedTable) -> str:
    """HTML: what the colours mean."""
    names = [name for name, k in zip(STATES, range(5), strict=False) if (table.state == k).any() or name == "muted"]
    if table.cause:
        names += [name for name in ("muted, it moved", "muted, clipped") if name not in names]
    cells = "".join(
        f'<span class="tl-key"><i style="background:{STATES[name]}"></i>{in_html(name)}</span>'
        for name in [*names, "chosen"]
    )
    return f'<span class="tl-line">{cells}</span>'


def filled(states: np.ndarray, order: np.ndarray, width: int) -> np.ndarray:
    """States in rows of so many cells, "" behind the last; [row, column]."""
    n = len(order)
    cells = np.full(-(-n // width) * width, len(STATES) - 1, np.int32)
    cells[:n] = states[order]
    return cells.reshape(-1, width)


def arranged(explorer: "MutingExplorer") -> list[Any]:
    """Rows of the box: the slider, what it shows, mosaic and list beside the two curves."""
    import ipywidgets as widgets

    c = explorer.controls
    row = widgets.Layout(width="100%", flex_flow="row wrap", align_items="center")
    widths = {"bits": "440px", "site": "230px", "previous": "42px", "next": "42px"}
    for name, control in c.items():
        control.add_class(f"tracelens-{name}")
        if name in widths:
            control.layout.width = widths[name]
    for name in ("bits", "site"):
        c[name].style.description_width = "auto"
    c["list"].layout = widgets.Layout(width="100%", height="176px")
    explorer.summary.add_class("tracelens-summary")
    explorer.card.add_class("tracelens-card")
    left = widgets.VBox(
        [
            explorer.figure,
            widgets.HTML(key(explorer.table)),
            widgets.HBox([c["who"], c["site"]], layout=row),
            c["list"],
        ],
        layout=widgets.Layout(width="52%", min_width="0", overflow="hidden"),
    )
    right = widgets.VBox(
        [
            explorer.shares,
            explorer.curve,
            widgets.HBox([c["previous"], c["next"], explorer.place], layout=row),
            explorer.card,
        ],
        layout=widgets.Layout(width="48%", min_width="0", overflow="hidden"),
    )
    return [
        widgets.HTML(STYLE, layout=widgets.Layout(display="none")),
        widgets.HBox([c["bits"], c["play"], c["order"]], layout=row),
        explorer.summary,
        widgets.HBox([left, right], layout=widgets.Layout(width="100%", align_items="flex-start")),
    ]
