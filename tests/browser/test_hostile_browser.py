"""What comes from outside executes nowhere and can be read, in a real browser: in figures, in widgets, on the report page."""

import re

import pytest

from tests.views.hostile import EVIL, HOSTILE
from tests.views.made_up_evidence import HOSTILE as TOKENS
from tests.views.test_hostile_text import EXPLORERS, evil_report
from tracelens.views.escaping import visible
from tracelens.views.report import audit_page

# A long text is cut by plotly's own legend and ticks.
READ = {name: text for name, text in HOSTILE.items() if name not in ("long", "surrogate")}
FIGURE = """
import plotly.graph_objects as go
from tests.views.hostile import HOSTILE
from tracelens.views.escaping import in_figure
texts = [in_figure(t) for name, t in HOSTILE.items() if name not in ("long", "surrogate")]
n = range(len(texts))
figure = go.FigureWidget(go.Scatter(x=list(n), y=list(n), mode="markers+text", text=texts, textposition="middle right",
    name=texts[0], showlegend=True, hovertemplate=texts[8] + " %{text}<extra>" + texts[0] + "</extra>"))
figure.update_layout(title={"text": texts[4], "subtitle": {"text": texts[9]}}, height=600, width=900)
figure.update_yaxes(tickvals=list(n), ticktext=texts, title_text=texts[6])
figure.add_class("hostile")
figure
"""
START = "from tracelens import views\nfrom tests.views.test_hostile_text import EXPLORERS"
STRIPS = """
import ipywidgets, numpy as np
from tests.views.hostile import HOSTILE
from tracelens.auditing.evidence import Merged, TokenTrace
from tracelens.views import token_html
t = tuple(HOSTILE.values()); n = 1.0 * np.arange(len(t))
box = ipywidgets.VBox([ipywidgets.HTML(token_html.css() + part) for part in (
    token_html.strip(t, n, colour="#AA3377", title=t[0]),
    token_html.paired_strips(TokenTrace(0, t, n, n[::-1].copy()), text=t[0]),
    token_html.merged_tokens([Merged(0, 3, t, (1.0, 0.0), (1.0, 1.0))], (t[0], t[2])),
    token_html.token_list([(token, 1.0) for token in t]),
)]); box.add_class("strips"); box
"""


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def nothing_happened(shown) -> None:
    shown.page.wait_for_timeout(300)
    assert shown.value("window.hacked") is None
    assert not shown.blocked


@pytest.fixture(scope="module")
def shown(lab):
    """All of them in one notebook: opening one takes longest."""
    cells = [f"{name} = EXPLORERS[{name!r}](); {name}" for name in EXPLORERS]
    page = lab.show(START, FIGURE, STRIPS, *cells, seconds=200)
    for name in EXPLORERS:
        page.wait(f"document.querySelector('.tracelens-{name}')", 30)
    return page


def test_nothing_executes_and_nothing_is_asked_for(shown):
    shown.no_widget_failed()
    nothing_happened(shown)


def test_a_figure_shows_text_as_text(shown):
    ticks = [
        squeezed(t)
        for t in shown.value("[...document.querySelectorAll('.hostile .ytick text')].map(e => e.textContent)")
    ]
    assert ticks == [squeezed(visible(text)) for text in READ.values()]
    drawn = squeezed(shown.value("document.querySelector('.hostile').textContent"))
    for text in READ.values():
        assert drawn.count(squeezed(visible(text))) >= 2, text
    assert shown.count(".hostile .main-svg :is(script, a, img, foreignObject)") == 0
    shown.click_point(".hostile", 0, 3)
    hover = squeezed(shown.value("document.querySelector('.hostile .hoverlayer').textContent"))
    assert squeezed(visible(list(READ.values())[3])) in hover
    assert squeezed(visible(list(READ.values())[8])) in hover
    nothing_happened(shown)


def test_strips_show_text_as_text(shown):
    text = shown.value("document.querySelector('.strips').textContent").replace("↵\n", "↵")
    for token in HOSTILE.values():
        if len(token) < 1000:
            assert text.count(visible(token)) >= 2, token
    assert shown.count(".strips :is(script, img, svg, a, b)") == 0
    assert not shown.overflows(".strips")


@pytest.mark.parametrize("name", EXPLORERS)
def test_an_explorer_shows_text_as_text(shown, name):
    css = f".tracelens-{name}"
    assert shown.count(f"{css} script") == shown.count(f"{css} [onerror]") == 0
    shown_text = squeezed(shown.value(f"document.querySelector('{css}').textContent"))
    assert name == "muting" or squeezed(visible(EVIL)) in shown_text


def test_the_report_page_shows_text_as_text(lab, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(audit_page(evil_report()), encoding="utf-8")
    shown = lab.file(path)
    shown.wait("document.querySelector('.js-plotly-plot .main-svg')", 30)
    text = squeezed(shown.value("document.body.textContent"))
    assert text.count(squeezed(visible(EVIL))) >= 10
    for token in TOKENS:
        assert squeezed(visible(token)) in text
    nothing_happened(shown)
    shown.close()
