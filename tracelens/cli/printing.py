"""What commands write beside their results: figures, paths, and nothing on stdout that a library says."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.audit_report import AuditReport

DEAD_SHOWN = 20


@contextlib.contextmanager
def quiet():
    """Sends what libraries print to stderr, and their warnings nowhere: stdout holds results only."""
    import warnings

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_figure(figure: "go.Figure", out: Path) -> list[Path]:
    """The figure as a page and, where kaleido and a browser are installed, as a picture."""
    from tracelens.errors import ExportError
    from tracelens.views.export import export_figure

    paths = [write_page(figure, out / "figure.html")]
    with contextlib.suppress(ExportError):  # a picture is a convenience; what goes wrong without it is of no interest
        paths.append(export_figure(figure, out / "figure.png"))
    return paths


def write_page(figure: "go.Figure", path: Path) -> Path:
    """The figure as a page that needs no network."""
    from tracelens.output import write_atomically

    return write_atomically(path, figure.to_html(include_plotlyjs=True, config={"displaylogo": False}))


def print_paths(paths: list[Path]) -> None:
    print("\nWrote " + "\n      ".join(str(path) for path in paths))


def print_dead(report: "AuditReport", path: Path) -> Path:
    """Prints the features that an audit found silent, safety features first; all of them go to a file, which is returned."""
    from tracelens.output import write_atomically
    from tracelens.studies import dead_features

    dead = dead_features(report)
    safety = int((dead["behaviour"] != "capability").sum())
    print(
        f"\nSilent in {report.label}: {safety} of {len(report.safety_features)} safety features, "
        f"{len(dead) - safety} of {len(report.features) - len(report.safety_features)} capability features"
    )
    if len(dead):
        print(dead.head(DEAD_SHOWN).to_string(index=False, formatters={"muting_rate": "{:.1%}".format}))
    if len(dead) > DEAD_SHOWN:
        print(f"… and {len(dead) - DEAD_SHOWN} more, in the file")
    return write_atomically(path, dead.to_csv(index=False))
