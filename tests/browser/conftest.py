r"""Widgets and pages as a person meets them: a real JupyterLab, a real browser, no network.

    def test_the_slider_moves_the_line(lab):                                   # `lab`: one per test module, with one kernel
        with lab.show("import tests.views.made_up as m\nexplorer = ...; explorer") as shown:  # cells in; opened, run, drawn
            shown.no_widget_failed()                                           # nor any error of a script
            shown.set_slider(".tracelens-tau", 0.6)                            # also press, choose, click, click_point, drag, theme, save
            shown.wait_text(".tracelens-drift", "3 pairs")                     # also text, count, value, figure, wait, height, overflows
            assert shown.ask("explorer.tau.value") == 0.6                      # Python in the kernel; `does` runs statements
            key = lambda: shown.press(".tracelens-tau", "ArrowRight")
            assert shown.latency(key, "document.querySelector('.tracelens-drift').innerText.includes('4 pairs')") < 150
            shown.screenshot("x.png")
        assert not lab.blocked and not lab.server.sockets()                    # nothing asked for the network

The first notebook of a module costs most (browser, JupyterLab, kernel with its imports); another takes a second, in the same page once the
one before is closed. A module's tests may share one: `@pytest.fixture(scope="module") def shown(lab): return lab.show(...)`.
`kernel="own"` gives a notebook a kernel of its own; with the shared one, variables stay, and closing the last notebook closes all widgets.
`lab.file(path)` opens an HTML file from disk.
Skipped, with a reason, where there is no chromium (`TRACELENS_CHROMIUM` may name one) or no playwright.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.browser.lab import Lab, find_chromium
from tests.browser.server import Server

HERE = Path(__file__).parent


def missing() -> str:
    """Why no browser test can run here; "" if they can."""
    if find_spec("playwright") is None:
        return "playwright is not installed"
    if find_spec("jupyterlab") is None:
        return "jupyterlab is not installed"
    return "" if find_chromium() else "no chromium is installed (on Debian: apt install chromium)"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory):
    """One JupyterLab per process of tests."""
    if why := missing():
        pytest.skip(why)
    server = Server(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def lab(lab_server):
    """A browser, and a kernel that the module's notebooks share."""
    # Playwright's loop runs in this thread as long as it is open, and code that runs a loop of its own could not: so not for the session.
    made = Lab(lab_server)
    yield made
    made.close()
