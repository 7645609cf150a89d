"""CircuitsVis components as widgets, without a network: the library's own bundle, sent once per kernel, run once per page.

CircuitsVis by itself asks a server whether there is a network, and then loads its script from one, each time it shows something.
"""

from collections.abc import Mapping
from functools import cache
from gzip import compress
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tracelens.errors import MissingLibraryError

Component = Literal["ColoredTokens", "ColoredTokensMulti", "AttentionPattern", "AttentionHeads"]

_host: Any = None


def circuitsvis_widget(component: Component, props: Mapping[str, Any], *, plain: str = "", key: str = "") -> Any:
    """A widget that draws one component; set `widget.props` (or call `redraw`) and it is drawn anew in place.

    Args:
        props: as the component takes them, in types that JSON has; NaN is not among them. Text in them arrives as text.
        plain: HTML to stand in its place until the library has arrived, and where it cannot.
        key: with another key the component forgets what was clicked.

    Raises `MissingLibraryError` if CircuitsVis is not installed.
    """
    return _kind()(component=component, props=dict(props), plain=plain, key=key, host=_living_host().model_id)


def redraw(widget: Any, props: Mapping[str, Any], *, plain: str = "", key: str = "") -> None:
    """Changes what a widget draws, in one message."""
    with widget.hold_sync():
        widget.plain, widget.key, widget.props = plain, key, dict(props)


def bundle() -> Path:
    """The library's script, with React inside, where it is installed; nothing of it is imported."""
    found = find_spec("circuitsvis")
    path = Path(found.origin).parent / "dist" / "cdn" / "iife.js" if found and found.origin else None
    if path is None or not path.is_file():
        raise MissingLibraryError(
            f"CircuitsVis, which draws tokens and attention, {'has no ' + str(path) if path else 'is not installed'}: "
            "pip install --force-reinstall 'circuitsvis>=1.43'"
        )
    return path


def _living_host() -> Any:
    """The one model of this kernel that holds the bundle; a new one if somebody closed it, as `Widget.close_all` does."""
    global _host
    if _host is None or _host.comm is None:
        _host = _host_kind()(bundle=_packed())
    return _host


@cache
def _packed() -> bytes:
    return compress(bundle().read_bytes())


@cache
def _host_kind() -> Any:
    import anywidget
    import traitlets

    class CircuitsVisHost(anywidget.AnyWidget):
        _esm = "export default {};"
        bundle = traitlets.Bytes().tag(sync=True)

    return CircuitsVisHost


@cache
def _kind() -> Any:
    import anywidget
    import traitlets

    class CircuitsVis(anywidget.AnyWidget):
        _esm = _file("circuitsvis.js")
        _css = _file("circuitsvis.css")
        version = traitlets.Unicode(version("circuitsvis")).tag(sync=True)
        host = traitlets.Unicode().tag(sync=True)
        component = traitlets.Unicode().tag(sync=True)
        plain = traitlets.Unicode().tag(sync=True)
        key = traitlets.Unicode().tag(sync=True)
        props = traitlets.Dict().tag(sync=True)

    return CircuitsVis


def _file(name: str) -> str:
    return files("tracelens.views.widgets").joinpath(name).read_text(encoding="utf-8")
