"""What becomes of a widget: shown twice, re-opened with and without its kernel, in the other theme, on a page that knows no widgets."""

import subprocess
import sys

import pytest

CELL = """
import ipywidgets as widgets, plotly.graph_objects as go
from tracelens.views.widgets.shell import Explorer

class Toy(Explorer):
    def __init__(self):
        super().__init__()
        self.height = widgets.IntSlider(description="height", min=1, max=9)
        self.height.add_class("toy-height")
        self.figure = self._live(go.Figure(go.Scatter(x=[1, 2, 3], y=[1, 1, 1], mode="markers")))
        self.figure.data[0].on_click(lambda trace, points, state: self._say(f"<b>point {points.point_inds}</b>"))
        self.height.observe(lambda change: self._guarded(self.draw), "value")
        self._assemble(self.height, self.figure)
        self.box.add_class("toy")

    def draw(self):
        self.figure.data[0].y = [self.height.value] * 3

    def still(self):
        return go.Figure(self.figure.to_dict())

    def __str__(self):
        return f"a toy of height {self.height.value}, <i>as text</i>"

toy = Toy()
toy
"""
Y = "data[0].y[0]"
STILL = "[data-tracelens-still]"


def visible(shown, css: str) -> int:
    return shown.page.locator(css).locator("visible=true").count()


@pytest.fixture(scope="module")
def toy(lab):
    with lab.show(CELL) as shown:
        yield shown


def test_the_widget_is_shown_and_its_picture_is_not(toy):
    toy.wait("document.querySelector('.toy .main-svg')")
    toy.wait(f"!document.querySelector('{STILL}').offsetParent")
    toy.no_widget_failed()
    assert visible(toy, ".toy") == 1


def test_a_slider_and_a_click_are_answered(toy):
    toy.set_slider(".toy-height", 4)
    toy.wait(f"tracelens.plot('.toy').{Y} === 4")
    assert toy.click_point(".toy", 0, 1) == {"trace": 0, "point": 1}
    # As text, not as HTML.
    toy.wait_text(".toy .tracelens-line", "<b>point [1]</b>")


def test_the_line_is_read_out_and_says_what_is_under_way(toy):
    line = toy.page.locator(".toy .tracelens-line")
    assert (line.get_attribute("role"), line.get_attribute("aria-live")) == ("status", "polite")
    toy.does("wait = toy._busy('working on it'); wait.__enter__()")
    toy.wait_text(".toy .tracelens-line", "working on it")
    assert toy.count(".toy .tracelens-spinner") == 1
    assert toy.page.locator(".toy").get_attribute("aria-busy") == "true"
    toy.does("wait.__exit__(None, None, None)")
    toy.wait("!document.querySelector('.toy .tracelens-spinner')")


def test_the_theme_is_followed_and_the_zoom_kept(toy):
    toy.drag(".toy", (1.5, 3.8), (2.5, 4.2))
    toy.wait("tracelens.plot('.toy')._fullLayout.xaxis.range[0] > 1.4")
    zoom = toy.figure(".toy", "_fullLayout.xaxis.range")
    toy.theme(dark=True)
    toy.wait("tracelens.plot('.toy')._fullLayout.paper_bgcolor === '#15181D'")
    assert toy.figure(".toy", "_fullLayout.xaxis.range") == pytest.approx(zoom)
    toy.theme(dark=False)
    toy.wait("tracelens.plot('.toy')._fullLayout.paper_bgcolor === '#FFFFFF'")


def test_shown_twice_both_live(lab):
    with lab.show(CELL, "toy") as shown:
        assert visible(shown, ".toy") == 2
        shown.set_slider(".toy-height", 7)
        shown.wait(f"[...document.querySelectorAll('.toy .js-plotly-plot')].map(e => e.{Y}).join() === '7,7'")
        shown.wait(f"![...document.querySelectorAll('{STILL}')].some(e => e.offsetParent)")
        shown.no_widget_failed()


def test_reopened_with_its_kernel_it_lives_as_it_stood(lab):
    with lab.show(CELL, kernel="own") as shown:
        shown.set_slider(".toy-height", 5)
        shown.wait(f"tracelens.plot('.toy').{Y} === 5")
        shown.save()
        path = shown.path
    with lab.open(path, kernel="own") as again:
        again.wait(f"document.querySelector('.toy .main-svg') && tracelens.plot('.toy').{Y} === 5", 20)
        again.set_slider(".toy-height", 8)
        again.wait(f"tracelens.plot('.toy').{Y} === 8")
        assert visible(again, STILL) == 0
        again.no_widget_failed()


def test_reopened_without_its_kernel_the_picture_is_left(lab):
    with lab.show(CELL, kernel="own") as shown:
        shown.save()
        path = shown.path
    lab.forget(path)
    with lab.open(path, kernel="fresh") as again:
        # JupyterLab has looked for the widget's model, and not found it.
        again.page.wait_for_selector(".jp-OutputArea-output.jupyter-widgets", state="attached")
        assert "a toy of height 1, <i>as text</i>" in again.text(STILL)
        assert "run this cell again" in again.text(STILL)
        again.wait(f"document.querySelector('{STILL} img').naturalWidth > 100")
        said = again.text(".jp-Notebook")
        assert "Error displaying" not in said
        assert "Loading widget" not in said


def test_a_converted_notebook_shows_the_picture(lab, tmp_path):
    with lab.show(CELL) as shown:
        shown.save()
        saved = lab.server.root / shown.path
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--output", str(tmp_path / "page.html"), str(saved)]
    subprocess.run(command, check=True, capture_output=True)
    before = len(lab.blocked)
    with lab.file(tmp_path / "page.html") as page:
        assert "a toy of height 1, <i>as text</i>" in page.text(STILL)
        page.wait(f"document.querySelector('{STILL} img').naturalWidth > 100")
        assert visible(page, STILL) == 1
        assert "Error" not in page.text("body")
    # nbconvert's own page asks for MathJax and the like; that is not ours.
    del lab.blocked[before:]


def test_a_restarted_kernel_leaves_what_is_drawn_and_runs_again(lab):
    with lab.show(CELL, kernel="own") as shown:
        shown.value("tracelens.panel.sessionContext.session.kernel.restart().then(() => true)")
        shown.settle()
        assert visible(shown, ".toy") == 1
        shown.run_all()
        shown.set_slider(".toy-height", 3)
        shown.wait(f"tracelens.plot('.toy').{Y} === 3")
        assert visible(shown, STILL) == 0
        shown.no_widget_failed()


def test_the_script_of_plotly_comes_once(lab):
    with lab.show(
        CELL.replace("toy = Toy()\ntoy", ""), "six = [Toy() for _ in range(6)]\nwidgets.VBox([toy.box for toy in six])"
    ) as shown:
        assert visible(shown, ".toy .js-plotly-plot") == 6
        shown.no_widget_failed()
        assert shown.value("Object.keys(globalThis.tracelensPlotly).length") == 1


def test_nothing_was_asked_of_the_network(lab):
    assert lab.blocked == []
    assert lab.server.sockets() == []
