"""Which widgets a result can be explored in."""

from typing import TYPE_CHECKING, Any

from tracelens.errors import UnknownNameError

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport
    from tracelens.sweep_result import SweepResult
    from tracelens.views.widgets.shell import Explorer


def explore_audit(report: "AuditReport", view: str = "features") -> "Explorer":
    """`"features"`: a `FeatureDriftExplorer`; `"smearing"`: a `SmearingExplorer`. Raises `UnknownNameError` for another."""
    return _open(report, view, {"features": "FeatureDriftExplorer", "smearing": "SmearingExplorer"})


def explore_sweep(sweep: "SweepResult", view: str = "sweep") -> "Explorer":
    """`"sweep"`: a `SweepExplorer`; `"muting"`: a `MutingExplorer`. Raises `UnknownNameError` for another."""
    return _open(sweep, view, {"sweep": "SweepExplorer", "muting": "MutingExplorer"})


def _open(result: Any, view: str, widgets: dict[str, str]) -> "Explorer":
    if view not in widgets:
        raise UnknownNameError.of("view", view, widgets)
    from tracelens import views

    return getattr(views, widgets[view])(result)
