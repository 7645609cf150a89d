"""The shell of the widgets without a browser: names, messages, what is shown where no widget can live."""

import ast
import base64
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from tests.views.made_up import made_up_report, made_up_sweep
from tracelens import views
from tracelens.errors import MissingLibraryError, TracelensError, UnknownNameError
from tracelens.views.widgets.fallback import still_html
from tracelens.views.widgets.shell import VIEW, Explorer
from tracelens.views.widgets.svg import svg_of
from tracelens.views.widgets.svg_axes import panels
from tracelens.views.widgets.svg_marks import scaled

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert(1)</script> "quoted" 😀 שלום ]]> &amp;'


class Toy(Explorer):
    def __init__(self, figure: go.Figure | None = None):
        super().__init__()
        self.figure = self._live(figure or go.Figure(go.Scatter(x=[1, 2], y=[3, 4])))
        self._assemble(self.figure)

    def still(self) -> go.Figure:
        return go.Figure(self.figure.to_dict())

    def __str__(self) -> str:
        return HOSTILE


@pytest.fixture
def toy():
    return Toy()


def elements(svg: str, name: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(SVG + name))


def said(svg: str) -> list[str]:
    return [e.text for e in elements(svg, "text") if e.text]


class TestNames:
    def test_all_resolve_and_are_listed(self):
        for name in views.__all__:
            assert getattr(views, name).__name__ == name
            assert name in dir(views)
        with pytest.raises(AttributeError, match="no_such_name"):
            views.no_such_name  # noqa: B018

    def test_every_figure_is_public(self):
        files = Path(views.__file__).parent.glob("*figures.py")
        functions = [
            n.name for f in files for n in ast.parse(f.read_text("utf-8")).body if isinstance(n, ast.FunctionDef)
        ]
        assert {name for name in functions if name.endswith("_figure")} <= set(views.__all__)

    def test_importing_them_is_light(self):
        code = (
            "import sys, tracelens.views, tracelens.views.widgets.shell, tracelens.views.exploring\n"
            "print({'plotly', 'ipywidgets', 'anywidget', 'torch', 'pandas'} & set(sys.modules))"
        )
        assert (
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
        )


class TestExplore:
    @pytest.mark.parametrize(
        ("make", "view", "kind"),
        [
            (made_up_report, "features", "FeatureDriftExplorer"),
            (made_up_report, "smearing", "SmearingExplorer"),
            (made_up_sweep, "sweep", "SweepExplorer"),
            (made_up_sweep, "muting", "MutingExplorer"),
        ],
    )
    def test_a_view_opens_its_widget(self, make, view, kind, monkeypatch):
        monkeypatch.setattr(views, kind, lambda result: (kind, result), raising=False)
        result = make()
        opened = result.explore(view)
        assert opened[0] == kind
        assert opened[1] is result

    def test_an_unknown_view_names_the_known(self):
        with pytest.raises(UnknownNameError, match=r"unknown view 'smearng'.*'smearing'.*Known: features, smearing"):
            made_up_report().explore("smearng")
        with pytest.raises(UnknownNameError, match="Known: sweep, muting"):
            made_up_sweep().explore("features")


class TestMissingLibraries:
    @pytest.mark.parametrize("name", ["ipywidgets", "anywidget"])
    def test_the_error_names_the_fix(self, name, monkeypatch):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingLibraryError, match=f"a widget needs {name}.*pip install {name}"):
            Toy()


class TestShell:
    def test_figures_follow_the_theme_and_keep_their_zoom(self, toy):
        toy.figure.update_layout(xaxis_range=[1.2, 1.4])
        toy._line.dark = True
        assert toy.dark
        assert toy.figure.layout.template.layout.paper_bgcolor != "#FFFFFF"
        assert toy.figure.layout.xaxis.range == (1.2, 1.4)
        toy._line.dark = False
        assert toy.figure.layout.template.layout.paper_bgcolor == "#FFFFFF"

    def test_a_users_error_is_said_in_place_and_goes_with_the_next_success(self, toy):
        def wrong():
            raise TracelensError("no such <b>feature</b>")

        toy._guarded(wrong)
        assert toy.message == "no such <b>feature</b>"
        toy._guarded(lambda: None)
        assert toy.message == ""
        with pytest.raises(ZeroDivisionError):
            toy._guarded(lambda: 1 / 0)

    def test_what_is_under_way_is_said_until_it_ends_or_fails(self, toy):
        with toy._busy("running both models"):
            assert toy._line.busy == "running both models"
        assert toy._line.busy == ""
        with pytest.raises(ValueError, match="x"), toy._busy("again"):
            raise ValueError("x")
        assert toy._line.busy == ""

    def test_plotly_is_sent_once_for_all_figures(self):
        one, two = Toy(), Toy()
        for figure in (one.figure, two.figure):
            assert len(str(figure.get_state()["_esm"])) < 10_000
        assert one.figure._plotly == two.figure._plotly

    def test_the_script_is_made_anew_after_widgets_were_closed(self, toy):
        from tracelens.views.widgets import live_figure

        live_figure._SCRIPTS[0].close()
        again = Toy()
        assert again.figure._plotly != toy.figure._plotly
        assert len(live_figure._SCRIPTS[0].code) > 1_000_000

    def test_a_page_that_comes_later_gets_the_figure_as_it_stands(self, toy):
        toy.figure.data[0].y = [7, 8]
        toy.figure.layout.title.text = "now"
        state = toy.figure.get_state()
        assert list(state["_widget_data"][0]["y"]) == [7, 8]
        assert state["_widget_layout"]["title"]["text"] == "now"


class TestOutputs:
    def test_two_outputs_of_which_the_first_is_for_everyone(self, toy, monkeypatch):
        shown = []
        monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
        toy._ipython_display_()
        assert [set(bundle) for bundle in shown] == [{"text/html", "text/plain"}, {VIEW}]
        assert shown[1][VIEW]["model_id"] == toy.box.model_id

    def test_one_bundle_has_all(self, toy):
        bundle = toy._repr_mimebundle_()
        assert set(bundle) == {VIEW, "text/html", "text/plain"}
        assert bundle["text/plain"] == HOSTILE

    def test_the_still_needs_no_script_and_no_network_and_escapes(self, toy):
        html = toy._still_html()
        assert "<script" not in html
        assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
        assert "run this cell again" in html
        picture = base64.b64decode(html.split("base64,")[1].split('"')[0]).decode()
        assert len(elements(picture, "path")) >= 1

    def test_a_figure_that_cannot_be_drawn_leaves_the_sentence(self):
        html = still_html(go.Figure(go.Pie(values=[1, 2])), "a pie", "key")
        assert "a pie" in html
        assert "<img" not in html


class TestStillPicture:
    def test_points_lie_where_the_axes_say(self):
        figure = go.Figure(go.Scatter(x=[0, 10], y=[0, 1], mode="markers", marker={"color": "#112233", "size": 8}))
        figure.update_layout(xaxis_range=[0, 10], yaxis_range=[0, 1])
        (panel,) = panels(list(figure.to_plotly_json()["data"]), {"xaxis": {"range": [0, 10]}}, 860.0, 420.0)
        left, _, width, _ = panel.box
        assert panel.x(0) == pytest.approx(left)
        assert panel.x(10) == pytest.approx(left + width)
        assert panel.x(5) == pytest.approx(left + width / 2)
        (dots,) = [e for e in elements(svg_of(figure), "path") if e.get("stroke") == "#112233"]
        assert dots.get("d").count("M") == 2

    @pytest.mark.parametrize("kind", ["log", "linear"])
    def test_every_kind_of_axis_is_monotone(self, kind):
        figure = go.Figure(go.Scatter(x=[1, 10, 100], y=[1, 2, 3]))
        (panel,) = panels(list(figure.to_plotly_json()["data"]), {"xaxis": {"type": kind}}, 860.0, 420.0)
        places = [panel.x(v) for v in (1, 10, 100)]
        assert places == sorted(places)
        equal = places[1] - places[0] == pytest.approx(places[2] - places[1])
        assert equal == (kind == "log")

    def test_a_shape_that_it_cannot_draw_is_left_out(self):
        figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1]))
        plain = svg_of(figure)
        figure.add_shape(type="path", path="M 0 0 L 1 1 Z")
        assert svg_of(figure) == plain

    def test_categories_stand_in_order_and_long_ones_are_cut(self):
        names = ["first", "second", "a label much longer than any room there is for it beside the axis"]
        svg = svg_of(go.Figure(go.Bar(y=names, x=[1, 2, 3], orientation="h")))
        heights = {e.text: float(e.get("y")) for e in elements(svg, "text") if e.text}
        assert heights["first"] > heights["second"]
        assert any(text.startswith("a label much") and text.endswith("…") for text in heights)

    def test_bars_are_as_long_as_their_values(self):
        svg = svg_of(go.Figure(go.Bar(x=["a", "b"], y=[1, 2], marker_color="#AA0000")))
        heights = [float(e.get("height")) for e in elements(svg, "rect") if e.get("fill") == "#AA0000"]
        assert heights[1] == pytest.approx(2 * heights[0], rel=0.01)

    def test_cells_have_the_scale_s_colours_and_gaps_stay_white(self):
        svg = svg_of(go.Figure(go.Heatmap(z=[[0, 1], [None, 2]], colorscale=[[0, "#000000"], [1, "#FFFFFF"]])))
        fills = [e.get("fill") for e in elements(svg, "rect") if (e.get("fill") or "").startswith("rgb")]
        assert len(fills) == 3
        assert fills[0] == "rgb(0, 0, 0)"
        assert scaled(np.array([0.0, np.nan]), [[0, "#000000"], [1, "#FFFFFF"]], 0, 1)[1] == "#C8CCD2"

    def test_intervals_are_drawn(self):
        error = {"array": [0.5], "arrayminus": [0.25], "color": "#010203"}
        svg = svg_of(go.Figure(go.Scatter(x=[1], y=[1], mode="markers", error_y=error)))
        assert len([e for e in elements(svg, "path") if e.get("stroke") == "#010203"]) == 1

    def test_hostile_text_is_text(self):
        figure = go.Figure(
            [go.Scatter(x=["&lt;script&gt;"], y=[1], name=HOSTILE), go.Scatter(x=["\x00b"], y=[1], name="other")]
        )
        figure.update_layout(title={"text": "a<br>b <b>bold</b> &lt;i&gt;"})
        svg = svg_of(figure)
        assert "<script" not in svg
        assert "<script>" in said(svg)
        assert "a b bold <i>" in said(svg)

    def test_arrays_that_went_through_json_are_read(self):
        figure = go.Figure(go.Scatter(x=np.arange(5.0), y=np.arange(5.0) ** 2, mode="markers"))
        assert svg_of(go.Figure(figure.to_dict())) == svg_of(figure)

    def test_many_points_stay_small(self):
        points = np.random.default_rng(0).random((2, 20_000))
        assert len(svg_of(go.Figure(go.Scattergl(x=points[0], y=points[1], mode="markers")))) < 400_000

    def test_panels_have_axes_of_their_own(self):
        figure = make_subplots(rows=1, cols=2, subplot_titles=("left one", "right one"))
        figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1]), row=1, col=1)
        figure.add_trace(go.Scatter(x=[0, 1000], y=[0, 1]), row=1, col=2)
        svg = svg_of(figure)
        assert {"left one", "right one", "1000"} <= set(said(svg))

    @pytest.mark.parametrize("make", [made_up_report, made_up_sweep])
    def test_the_figures_of_results_are_drawn(self, make):
        figure = make().plot()
        svg = svg_of(figure)
        assert figure.layout.title.text in said(svg)

    def test_an_empty_figure_is_an_empty_picture(self):
        assert elements(svg_of(go.Figure()), "svg")
        assert elements(svg_of(go.Figure(go.Scatter(x=[], y=[]))), "svg")
        assert elements(svg_of(go.Figure(go.Scatter(x=[np.nan], y=[np.nan]))), "svg")
