"""The muting explorer in a real JupyterLab: the bits slider, clicks on cells, keys, themes, and how fast it answers at 16k features."""

import pytest

BOX, CARD, LIST, SUMMARY = (
    ".tracelens-muting",
    ".tracelens-muting .tracelens-card",
    ".tracelens-muting .tracelens-list",
    ".tracelens-summary",
)
IMPORTS = """
import sys
sys.path.insert(0, {root!r})
from tests.views.test_muting_explorer import large_thresholds
from tracelens.views.widgets.muting import MutingExplorer
BITS = {{f"int{{b}}": float(b) for b in (8, 7, 6, 5, 4, 3, 2)}} | {{"int1": 1.5}}
"""
MUTED = "document.querySelectorAll('.tracelens-muting .js-plotly-plot')[0].data[1].z"
DARK = f"[...{MUTED}].reduce((n, row) => n + [...row].filter((v) => v === 2).length, 0)"


@pytest.fixture(scope="module")
def large(lab, pytestconfig):
    shown = lab.show(
        IMPORTS.format(root=str(pytestconfig.rootpath)),
        "explorer = MutingExplorer(large_thresholds(16_384, bits=BITS)); explorer",
    )
    yield shown
    shown.close()


def test_it_is_drawn_and_fits(large):
    large.no_widget_failed()
    assert large.count(f"{BOX} .tracelens-figure") == 3
    assert not large.overflows(BOX)
    assert large.height(BOX) <= 680
    assert "reference is shown" in large.text(SUMMARY)


def test_the_slider_silences_features(large):
    assert large.value(DARK) == 0
    large.set_slider(".tracelens-bits", "4")
    large.wait_text(SUMMARY, "At 4 bits: int4")
    first = large.value(DARK)
    assert (
        first
        == large.ask("int((explorer.table.state[explorer.table.shown_at(4.0)][~explorer.table.safety] == 2).sum())")
        > 0
    )
    large.press(".tracelens-bits", "ArrowRight", times=2)
    large.wait_text(SUMMARY, "At 3 bits: int3")
    assert large.value(DARK) > first


def test_a_click_on_a_cell_shows_the_feature(large):
    before = large.text(f"{CARD} h3")
    found = large.click_point(BOX, 1, (5, 7))
    assert found["trace"] == 1
    large.wait(f"document.querySelector('{CARD} h3').innerText !== {before!r}")
    assert large.ask("explorer.selected") == large.ask("int(explorer._orders[1][5 * explorer._widths[1] + 7])")


def test_by_keyboard_alone(large):
    large.does("explorer._look_at(int(explorer._rows[0]))")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 0")
    large.press(LIST, "ArrowDown")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 1")
    large.press(".tracelens-muting .tracelens-next", "Enter")
    large.wait(f"document.querySelector('{LIST} select').selectedIndex === 2")


def test_it_answers_at_16k_features_and_8_precisions(large):
    said = f"document.querySelector('{SUMMARY}').innerText"
    before, cells = large.value(said), large.value(DARK)
    large.press(".tracelens-bits", "ArrowLeft")
    large.wait(f"{said} !== {before!r} && {DARK} !== {cells}")
    before = large.text(f"{CARD} h3")
    large.press(".tracelens-muting .tracelens-next", "Enter")
    large.wait(f"document.querySelector('{CARD} h3').innerText !== {before!r}")


def test_both_themes_and_escaping(large):
    assert "<i>refusal</i>" in large.text(CARD)
    paper = f"tracelens.plot('{BOX}').layout.template.layout.paper_bgcolor"
    light = large.value(paper)
    large.theme(dark=True)
    large.wait(f"{paper} !== {light!r}")
    large.theme(dark=False)
    large.wait(f"{paper} === {light!r}")


def test_nothing_asks_for_the_network(lab, large):
    assert not lab.blocked
    assert not lab.server.sockets()
    assert not [line for line in large.errors if "WebSocket" not in line]
