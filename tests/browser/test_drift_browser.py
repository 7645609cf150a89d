"""The drift explorer in a real JupyterLab at 16k features: clicks, brush, keys, filters, themes. How fast: `bench_widgets`."""

import re

import pytest

BOX, CARD, LIST, SUMMARY = ".tracelens-drift", ".tracelens-card", ".tracelens-list", ".tracelens-summary"
DRAWN = f"tracelens.plot('{BOX}').data.reduce((n, t) => n + (t.hovertemplate ? [...t.x].filter(Number.isFinite).length : 0), 0)"
"""Points that the browser has a place for."""
IMPORTS = """
import sys
sys.path.insert(0, {root!r})
from tests.views.made_up_evidence import S, report_with_evidence
from tests.views.made_up_large import large_report
from tracelens.views.widgets.drift import FeatureDriftExplorer
"""


@pytest.fixture(scope="module")
def large(lab, pytestconfig):
    shown = lab.show(
        IMPORTS.format(root=str(pytestconfig.rootpath)),
        "explorer = FeatureDriftExplorer(large_report(16384)); explorer",
    )
    yield shown
    shown.close()


@pytest.fixture(scope="module")
def small(lab, pytestconfig):
    shown = lab.show(
        IMPORTS.format(root=str(pytestconfig.rootpath)), "other = FeatureDriftExplorer(report_with_evidence()); other"
    )
    yield shown
    shown.close()


def heading(shown) -> str:
    return shown.text(f"{CARD} h3")


def test_it_is_drawn_and_fits(large):
    large.no_widget_failed()
    assert large.figure(BOX, "data.length") >= 12
    assert large.height(BOX) <= 660
    assert not large.overflows(BOX)
    inner = large.figure(BOX, "_fullLayout.width")
    assert abs(inner - large.figure(BOX, "clientWidth")) < 2
    assert "16,384 live features" in large.text(SUMMARY)


def test_a_click_shows_the_card_of_the_point(large):
    found = large.click_point(BOX, 0, 321)
    row = large.ask(f"int(explorer._rows[{found['trace']}][{found['point']}])")
    large.wait(
        f"document.querySelector('{CARD} h3')?.innerText.startsWith('#' + {large.ask(f'int(explorer.live.feature[{row}])')} + ' ')"
    )
    assert large.ask("explorer.selected") == row


def test_a_box_takes_features_and_a_button_lets_them_go(large):
    large.choose(".tracelens-view", "fidelity against the same under noise")
    large.wait("tracelens.plot('.tracelens-drift')._fullLayout.xaxis.title.text.startsWith('fidelity under')")
    large.drag(BOX, (0.4, 0.2), (0.9, 0.6))
    large.wait_text(SUMMARY, "brushed: mean fidelity")
    assert large.ask("int(explorer._order.size)") == large.ask("int(explorer.brushed.sum())") > 0
    fidelity = large.ask("[float(x) for x in (explorer.live.values['fidelity'][explorer.brushed].min(), explorer.live.values['fidelity']"
                         "[explorer.brushed].max())]")  # fmt: skip
    assert 0.15 < fidelity[0] <= fidelity[1] < 0.65
    large.click(".tracelens-clear")
    large.wait_text(SUMMARY, "All 16,384 live features")


def test_filters_change_the_points(large):
    large.choose(".tracelens-behaviour", "safety")
    large.wait_text(SUMMARY, "90 of 16,384")
    large.wait(f"{DRAWN} === 90")
    large.choose(".tracelens-behaviour", "all features")
    large.wait(f"{DRAWN} === 16384")


def test_a_search_that_cannot_be_read_is_said_in_place(large):
    box = large.page.locator(".tracelens-search input")
    box.fill("<img src=x onerror=window.hacked=true>")
    box.press("Enter")
    large.wait_text(BOX, "cannot search for '<img'")
    box.fill("")
    box.press("Enter")
    large.wait(f"!document.querySelector('{BOX}').innerText.includes('cannot search')")
    assert large.value("window.hacked === undefined")


def test_by_keyboard_alone(large):
    large.does("explorer._look_at(0)")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 0")
    first = heading(large)
    large.press(LIST, "ArrowDown")
    large.wait(f"document.querySelector('{CARD} h3').innerText !== {first!r}")
    assert large.ask("explorer.selected") == 1
    large.press(".tracelens-next", "Enter")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 2")
    large.press(".tracelens-previous", "Space")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 1")


def test_axes_filters_and_buttons_are_answered_at_16k_features(large):
    plot = f"tracelens.plot('{BOX}')"
    large.choose(".tracelens-view", "activation: reference against quantized")
    large.wait(f"{plot}._fullLayout.yaxis.title.text.startsWith('mean')")
    for view, title in (("correlation against drift", "correlation"), ("muting against firing rate", "muting")):
        large.choose(".tracelens-view", view)
        large.wait(f"{plot}._fullLayout.yaxis.title.text.startsWith({title!r})")
    for kind, mask in (("muted", "muted"), ("degraded", "degraded"), ("survived", "survival.__eq__('survived')")):
        size = large.ask(f"int(explorer.live.{mask}.sum())")
        large.choose(".tracelens-damage", kind)
        large.wait(f"document.querySelector('{SUMMARY}').innerText.startsWith('{size:,} of') && {DRAWN} === {size}")
    large.choose(".tracelens-damage", "all")
    large.wait_text(SUMMARY, "All 16,384")
    large.does("explorer._look_at(0)")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 0")
    large.press(".tracelens-next", "Enter")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 1")


def test_keys_that_jupyterlab_has_shortcuts_on_reach_the_control_and_escape_leaves_it(large):
    cells = large.count(".jp-Cell")
    large.press(LIST, "d", times=2)
    large.press(LIST, "b")
    assert large.count(".jp-Cell") == cells
    assert large.value("document.activeElement.tagName") == "SELECT"
    large.press(LIST, "Escape")
    assert large.value("document.activeElement.matches('.jp-Cell')")


def test_text_from_outside_is_text_and_runs_nowhere(small):
    small.no_widget_failed()
    small.does("other.select(S, 3)")
    small.wait_text(CARD, "#3 refusal")
    assert "<script>window.hacked=1</script>" in small.text(CARD)
    assert "line↵break" in small.text(CARD)
    assert small.count(f"{CARD} script, {CARD} img, {CARD} textarea") == 0
    assert small.value("window.hacked === undefined")


def test_related_features_are_one_step_away(small):
    small.does("other.select(S, 3)")
    small.wait_text(CARD, "#3 refusal")
    small.choose(".tracelens-jump", "decoder near #5 (+0.62)")
    small.wait_text(CARD, "#5 refusal")


def test_it_looks_right_in_both_themes(small):
    ink = "getComputedStyle(document.querySelector('.tracelens-card .tl-card')).color"
    paper = f"tracelens.plot('{BOX}').layout.template.layout.paper_bgcolor"
    light = small.value(f"[{ink}, {paper}]")
    small.theme(dark=True)
    small.wait(f"{ink} !== {light[0]!r} && {paper} !== {light[1]!r}")
    assert brightness(small.value(ink)) > 150 > brightness(light[0])
    small.theme(dark=False)
    small.wait(f"{ink} === {light[0]!r} && {paper} === {light[1]!r}")


def brightness(colour: str) -> float:
    """Of a CSS rgb or rgba colour, from 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_nothing_asks_for_the_network(lab, large, small):
    assert not lab.blocked
    assert not lab.server.sockets()
    assert not [line for line in large.errors + small.errors if "WebSocket" not in line]
