"""The smearing explorer in a real JupyterLab: sliders, clicks in both figures, keys, themes, and how fast it answers at 20k pairs."""

import pytest

BOX, CARD, LIST, SUMMARY = (
    ".tracelens-smearing",
    ".tracelens-smearing .tracelens-card",
    ".tracelens-list",
    ".tracelens-summary",
)
IMPORTS = """
import sys
sys.path.insert(0, {root!r})
from tests.views.made_up_evidence import S, report_with_evidence
from tests.views.test_smearing_explorer import with_pairs
from tracelens.views.widgets.smearing import SmearingExplorer
"""


@pytest.fixture(scope="module")
def large(lab, pytestconfig):
    cell = "explorer = SmearingExplorer(with_pairs(26_000, features=4000)); explorer"
    shown = lab.show(IMPORTS.format(root=str(pytestconfig.rootpath)), cell)
    yield shown
    shown.close()


@pytest.fixture(scope="module")
def small(lab, pytestconfig):
    shown = lab.show(
        IMPORTS.format(root=str(pytestconfig.rootpath)), "other = SmearingExplorer(report_with_evidence()); other"
    )
    yield shown
    shown.close()


def test_it_is_drawn_and_fits(large):
    large.no_widget_failed()
    assert large.count(f"{BOX} .tracelens-figure") == 2
    assert not large.overflows(BOX)
    assert large.height(BOX) <= 680
    assert large.ask("len(explorer.pairs)") > 15_000


def test_a_slider_moves_the_edge_the_list_and_the_counts(large):
    large.set_slider(".tracelens-tau", 0.7)
    large.wait(f"tracelens.plot('{BOX}').layout.shapes[1].path.includes('0.70000')")
    n = large.ask("len(explorer.rows)")
    large.wait_text(SUMMARY, f"{n:,} of")
    assert large.count(f"{LIST} option") == min(n, 200)
    large.click(".tracelens-reset")
    large.wait(f"tracelens.plot('{BOX}').layout.shapes[1].path.includes('0.50000')")


def test_a_click_on_a_point_shows_its_pair(large):
    before = large.text(f"{CARD} h3")
    found = large.click_point(BOX, 0, 40)
    large.wait(f"document.querySelector('{CARD} h3').innerText !== {before!r}")
    row = large.ask(f"int(explorer.figure.data[{found['trace']}].customdata[{found['point']}])")
    assert large.ask("explorer.selected") == row


def test_by_keyboard_alone(large):
    large.does("explorer._look_at(int(explorer.rows[0]))")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 0")
    large.press(LIST, "ArrowDown")
    large.wait("document.querySelector('.tracelens-list select').selectedIndex === 1")
    large.press(".tracelens-smearing .tracelens-next", "Enter")
    large.wait("document.querySelector('.tracelens-list select').selectedIndex === 2")


def test_it_answers_at_20k_pairs(large):
    path = f"tracelens.plot('{BOX}').layout.shapes[1].path"
    before = large.value(path)
    large.press(".tracelens-tau", "ArrowRight")
    large.wait(f"{path} !== {before!r}")
    before = large.text(f"{CARD} h3")
    large.press(".tracelens-smearing .tracelens-next", "Enter")
    large.wait(f"document.querySelector('{CARD} h3').innerText !== {before!r}")


def test_the_matrix_and_a_pair_of_it(small):
    small.no_widget_failed()
    small.does("other.tau.value, other.delta.value = 0.3, 0.1")
    small.does("other.how.value = 'matrix'")
    matrix = "[...document.querySelectorAll('.js-plotly-plot')].some((p) => p.data?.some((t) => t.type === 'heatmap' && t.z?.length === 3))"
    small.wait(matrix)
    small.does("other.select(S, 3, 7)")
    small.wait_text(CARD, "#3 refusal with #7")


def test_text_from_outside_is_text(small):
    small.does("other.select(S, 3, 6)")
    small.wait_text(CARD, "<script>window.hacked=1</script>")
    assert small.count(f"{CARD} script, {CARD} img") == 0
    assert small.value("window.hacked === undefined")


def test_both_themes(small):
    veil = f"tracelens.plot('{BOX}').layout.shapes[0].fillcolor"
    light = small.value(veil)
    small.theme(dark=True)
    small.wait(f"{veil} !== {light!r}")
    small.theme(dark=False)
    small.wait(f"{veil} === {light!r}")


def test_nothing_asks_for_the_network(lab, large, small):
    assert not lab.blocked
    assert not lab.server.sockets()
    assert not [line for line in large.errors + small.errors if "WebSocket" not in line]
