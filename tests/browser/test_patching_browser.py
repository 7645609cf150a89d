"""The patching explorer in JupyterLab: switches, cells and prompts, as a person uses them."""

import pytest

CELL = """
from tests.views.test_patching_explorer import SITES, grid, with_tokens
from tracelens.views.widgets.patching import PatchingExplorer
repair, damage = (with_tokens(grid(sites=SITES, direction=way)) for way in ("repair", "damage"))
positions = with_tokens(grid("position", (-4, -3, -2, -1)))
explorer = PatchingExplorer({"repair": repair, "damage": damage, "positions": positions})
explorer.show_prompt(1)
explorer.show_prompt(None)
explorer
"""
BOX = ".tracelens-patching"
MAP = f"{BOX} .js-plotly-plot"


@pytest.fixture(scope="module")
def shown(lab):
    with lab.show(CELL) as page:
        yield page


def card(part: str) -> str:
    return f"document.querySelector('{BOX} .tracelens-card').innerText.includes('{part}')"


def test_it_is_drawn_in_either_theme_and_fits(shown):
    shown.no_widget_failed()
    assert shown.count(MAP) == 2
    assert not shown.overflows(BOX)
    assert shown.height(BOX) <= 620
    light = shown.figure(MAP, "_fullLayout.paper_bgcolor")
    shown.theme(dark=True)
    shown.wait(f"tracelens.plot('{MAP}')._fullLayout.paper_bgcolor !== '{light}'")
    shown.theme(dark=False)


def test_a_click_on_a_cell_opens_its_prompts(shown):
    shown.click_point(MAP, 1, (0, 1))
    shown.wait(card("layer 0 · at verb"))
    assert shown.ask("explorer.result.rows[explorer.arm]") == {
        "site": "attn_out",
        "layer": 0,
        "group": "verb",
    } | shown.ask("{'layer': 0}")
    assert shown.value(f"document.querySelectorAll('{MAP}')[1].data[5].x.length") == 12


def test_keys_and_switches_are_answered(shown):
    shown.does("explorer.select(explorer.top.options[0][1])")
    shown.wait(f"document.querySelector('{BOX} .tracelens-top select').selectedIndex === 0")
    shown.press(f"{BOX} .tracelens-next", "Enter")
    shown.wait(f"document.querySelector('{BOX} .tracelens-top select').selectedIndex === 1")
    assert shown.ask("explorer.arm == explorer.top.options[1][1]")
    shown.press(f"{BOX} .tracelens-previous", "Space")
    shown.wait(f"document.querySelector('{BOX} .tracelens-top select').selectedIndex === 0")
    # The first key after a choice that a script made only tells the browser where the list stands.
    shown.press(f"{BOX} .tracelens-top", "ArrowDown", times=2)
    shown.wait(f"document.querySelector('{BOX} .tracelens-top select').selectedIndex > 0")
    assert shown.ask("explorer.arm == explorer.top.value != explorer.top.options[0][1]")
    site = f"tracelens.plot('{MAP}').data[1].z[0][0]"
    before = shown.value(site)
    shown.choose(f"{BOX} .tracelens-site", "mlp_out")
    shown.wait(f"{site} !== {before}")
    shown.choose(f"{BOX} .tracelens-measure", "closed")
    shown.wait(f"tracelens.plot('{MAP}')._fullLayout.coloraxis.colorbar.title.text === 'closed'")
    shown.click(f"{BOX} .tracelens-direction button:nth-child(2)")
    shown.wait_text(BOX, "0 = the reference run")


def test_one_prompt_has_its_tokens_as_labels_and_runs_nothing(shown):
    shown.choose(f"{BOX} .tracelens-sweep", "layer × position")
    shown.wait_text(BOX, "There is no such result for layer × position")
    shown.choose(f"{BOX} .tracelens-prompt", "2: prompt 1")
    shown.wait(f"tracelens.plot('{MAP}').layout.xaxis.ticktext.join().includes('chlorine')")
    shown.does("explorer.show_prompt(0)")
    shown.wait(card("<script>window.hacked=1</script>"))
    assert shown.value("window.hacked") is None
    shown.no_widget_failed()
    assert not shown.blocked
