"""Axes and filters of the drift explorer, as widgets."""

from typing import Any, get_args

import numpy as np

from tracelens.views.escaping import visible
from tracelens.views.widgets.choosing import Choice, Damage, behaviour_options, short
from tracelens.views.widgets.drift_table import AXES, AxisName, LiveFeatures

VIEWS: dict[str, tuple[AxisName, AxisName]] = {
    "activation: reference against quantized": ("mean_reference", "mean_quantized"),
    "strength when it fires": ("strength_reference", "strength_quantized"),
    "fidelity against importance": ("importance", "fidelity"),
    "fidelity against firing rate": ("rate_reference", "fidelity"),
    "fidelity against the same under noise": ("fidelity_noise", "fidelity"),
    "correlation against drift": ("drift", "correlation"),
    "muting against firing rate": ("rate_reference", "muting_rate"),
}
"""What may be looked at → the axes x and y."""
OWN = "axes of your own"


def importance_axis(live: LiveFeatures) -> AxisName:
    """Importance where it was measured of any feature; else the share of its site's activation energy."""
    return "importance" if np.isfinite(live.values["importance"]).any() else "share"


class DriftControls:
    """The widgets, and what they are set to.

    Attributes:
        view: a pair of axes by name. `x`, `y`: each axis. `log`: whether axes that span orders of magnitude are logarithmic.
        behaviour, site, damage, min_tokens, search: filters, see `Choice`.
        definitions: what the two axes show.
    """

    def __init__(self, live: LiveFeatures, min_active: int) -> None:
        import ipywidgets as widgets

        self._importance = importance_axis(live)
        quick = {"style": {"description_width": "initial"}}

        def placed(share: int, least: int) -> Any:
            return quick | {"layout": widgets.Layout(flex=f"{share} 1 {least}px", width="auto", min_width="0")}

        measured = {
            name: axis for name, axis in AXES.items() if name not in live.values or np.isfinite(live.values[name]).any()
        }
        names = [(axis.title, name) for name, axis in (measured or AXES).items()]
        self.view: Any = widgets.Dropdown(
            options=[*VIEWS, OWN], value=next(iter(VIEWS)), description="show", **placed(31, 220)
        )
        self.x: Any = widgets.Dropdown(
            options=names, value=self._start(names, "mean_reference"), description="x", **placed(27, 180)
        )
        self.y: Any = widgets.Dropdown(
            options=names, value=self._start(names, "mean_quantized"), description="y", **placed(27, 180)
        )
        self.log: Any = widgets.Checkbox(value=True, description="log axes", indent=False, **placed(0, 92))
        self.behaviour: Any = widgets.Dropdown(
            options=[(visible(label, 40), value) for label, value in behaviour_options(live)],
            description="behaviour",
            **placed(22, 170),
        )
        sites = [("all sites", ""), *((visible(short(name), 40), name) for name in live.site_sizes)]
        self.site: Any = widgets.Dropdown(options=sites, description="site", **placed(17, 120))
        self.damage: Any = widgets.Dropdown(options=list(get_args(Damage)), description="damage", **placed(14, 120))
        most = max([min_active, *live.n_active.tolist()])
        self.min_tokens: Any = widgets.BoundedIntText(
            value=min_active,
            min=0,
            max=most,
            description="tokens ≥",
            tooltip="tokens on which the reference fires it",
            **placed(14, 120),
        )
        self.search: Any = widgets.Text(
            description="find",
            placeholder="#123, or fidelity < .5",
            continuous_update=False,
            tooltip="numbers of features (#123, #7), conditions (fidelity < 0.5, n_active > 100), or both; then Enter",
            **placed(22, 170),
        )
        self.definitions: Any = widgets.HTML()
        for name in ("view", "x", "y", "log", "behaviour", "site", "damage", "search"):
            getattr(self, name).add_class(f"tracelens-{name}")
        self.min_tokens.add_class("tracelens-min-tokens")
        self.show_definitions()

    def choice(self) -> Choice:
        """Reads the filters."""
        return Choice(
            self.behaviour.value, self.site.value, self.damage.value, self.min_tokens.value, self.search.value
        )

    def view_of(self, x: AxisName, y: AxisName) -> str:
        """The name of a pair of axes."""
        names = {
            tuple(self._importance if n == "importance" else n for n in pair): name for name, pair in VIEWS.items()
        }
        return names.get((x, y), OWN)

    def show_definitions(self) -> None:
        """Puts the definition of both axes into the line under them, and into their tooltips."""
        from html import escape

        for side in (self.x, self.y):
            side.tooltip = f"{AXES[side.value].title}: {AXES[side.value].definition}"
        lines = [
            f"<b>{escape(AXES[side.value].title)}</b>: {escape(AXES[side.value].definition)}"
            for side in (self.x, self.y)
        ]
        self.definitions.value = f'<div class="tl-about">{" ".join(lines)}</div>'

    def _start(self, names: list[tuple[str, Any]], wish: AxisName) -> Any:
        known = [value for _, value in names]
        return wish if wish in known else known[0]
