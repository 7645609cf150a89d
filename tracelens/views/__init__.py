"""Results in, text, figures, pages and widgets out. No view runs a model, the prompt explorer aside.

Public names are resolved on first use, so that importing this loads neither plotly nor ipywidgets.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "tracelens.views.attribution_figures": ("attribution_figure", "bound_figure", "carriers_figure", "check_figure"),
    "tracelens.views.decomposition_figures": ("decomposition_figure",),
    "tracelens.views.drift_figures": ("drift_figure",),
    "tracelens.views.export": ("export_figure",),
    "tracelens.views.feature_damage_figures": ("feature_damage_figure",),
    "tracelens.views.figures": ("audit_figure", "sweep_figure"),
    "tracelens.views.fragility_figures": ("fragility_figure", "importance_figure"),
    "tracelens.views.health_figures": ("health_figure",),
    "tracelens.views.muting_figures": ("causes_figure", "thresholds_figure"),
    "tracelens.views.patching_figures": ("patching_figure",),
    "tracelens.views.pathway_figures": ("pathways_figure",),
    "tracelens.views.plan_figures": ("plan_figure",),
    "tracelens.views.prompt_figures": ("look_figure", "margins_figure", "next_tokens_figure"),
    "tracelens.views.repair_figures": ("curve_figure", "direction_figure"),
    "tracelens.views.report": ("audit_page",),
    "tracelens.views.smearing_figures": ("smearing_figure",),
    "tracelens.views.survival_figures": ("forecast_figure", "overlap_figure", "prediction_figure", "survival_figure"),
    "tracelens.views.widgets.drift": ("FeatureDriftExplorer",),
    "tracelens.views.widgets.muting": ("MutingExplorer",),
    "tracelens.views.widgets.patching": ("PatchingExplorer",),
    "tracelens.views.widgets.prompt": ("PromptExplorer",),
    "tracelens.views.widgets.shell": ("Explorer",),
    "tracelens.views.widgets.smearing": ("SmearingExplorer",),
    "tracelens.views.widgets.sweep": ("SweepExplorer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF]

if TYPE_CHECKING:
    from tracelens.views.attribution_figures import attribution_figure, bound_figure, carriers_figure, check_figure
    from tracelens.views.decomposition_figures import decomposition_figure
    from tracelens.views.drift_figures import drift_figure
    from tracelens.views.export import export_figure
    from tracelens.views.feature_damage_figures import feature_damage_figure
    from tracelens.views.figures import audit_figure, sweep_figure
    from tracelens.views.fragility_figures import fragility_figure, importance_figure
    from tracelens.views.health_figures import health_figure
    from tracelens.views.muting_figures import causes_figure, thresholds_figure
    from tracelens.views.patching_figures import patching_figure
    from tracelens.views.pathway_figures import pathways_figure
    from tracelens.views.plan_figures import plan_figure
    from tracelens.views.prompt_figures import look_figure, margins_figure, next_tokens_figure
    from tracelens.views.repair_figures import curve_figure, direction_figure
    from tracelens.views.report import audit_page
    from tracelens.views.smearing_figures import smearing_figure
    from tracelens.views.survival_figures import forecast_figure, overlap_figure, prediction_figure, survival_figure
    from tracelens.views.widgets.drift import FeatureDriftExplorer
    from tracelens.views.widgets.muting import MutingExplorer
    from tracelens.views.widgets.patching import PatchingExplorer
    from tracelens.views.widgets.prompt import PromptExplorer
    from tracelens.views.widgets.shell import Explorer
    from tracelens.views.widgets.smearing import SmearingExplorer
    from tracelens.views.widgets.sweep import SweepExplorer


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tracelens.views' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
