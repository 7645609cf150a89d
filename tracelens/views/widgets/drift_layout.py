"""How the parts of the drift explorer stand on the screen."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracelens.views.widgets.drift import FeatureDriftExplorer

CARD = 350
"""Height of the card, beyond which it scrolls by itself."""
STYLE = f"""<style>
.tracelens-drift .tl-summary, .tracelens-drift .tl-about {{ color: var(--jp-ui-font-color1, inherit); font-size: 12px; line-height: 1.4;
  overflow-wrap: anywhere; }}
.tracelens-drift .tl-about {{ color: var(--jp-ui-font-color2, inherit); }}
.tracelens-drift .tracelens-card {{ max-height: {CARD}px; overflow-y: auto; overflow-x: hidden; border-top: 1px solid
  var(--jp-border-color2, #ccc); padding-top: 4px; }}
.tracelens-drift .widget-html, .tracelens-drift .widget-html-content {{ min-width: 0; max-width: 100%; }}
.tracelens-drift .widget-html-content {{ white-space: normal; }}
.tracelens-drift .tracelens-list select {{ font-size: 12px; height: 100%; }}
</style>"""


def arranged(explorer: "FeatureDriftExplorer", style: str) -> list[Any]:
    """Rows of the box: axes, filters, the figure beside list and card, definitions and the sentence on what is chosen."""
    import ipywidgets as widgets

    c = explorer.controls
    row = widgets.Layout(width="100%", flex_flow="row wrap", align_items="center")
    buttons = (explorer.previous, explorer.next, explorer.clear)
    for button, name in zip(buttons, ("previous", "next", "clear"), strict=True):
        button.layout.width, button.layout.min_width, button.layout.flex = "auto", "0", "0 1 auto"
        button.add_class(f"tracelens-{name}")
    explorer.jump.layout.width, explorer.jump.layout.min_width, explorer.jump.layout.flex = "auto", "0", "1 1 0"
    explorer.jump.add_class("tracelens-jump")
    explorer.list.add_class("tracelens-list")
    explorer.card.add_class("tracelens-card")
    explorer.summary.add_class("tracelens-summary")
    beside = widgets.VBox(
        [
            explorer.list,
            widgets.HBox([explorer.previous, explorer.next, explorer.place], layout=row),
            widgets.HBox([explorer.jump, explorer.clear], layout=row),
            explorer.card,
        ],
        layout=widgets.Layout(flex="46 1 380px", width="auto", min_width="0", overflow="hidden"),
    )
    drawn = widgets.VBox(
        [explorer.figure, explorer.summary, c.definitions],
        layout=widgets.Layout(flex="54 1 440px", width="auto", min_width="0", overflow="hidden"),
    )
    return [
        widgets.HTML(STYLE + style, layout=widgets.Layout(display="none")),
        widgets.HBox([c.view, c.x, c.y, c.log], layout=row),
        widgets.HBox([c.behaviour, c.site, c.damage, c.min_tokens, c.search], layout=row),
        widgets.HBox(
            [drawn, beside], layout=widgets.Layout(width="100%", flex_flow="row wrap", align_items="flex-start")
        ),
    ]
