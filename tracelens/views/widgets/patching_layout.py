"""Controls of the patching explorer, and how they stand on the screen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracelens.views.escaping import visible
from tracelens.views.widgets.patching_card import STYLE
from tracelens.views.widgets.patching_choice import Entry
from tracelens.views.widgets.patching_table import DEFINITIONS

if TYPE_CHECKING:
    from tracelens.causal.patching_result import PatchingResult
    from tracelens.views.widgets.patching import PatchingExplorer

TIPS = {
    "direction": "repair: reference activations into the quantized run (what is enough); damage: the other way (what is needed)",
    "metric": "what is measured of the answer",
    "site": "which activations are replaced",
    "sweep": "over what the replacements go",
    "precision": "of the quantized model",
    "result": "the results by name",
}
ALL = -1
"""Stands for all prompts: a dropdown shows no option whose value is None."""
PROMPT = 70
"""Characters of a prompt in the list."""


def controls_of(offers: dict[str, list[str]], entry: Entry) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Facet → control; and measure, test, mask, panel, top, prompt, still without what they offer."""
    import ipywidgets as widgets

    facets: dict[str, Any] = {}
    for facet, values in offers.items():
        if facet == "direction":
            control = widgets.ToggleButtons(
                options=values, tooltips=[TIPS[facet]] * len(values), style={"button_width": "auto"}
            )
        else:
            control = widgets.Dropdown(options=values, description=facet, tooltip=TIPS[facet])
        control.value = entry.facets[facet]
        facets[facet] = control
    told = "; ".join(f"{name}: {DEFINITIONS[name]}" for name in ("effect", "closed", "change", "versus placebo"))
    measure = widgets.Dropdown(options=[("effect", "effect")], description="colour", tooltip=told)
    test = widgets.Dropdown(
        options=[("placebo", "placebo")],
        description="● differs from",
        tooltip=f"● adjusted p < 0.05. {DEFINITIONS['p']}",
    )
    mask = widgets.Checkbox(
        value=False, description="hide the rest", indent=False, tooltip="show marked replacements only"
    )
    panel = widgets.Dropdown(options=[("", ())], description="of", tooltip="the value of the sweep's further axes")
    top = widgets.Select(options=[], description="", tooltip="replacements, the largest first; ● marked")
    prompt = widgets.Dropdown(
        options=[("", ALL)], description="prompt", tooltip="all prompts, or one alone with its own tokens"
    )
    return facets, (measure, test, mask, panel, top, prompt)


def buttons() -> tuple[Any, Any]:
    """One up and one down in the list of replacements."""
    import ipywidgets as widgets

    return (
        widgets.Button(description="◀ previous", tooltip="the replacement before it in the list"),
        widgets.Button(description="next ▶", tooltip="the replacement after it in the list"),
    )


class Quiet:
    """While it lasts, controls that are set from here do not react."""

    def __init__(self, explorer: "PatchingExplorer") -> None:
        self.explorer = explorer

    def __enter__(self) -> None:
        self.before, self.explorer._quiet = self.explorer._quiet, True

    def __exit__(self, *raised: object) -> None:
        self.explorer._quiet = self.before


def offer(control: Any, options: list[tuple[str, Any]], wanted: Any = None) -> None:
    """Gives a control its options, and keeps its value or the one wanted if they have it."""
    wanted = control.value if wanted is None else wanted
    if tuple(control.options) != tuple(options):
        control.options = options
    values = [value for _, value in options]
    if values:
        control.value = wanted if wanted in values else values[0]


def options_of_prompts(result: "PatchingResult", usable: Sequence[bool]) -> list[tuple[str, int]]:
    """The prompts by number and text."""
    n = len(result.start)
    options: list[tuple[str, int]] = [(f"all {n} together", ALL)]
    for i in range(n):
        text = visible(result.prompts[i], PROMPT) if i < len(result.prompts) else "prompt"
        options.append((f"{i + 1}: {text}{'' if usable[i] else '  (0/0)'}", i))
    return options


def arranged(explorer: "PatchingExplorer") -> list[Any]:
    """Rows of the box: choices, the two figures side by side, the list beside the card."""
    import ipywidgets as widgets

    row = widgets.Layout(width="100%", flex_flow="row wrap", align_items="center")
    named = explorer.facets | {
        "measure": explorer.measure,
        "test": explorer.test,
        "mask": explorer.mask,
        "panel": explorer.panel,
        "prompt": explorer.prompt,
        "top": explorer.top,
    }
    for name, control in named.items():
        control.add_class(f"tracelens-{name}")
        if name in ("direction", "top"):
            continue
        control.layout.width = {"prompt": "330px", "mask": "120px", "test": "190px"}.get(name, "205px")
        control.style = {"description_width": "auto" if name in ("test", "prompt", "mask") else "58px"}
    explorer.top.layout = widgets.Layout(width="100%", height="112px")
    for button, name in ((explorer.previous, "previous"), (explorer.next, "next")):
        button.add_class(f"tracelens-{name}")
        button.layout = widgets.Layout(width="auto", min_width="0", flex="1 1 0")
    steps = widgets.HBox([explorer.previous, explorer.next], layout=widgets.Layout(width="100%"))
    explorer.card.add_class("tracelens-card")
    for figure in (explorer.figure, explorer.strip):
        figure.update_layout(autosize=True)

    def beside(left: list[Any], right: list[Any], share: int) -> Any:
        boxes = [
            widgets.VBox(parts, layout=widgets.Layout(width=f"{width}%", min_width="0", overflow="hidden"))
            for parts, width in ((left, share), (right, 100 - share))
        ]
        return widgets.HBox(boxes, layout=widgets.Layout(width="100%", align_items="flex-start"))

    shown = [control for name, control in explorer.facets.items()]
    return [
        widgets.HTML(STYLE, layout=widgets.Layout(display="none")),
        widgets.HBox([*shown, explorer.panel], layout=row),
        widgets.HBox([explorer.measure, explorer.test, explorer.mask, explorer.prompt], layout=row),
        explorer.line,
        beside([explorer.figure], [explorer.strip], 60),
        beside([explorer.top, steps], [explorer.card], 34),
    ]
