"""`export_figure`: a figure as a picture for a paper (PNG, SVG, PDF), or as a page that opens without a network."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.errors import ExportError, UnknownNameError
from tracelens.views.style import template

if TYPE_CHECKING:
    import plotly.graph_objects as go

PICTURES = ("png", "svg", "pdf")
ENDINGS = (*PICTURES, "html")
WIDTH = 1000
"""Pixels across, where neither the call nor the figure says; subtitles are broken for some 700."""
NOWHERE = "http://127.0.0.1:9"
"""A proxy at which nothing listens: what kaleido's browser would ask of the network fails, and local files are still read."""
INSTALL = "pip install 'kaleido>=1' and a Chromium or Chrome (Debian: apt install chromium; or `kaleido_get_chrome`)"


def export_figure(
    figure: "go.Figure",
    path: str | Path,
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float | int = 2,
    dark: bool = False,
) -> Path:
    """Writes a figure to a file whose ending says what kind: .png, .svg, .pdf or .html; returns its path.

    Pictures are drawn by kaleido in a browser that is installed; it is given the plotly.js of this machine and no MathJax (`$` is
    text in these figures), and reaches no network. An .html holds plotly.js (4.8 MB) and needs no network either.

    Args:
        width, height: in pixels; without them what the figure says, and else `WIDTH`.
        scale: pixels of a .png per pixel of the figure; says nothing to the other kinds.
        dark: for a dark page.

    Raises `UnknownNameError` for another ending, `ExportError` if kaleido or a browser is not there, or fails; the figure that was given
    is not changed.
    """
    import plotly.graph_objects as go

    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in ENDINGS:
        raise UnknownNameError.of(
            f"ending of {path.name} for a figure:", path.suffix, [f".{known}" for known in ENDINGS]
        )
    figure = go.Figure(figure).update_layout(template=template(dark=dark))
    figure.update_layout(width=width or figure.layout.width, height=height or figure.layout.height)
    if kind == "html":
        written = figure.to_html(include_plotlyjs=True, config={"displaylogo": False, "responsive": True}).encode()
    else:
        written = _drawn(figure, kind, scale, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written)
    return path


def _drawn(figure: "go.Figure", kind: str, scale: float | int, path: Path) -> bytes:
    if find_spec("kaleido") is None:
        raise ExportError(f"{path} cannot be drawn: kaleido is not installed. {INSTALL}; or write {path.stem}.html")
    if (found := _kaleido_version()) < 1:
        raise ExportError(
            f"{path} cannot be drawn: kaleido {found} is too old for this plotly. {INSTALL}; or write {path.stem}.html"
        )
    import kaleido
    from kaleido.errors import ChromeNotFoundError

    options: dict[str, Any] = {"format": kind, "scale": scale, "width": figure.layout.width or WIDTH}
    if figure.layout.height:
        options["height"] = figure.layout.height
    try:
        return kaleido.calc_fig_sync(figure, opts=options, kopts={"mathjax": False, "proxy_server": NOWHERE})
    except ChromeNotFoundError as error:
        raise ExportError(
            f"{path} cannot be drawn: kaleido finds no Chromium or Chrome. {INSTALL}, or name one in the environment "
            f"variable BROWSER_PATH; or write {path.stem}.html"
        ) from error
    except Exception as error:  # whatever a browser does wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExportError(
            f"{path} cannot be drawn: kaleido's browser failed ({reason}); write {path.stem}.html"
        ) from error


def _kaleido_version() -> int:
    """The first part of it; 0 where it does not say."""
    try:
        return int(version("kaleido").split(".")[0])
    except (PackageNotFoundError, ValueError):
        return 0
