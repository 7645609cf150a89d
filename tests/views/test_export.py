import importlib.util
import os
import socket
import struct
import threading

import plotly.graph_objects as go
import pytest

from tests.views.made_up import made_up_report
from tracelens.errors import ExportError, TracelensError, UnknownNameError
from tracelens.views import export
from tracelens.views.export import export_figure


def why_not() -> str:
    """Why no picture can be drawn here; "" if one can."""
    if importlib.util.find_spec("kaleido") is None:
        return "kaleido is not installed"
    from choreographer.browsers.chromium import Chromium

    return (
        "" if os.environ.get("BROWSER_PATH") or Chromium.find_browser(skip_local=False) else "kaleido finds no chromium"
    )


draws = pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can")


@pytest.fixture(scope="module")
def figure():
    return made_up_report().plot()


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


@draws
def test_pictures_of_each_kind(figure, tmp_path):
    before = figure.to_dict()
    png = export_figure(figure, tmp_path / "new" / "x.png", width=700, height=500, scale=1)
    assert size_of(png.read_bytes()) == (700, 500)
    assert size_of(export_figure(figure, tmp_path / "y.PNG", width=700, height=500).read_bytes()) == (1400, 1000)
    svg = export_figure(figure, str(tmp_path / "x.svg"), dark=True).read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "rgb(21, 24, 29)" in svg, "the dark paper"
    assert "safety features" in svg
    assert export_figure(figure, tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    assert figure.to_dict() == before


@draws
def test_nothing_is_asked_of_the_network(tmp_path, monkeypatch):
    """All that the browser would ask goes to a proxy; here to one that listens and writes down what for."""
    asked, server = [], socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(300).decode("latin-1").splitlines()[:1])

    threading.Thread(target=listen, daemon=True).start()
    monkeypatch.setattr(export, "NOWHERE", f"http://127.0.0.1:{server.getsockname()[1]}")
    text = go.Figure(go.Scatter(x=[1], y=[1], text=["$x^2$"], mode="text"))
    svg = export_figure(text, tmp_path / "x.svg").read_text(encoding="utf-8")
    server.close()
    assert "$x^2$" in svg, "no MathJax"
    assert not [line for line in asked if any(word in str(line).lower() for word in ("cdn", "plot", "mathjax"))]


def test_a_page_needs_neither_kaleido_nor_network(figure, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    page = export_figure(figure, tmp_path / "x.html", dark=True, height=400).read_text(encoding="utf-8")
    assert "plotly.js v" in page
    assert "cdn.plot.ly/plotly" not in page.split("plotly.js v")[0]
    assert "#15181D" in page


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.tiff"])
def test_another_ending_is_named(figure, tmp_path, name):
    with pytest.raises(UnknownNameError, match=r"ending of x.*\.png, \.svg, \.pdf, \.html"):
        export_figure(figure, tmp_path / name)


def test_without_kaleido_the_message_says_how_to_get_it(figure, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(
        ExportError, match=r"x.png cannot be drawn: kaleido is not installed. pip install 'kaleido>=1'.*or write x.html"
    ) as e:
        export_figure(figure, tmp_path / "x.png")
    assert isinstance(e.value, TracelensError)
    assert not list(tmp_path.iterdir())


def test_an_old_kaleido_is_named(figure, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: object())
    monkeypatch.setattr(export, "version", lambda name: "0.2.1")
    with pytest.raises(ExportError, match="kaleido 0 is too old"):
        export_figure(figure, tmp_path / "x.png")


@pytest.mark.skipif(importlib.util.find_spec("kaleido") is None, reason="kaleido is not installed")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ChromeNotFoundError", "finds no Chromium or Chrome.*BROWSER_PATH"),
        ("RuntimeError", r"browser failed \(it fell over\); write x.html"),
    ],
)
def test_a_browser_that_is_missing_or_fails(figure, tmp_path, monkeypatch, error, message):
    import kaleido
    from kaleido.errors import ChromeNotFoundError

    kind = {"ChromeNotFoundError": ChromeNotFoundError, "RuntimeError": RuntimeError}[error]

    def fails(*args, **kwargs):
        raise kind("it fell over\nover many lines")

    monkeypatch.setattr(kaleido, "calc_fig_sync", fails)
    with pytest.raises(ExportError, match=message):
        export_figure(figure, tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())
