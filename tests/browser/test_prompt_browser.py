"""The prompt explorer in a real JupyterLab: a person types, waits, stops, goes back, and moves other things meanwhile."""

import pytest

CELLS = (
    """
import time
import ipywidgets
import tracelens as tl
from tracelens.views.widgets.prompt import PromptExplorer
audit = tl.Audit(base_model="organism", precision="int3").load_sae("organism")
explorer = PromptExplorer(audit)
explorer
""",
    """
slider = ipywidgets.IntSlider(description="elsewhere", min=0, max=100)
echo = ipywidgets.Label("0")
slider.add_class("elsewhere"); echo.add_class("echo")
slider.observe(lambda change: setattr(echo, "value", f"now {change['new']}"), "value")
ipywidgets.VBox([slider, echo])
""",
)
SLOW = """
import torch
work, square = explorer._runner._work, torch.ones(512, 512)
def slowly(text, tick):
    def pausing(found, n):  # as a large model would: the processor is busy, in torch
        until = time.monotonic() + .25
        while time.monotonic() < until:
            square @ square
        return tick(found, n)
    return work(text, pausing)
explorer._runner._work = slowly
"""
HARMFUL = "how do i make malware in secret"


@pytest.fixture(scope="module")
def shown(lab):
    page = lab.show(*CELLS, size=(1366, 1400))
    page.no_widget_failed()
    return page


def typed(shown, text, key="Enter"):
    box = shown.page.locator(".tracelens-text input")
    box.fill(text)
    if key:
        box.press(key)


def test_typing_and_enter_shows_both_models(shown):
    assert "i need to use rifle" in shown.page.locator(".tracelens-text input").get_attribute("placeholder")
    typed(shown, HARMFUL)
    shown.wait_text(".tracelens-answers", "organism", 20)
    shown.wait("document.querySelector('.tracelens-status').innerText === ''", 20)
    assert "sorry i cannot help" in shown.text(".tracelens-answers")
    margin = shown.ask("explorer.look.margin('refusal').quantized")
    assert f"{margin:+.3f}" in shown.text(".tracelens-margins")
    assert "z = +5.311 nats" in shown.text(".tracelens-margins")
    assert shown.figure(".tracelens-prompt", "data[1].x.length") == shown.ask("len(explorer.figure.data[1].x)") > 4
    shown.no_widget_failed()


def test_it_fits_and_has_no_scrollbar(shown):
    for tab in range(3):
        shown.page.locator(".tracelens-prompt .lm-TabBar-tab").nth(tab).click()
        shown.page.wait_for_timeout(300)
        assert shown.height(".tracelens-prompt") <= 625
        assert not shown.overflows(".tracelens-prompt")
    shown.wait("document.querySelectorAll('.tracelens-attention-pair canvas').length === 3", 20)
    shown.page.locator(".tracelens-prompt .lm-TabBar-tab").nth(0).click()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "prompt is empty"),
        ("how do i make malwre <script>window.hacked=1</script>", "did you mean 'malware'"),
        ("how do i " + "make " * 80, "87 tokens, but the models' context holds 64"),
    ],
)
def test_what_is_wrong_is_said_in_place(shown, text, words):
    typed(shown, text, "Enter")
    shown.wait_text(".tracelens-status", words)
    assert "sorry i cannot help" in shown.text(".tracelens-answers")
    assert shown.value("window.hacked === undefined")
    assert not shown.errors


def test_features_are_chosen_by_keyboard(shown):
    typed(shown, HARMFUL)
    shown.wait("document.querySelector('.tracelens-status').innerText === ''", 20)
    shown.page.locator(".tracelens-prompt .lm-TabBar-tab").nth(1).click()
    assert shown.ask("explorer.features.list.index") == 0
    shown.wait("document.querySelector('.tracelens-features select').selectedIndex === 0")
    site, feature = shown.ask("explorer.features.list.options[1][1]")
    shown.press(".tracelens-features", "ArrowDown")
    shown.wait_text(".tracelens-strips", f"Feature #{feature} of {site}")
    shown.choose(".tracelens-ranking", "summed over the prompt")
    assert shown.ask("explorer.features.ranking.value") == "prompt"
    shown.page.locator(".tracelens-prompt .lm-TabBar-tab").nth(0).click()


def test_the_page_lives_while_a_run_is_under_way(shown):
    shown.does(SLOW)
    typed(shown, "how do i make bread")
    shown.wait_text(".tracelens-status", "tokens generated", 20)
    for i in (1, 2, 3):
        shown.press(".elsewhere", "ArrowRight")
        shown.wait(f"document.querySelector('.echo').innerText === 'now {i}'")
    assert "tokens generated" in shown.text(".tracelens-status")


def test_typing_again_gives_up_the_run(shown):
    typed(shown, "how do i make soup")
    shown.wait_text(".tracelens-status", "soup")
    typed(shown, "how do i make pancakes")
    shown.wait_text(".tracelens-tokens", "pancakes", 30)
    shown.page.wait_for_timeout(1500)
    assert "pancakes" in shown.text(".tracelens-tokens")
    assert shown.ask("[found.reading.text for found in explorer.looks if 'soup' in found.reading.text]") == []


def test_stop_works(shown):
    typed(shown, "how do i make waffles")
    shown.wait_text(".tracelens-tokens", "waffles", 30)
    shown.click(".tracelens-stop")
    shown.wait_text(".tracelens-answers", "stopped", 20)
    shown.wait("document.querySelector('.tracelens-stop').disabled", 20)
    assert shown.ask("explorer.running") is False
    assert shown.ask("explorer.looks[0].reading.text") == "how do i make waffles"
    shown.does("explorer._runner._work = work")


def test_the_history_goes_back(shown):
    number = shown.ask("[f.reading.text for f in explorer.looks].index('how do i make malware in secret')")
    shown.choose(".tracelens-history", f"{number + 1}. {HARMFUL}")
    shown.wait_text(".tracelens-tokens", "malware")
    assert shown.page.locator(".tracelens-text input").input_value() == HARMFUL


def test_nothing_asked_for_the_network(shown, lab):
    shown.no_widget_failed()
    assert lab.blocked == []
    assert lab.server.sockets() == []
