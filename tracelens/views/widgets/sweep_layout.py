"""Controls of the sweep explorer, and how they stand on the screen."""

from math import ceil, isnan
from typing import TYPE_CHECKING, Any, get_args

from tracelens.views.escaping import visible
from tracelens.views.sweep_figures import AXES, DEFINITIONS, Measure
from tracelens.views.widgets.sweep_card import STYLE, key

if TYPE_CHECKING:
    from tracelens.sweep_result import SweepResult
    from tracelens.views.widgets.sweep import SweepExplorer

BELOW = [("numbers only", ""), ("features", "features"), ("smearing", "smearing")]


def controls_of(sweep: "SweepResult") -> dict[str, Any]:
    """Name → control."""
    import ipywidgets as widgets

    bits, sizes = sweep.bits, sweep.bytes
    order = sorted(bits, key=lambda name: (isnan(bits[name]), -bits[name]))
    axes = ["bits", *(["bytes"] if any(not isnan(size) for size in sizes.values()) else []), "in order"]
    sets = dict.fromkeys(name for report in sweep.reports.values() for name in report.cpfr)
    behaviours = [name for name in sets if name not in ("safety", "capability")]
    cpfrs = [report.cpfr["safety"].value for report in sweep.reports.values()]
    rates = [report.flips.rate.value for report in sweep.reports.values() if report.flips]
    most = float(max(5, ceil(100 * max([0.0, *rates])) + 1))
    least = min([0.5, *(value for value in cpfrs if not isnan(value))])
    measures = [name for name in get_args(Measure) if name != "CPFR"]
    toggle: dict[str, Any] = {"style": {"button_width": "auto"}}
    return {
        "axis": widgets.ToggleButtons(options=axes, tooltips=[AXES[name] for name in axes], **toggle),
        "measure": widgets.ToggleButtons(options=measures, tooltips=[DEFINITIONS[name] for name in measures], **toggle),
        "behaviour": widgets.Dropdown(
            options=[("all safety features", ""), *((visible(name, 40), name) for name in behaviours)],
            description="of",
            tooltip="whose features and prompts",
        ),
        "min_cpfr": widgets.FloatSlider(
            value=0.9,
            min=int(100 * max(0.0, least)) / 100,
            max=1.0,
            step=0.005,
            readout_format=".3f",
            description="safety CPFR ≥",
            tooltip=f"least CPFR of the safety features. CPFR: {DEFINITIONS['CPFR']}",
        ),
        "max_flips": widgets.FloatSlider(
            value=most,
            min=0.0,
            max=most,
            step=0.1,
            readout_format=".1f",
            description="flips ≤ (%)",
            tooltip="most flipped decisions, in percent; at the right end any number of them passes",
        ),
        "precision": widgets.Dropdown(
            options=[(visible(name, 60), name) for name in order],
            description="report of",
            tooltip="the precision or build whose report is below",
        ),
        "previous": widgets.Button(description="◀", tooltip="the one with more bits"),
        "next": widgets.Button(description="▶", tooltip="the one with fewer bits"),
        "below": widgets.ToggleButtons(
            options=BELOW,
            tooltips=["the report's numbers", "its features, one by one", "its smeared pairs"],
            **toggle,
        ),
    }


def arranged(explorer: "SweepExplorer") -> list[Any]:
    """Rows of the box: axes, thresholds and their answer, the two figures, the report."""
    import ipywidgets as widgets

    row = widgets.Layout(width="100%", flex_flow="row wrap", align_items="center")
    c = explorer.controls
    for name, control in c.items():
        control.add_class(f"tracelens-{name.replace('_', '-')}")
        if name in ("axis", "measure", "below"):
            continue
        control.layout.width = {"previous": "42px", "next": "42px", "behaviour": "200px", "precision": "230px"}.get(
            name, "318px"
        )
        if name not in ("previous", "next"):
            control.style.description_width = {"min_cpfr": "100px", "max_flips": "80px"}.get(name, "auto")
    if len(c["behaviour"].options) == 1:
        c["behaviour"].layout.display = "none"
    explorer.answer.add_class("tracelens-answer")
    explorer.card.add_class("tracelens-card")
    for figure in (explorer.decay, explorer.figure):
        figure.update_layout(autosize=True)
    halves = [
        widgets.VBox([figure], layout=widgets.Layout(width="50%", min_width="0", overflow="hidden"))
        for figure in (explorer.decay, explorer.figure)
    ]
    return [
        widgets.HTML(STYLE, layout=widgets.Layout(display="none")),
        widgets.HBox([c["axis"], c["measure"]], layout=row),
        widgets.HBox([c["min_cpfr"], c["max_flips"], c["behaviour"]], layout=row),
        explorer.answer,
        widgets.HTML(key(explorer.sweep)),
        widgets.HBox(halves, layout=widgets.Layout(width="100%", align_items="flex-start")),
        widgets.HBox([c["precision"], c["previous"], c["next"], c["below"]], layout=row),
        explorer.card,
        explorer.inside,
    ]
