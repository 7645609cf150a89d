"""The sweep explorer in JupyterLab: thresholds, measures and points, as a person uses them."""

import pytest

CELL = """
from tests.views.test_sweep_explorer import HOSTILE, entry
from tracelens.sweep_result import SweepResult
from tracelens.views.widgets.sweep import SweepExplorer
reports = {"int8": entry("INT8", 0.99), "int4": entry("INT4", 0.93), "int3": entry("INT3", 0.8)}
reports["build"] = entry(HOSTILE, 0.95, weights=None)
explorer = SweepExplorer(SweepResult(reports))
explorer.measure.value = "KL"
explorer.measure.value = "flips"
explorer
"""
BOX = ".tracelens-sweep"
PLOT = f"{BOX} .js-plotly-plot"


@pytest.fixture(scope="module")
def shown(lab):
    with lab.show(CELL) as page:
        yield page


def card(part: str) -> str:
    return f"document.querySelector('{BOX} .tracelens-card').innerText.includes('{part}')"


def answer(part: str) -> str:
    return f"document.querySelector('{BOX} .tracelens-answer').innerText.includes('{part}')"


def test_it_is_drawn_in_either_theme_and_fits(shown):
    shown.no_widget_failed()
    assert shown.count(PLOT) == 2
    assert not shown.overflows(BOX)
    assert shown.height(BOX) <= 620
    light = shown.figure(PLOT, "_fullLayout.paper_bgcolor")
    shown.theme(dark=True)
    shown.wait(f"tracelens.plot('{PLOT}')._fullLayout.paper_bgcolor !== '{light}'")
    shown.theme(dark=False)


def test_a_click_on_a_point_opens_that_precisions_report(shown):
    trace = next(
        i
        for i, name in enumerate(shown.value(f"tracelens.plot('{PLOT}').data.map(t => t.name)"))
        if name == "safety features"
    )
    at = shown.figure(PLOT, f"data[{trace}].customdata").index("int3")
    shown.click_point(PLOT, trace, at)
    shown.wait(card("INT3: 3 bits per weight"))
    assert shown.ask("explorer.selected") == "int3"


def test_sliders_switches_and_keys_are_answered(shown):
    slider = f"{BOX} .tracelens-min-cpfr"
    shown.set_slider(slider, 0.93)
    shown.wait(answer("passes is int4"))
    shown.press(slider, "ArrowRight")
    shown.wait(answer("passes is int8"))
    line = f"tracelens.plot('{PLOT}').layout.shapes[0].y0"
    shown.wait(f"Math.abs({line} - 0.935) < 1e-6")
    shown.press(slider, "ArrowRight")
    shown.wait(f"Math.abs({line} - 0.94) < 1e-6")
    title = "document.querySelectorAll('.tracelens-sweep .js-plotly-plot')[1]._fullLayout.yaxis.title.text"
    shown.click(f"{BOX} .tracelens-measure button:nth-child(2)")
    shown.wait(f"{title}.startsWith('KL')")
    shown.click(f"{BOX} .tracelens-axis button:nth-child(2)")
    shown.wait(f"tracelens.plot('{PLOT}')._fullLayout.xaxis.title.text.startsWith('bytes')")
    shown.press(f"{BOX} .tracelens-previous", "Enter")
    shown.wait(card("INT4: 4 bits"))


@pytest.mark.parametrize(("view", "box"), [("features", ".tracelens-drift"), ("smearing", ".tracelens-smearing")])
def test_a_reports_explorer_opens_below(shown, view, box):
    number = 2 if view == "features" else 3
    shown.click(f"{BOX} .tracelens-below button:nth-child({number})")
    shown.wait(f"document.querySelector('{BOX} {box} .main-svg')", 30)
    assert not shown.overflows(BOX)
    shown.click(f"{BOX} .tracelens-below button:nth-child(1)")
    shown.wait(f"!document.querySelector('{BOX} {box}')")
    shown.no_widget_failed()


def test_names_from_outside_are_text(shown):
    shown.choose(f"{BOX} .tracelens-precision", "build")
    shown.wait(card("<script>window.hacked=1</script>"))
    assert shown.value("window.hacked") is None
    shown.no_widget_failed()
    assert not shown.blocked
