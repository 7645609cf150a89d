"""Controls of the smearing explorer, and how they stand on the screen."""

from typing import TYPE_CHECKING, Any

from tracelens.views import token_html
from tracelens.views.escaping import visible
from tracelens.views.widgets.smearing_pairs import KINDS, StoredPairs

if TYPE_CHECKING:
    from tracelens.views.widgets.smearing import SmearingExplorer

LOWER = 190
"""Height in pixels of the list and of the card, which scroll by themselves."""
STYLE = f"""<style>
.tracelens-smearing .tl-line, .tracelens-smearing .tl-card {{ color: var(--jp-ui-font-color1, inherit); font-size: 12px; line-height: 1.4;
  overflow-wrap: anywhere; white-space: normal; }}
.tracelens-smearing .tl-card h3 {{ font-size: 14px; margin: 0 0 .2em; }}
.tracelens-smearing .tl-card h4 {{ font-size: 12px; margin: .5em 0 .1em; }}
.tracelens-smearing .tl-card p {{ margin: .2em 0; }} .tracelens-smearing [title] {{ cursor: help; }}
.tracelens-smearing .tracelens-card {{ max-height: {LOWER}px; overflow-y: auto; overflow-x: hidden; }}
.tracelens-smearing .widget-html, .tracelens-smearing .widget-html-content {{ min-width: 0; max-width: 100%; white-space: normal;
  line-height: 1.4; }}
.tracelens-smearing .tracelens-list select {{ font-size: 12px; height: 100%; }}
</style>"""
MOVED = {"continuous_update": True, "step": 0.01, "readout_format": ".2f"}


def controls_of(pairs: StoredPairs) -> dict[str, Any]:
    """Name → control."""
    import ipywidgets as widgets

    tau, delta = pairs.own
    sites = list(dict.fromkeys(pairs.site))
    behaviours = [(f"  {visible(name, 40)}", f"behaviour: {name}") for name in pairs.behaviours()]
    kinds = [
        ("all pairs", "all"),
        ("with any safety feature", "any safety"),
        *((kind, kind) for kind in KINDS),
        *behaviours,
    ]
    return {
        "tau": widgets.FloatSlider(
            value=max(tau, pairs.tau_floor), min=pairs.tau_floor, max=1.0, description="τ, cosine ≥",
            tooltip="least cosine of the two features in the quantized model", **MOVED,
        ),
        "delta": widgets.FloatSlider(
            value=max(delta, pairs.delta_floor), min=pairs.delta_floor, max=1.0, description="δ, rise ≥",
            tooltip="least rise of the cosine over that in the reference", **MOVED,
        ),
        "site": widgets.Dropdown(
            options=[("all sites", ""), *((visible(name, 60), name) for name in sites)], description="site", tooltip="site"
        ),
        "which": widgets.Dropdown(options=kinds, description="pairs", tooltip="which pairs, by what they join"),
        "reset": widgets.Button(description="audit's thresholds", tooltip="sets τ and δ to those of the audit"),
        "group": widgets.Dropdown(description="group", tooltip="features that are linked by smeared pairs, directly or through others"),
        "how": widgets.ToggleButtons(
            options=["graph", "matrix"], tooltips=["a line for each pair", "cosine after (above the diagonal) and before (below it)"],
            style={"button_width": "auto"},
        ),
        "list": widgets.Select(options=[], rows=9, tooltip="smeared pairs, those whose cosine rose most first"),
        "previous": widgets.Button(description="◀", tooltip="the pair before"),
        "next": widgets.Button(description="▶", tooltip="the next pair"),
    }  # fmt: skip


def arranged(explorer: "SmearingExplorer") -> list[Any]:
    """Rows of the box: thresholds, filters, what they give, the two figures, the list beside the card."""
    import ipywidgets as widgets

    c = explorer.controls
    row = widgets.Layout(width="100%", flex_flow="row wrap", align_items="center")
    widths = {
        "tau": "300px",
        "delta": "300px",
        "site": "215px",
        "which": "225px",
        "group": "290px",
        "previous": "42px",
        "next": "42px",
    }
    for name, control in c.items():
        control.add_class(f"tracelens-{name}")
        if name in widths:
            control.layout.width = widths[name]
        if name not in ("previous", "next", "reset", "how", "list"):
            control.style.description_width = "auto"
    c["list"].layout = widgets.Layout(width="100%", height=f"{LOWER - 34}px")
    explorer.summary.add_class("tracelens-summary")
    explorer.card.add_class("tracelens-card")
    halves = [
        widgets.VBox([figure], layout=widgets.Layout(width=width, min_width="0", overflow="hidden"))
        for figure, width in ((explorer.figure, "52%"), (explorer.groups_figure, "48%"))
    ]
    beside = widgets.VBox(
        [c["list"], widgets.HBox([c["previous"], c["next"], explorer.place], layout=row)],
        layout=widgets.Layout(flex="2 1 0", min_width="0", overflow="hidden"),
    )
    card = widgets.VBox([explorer.card], layout=widgets.Layout(flex="3 1 0", min_width="0", overflow="hidden"))
    return [
        widgets.HTML(STYLE + token_html.css(), layout=widgets.Layout(display="none")),
        widgets.HBox([c["tau"], c["delta"], c["reset"]], layout=row),
        widgets.HBox([c["site"], c["which"], c["group"], c["how"]], layout=row),
        explorer.summary,
        widgets.HBox(halves, layout=widgets.Layout(width="100%", align_items="flex-start")),
        widgets.HBox([beside, card], layout=widgets.Layout(width="100%", align_items="stretch")),
    ]
