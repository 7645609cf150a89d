"""`Shown`: a notebook in the browser, with what a person would do to it and see of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Index = int | tuple[int, int]
FAILURES = (
    "Error displaying widget",
    "Loading widget",
    "Javascript Error",
    "model not found",
    "Traceback (most recent",
)
OUTPUTS = "() => [...document.querySelectorAll('.jp-OutputArea-output')].map(e => e.innerText).join('\\n')"


class Shown:
    """A page.

    Attributes:
        page: playwright's page, for whatever is not below.
        errors: what the page's scripts threw or logged as an error.
        blocked: addresses outside this machine that the lab's pages asked for.
        path: the notebook's, in the server's folder.
        shared: whether its kernel is the module's, whose widgets go when the last such notebook is closed.
    """

    def __init__(self, page: Any, blocked: list[str], give_back: Callable[["Shown"], None]) -> None:
        self.page = page
        self.errors: list[str] = []
        self.blocked = blocked
        self.path = ""
        self.shared = False
        self._give_back = give_back

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the notebook, saved or not; its kernel stays."""
        self._give_back(self)

    # What is on the page.

    def text(self, css: str) -> str:
        """What a person reads in the first element that matches."""
        return self.page.locator(css).first.inner_text()

    def count(self, css: str) -> int:
        return self.page.locator(css).count()

    def value(self, script: str) -> Any:
        """A JavaScript expression's value."""
        return self.page.evaluate(f"() => ({script})")

    def wait(self, script: str, seconds: float = 10) -> None:
        """Until a JavaScript expression holds."""
        self.page.wait_for_function(f"() => Boolean({script})", timeout=seconds * 1000)

    def wait_text(self, css: str, part: str, seconds: float = 10) -> None:
        """Until the text of the first element that matches contains this."""
        self.wait(f"document.querySelector({json.dumps(css)})?.innerText.includes({json.dumps(part)})", seconds)

    def figure(self, css: str, of: str) -> Any:
        """What a live plotly figure has: `figure(".tracelens", "data[0].y.length")`, `"layout.title.text"`, `"_fullLayout.xaxis.range"`."""
        return self.value(f"tracelens.plot({json.dumps(css)}).{of}")

    def screenshot(self, path: str | Path, css: str = "") -> None:
        """Of the window, or of one element."""
        (self.page.locator(css).first if css else self.page).screenshot(path=str(path))

    def no_widget_failed(self) -> None:
        """Raises if an output says that something could not be shown, or a script threw."""
        said = self.page.evaluate(OUTPUTS)
        assert not [words for words in FAILURES if words in said], said[:2000]
        assert not self.errors, self.errors

    def height(self, css: str) -> float:
        return self.page.locator(css).first.bounding_box()["height"]

    def overflows(self, css: str) -> bool:
        """Whether an element is wider inside than outside, so that it cuts its content or shows a scrollbar."""
        return self.page.locator(css).first.evaluate("e => e.scrollWidth > e.clientWidth + 1")

    # What a person does.

    def run_all(self, seconds: float = 120) -> None:
        """Runs all cells, until the kernel is idle and what has a place on the page is drawn. Raises if a cell does."""
        self.page.evaluate(
            "() => { tracelens.ran = null; tracelens.command('notebook:run-all-cells').then((fine) => { tracelens.ran = fine; }); }"
        )
        self.wait("tracelens.ran !== null", seconds)
        assert self.value("tracelens.ran"), self.page.evaluate(OUTPUTS)
        self.settle()

    def settle(self, seconds: float = 60) -> None:
        """Until the kernel is idle and every figure is drawn."""
        self.page.wait_for_function("() => tracelens.ready() && tracelens.drawn()", timeout=seconds * 1000)

    def set_slider(self, css: str, value: float | str) -> None:
        """Sets an ipywidgets slider: in its readout if that takes text, else by the arrow keys until the readout says `value`."""
        root = self.page.locator(css).first
        readout = root.locator(".widget-readout").first
        # A slider of numbers puts its number back where it cannot read the text; one of options leaves what was typed.
        readout.fill("?")
        readout.press("Enter")
        if readout.inner_text().strip() != "?":
            readout.fill(str(value))
            readout.press("Enter")
        else:
            self._step_to(root, readout, str(value))

    def press(self, css: str, key: str, times: int = 1) -> None:
        """Keys on a control; a slider's handle takes them for the slider."""
        inner = self.page.locator(f"{css} :is(.noUi-handle, select, input, textarea, button)")
        handle = (inner if inner.count() else self.page.locator(css)).first
        for _ in range(times):
            handle.press(key)

    def choose(self, css: str, label: str) -> None:
        """An option of a dropdown or list."""
        root = self.page.locator(css).first
        (root if root.evaluate("e => e.tagName") == "SELECT" else root.locator("select").first).select_option(
            label=label
        )

    def click(self, css: str) -> None:
        self.page.locator(css).first.click()

    def click_point(self, css: str, trace: int, index: Index) -> dict[str, Any]:
        """Clicks a point of a figure (scatter, scattergl, bar; `(row, column)` of a heatmap).

        `css`: the figure, or what it stands in. Returns which point plotly took it for, as `{"trace": 0, "point": 3}`: where points lie
        on one another that may be the neighbour.
        """
        x, y = self._seen(css, "point", trace, index)
        self.page.mouse.move(x - 3, y - 3)
        self.page.mouse.move(x, y, steps=2)
        self.wait(f"tracelens.hovered({json.dumps(css)}).length", 5)
        # Plotly looks for the nearest point every 50 ms.
        self.page.wait_for_timeout(80)
        found = self.value(f"tracelens.hovered({json.dumps(css)})")
        self.page.mouse.down()
        self.page.mouse.up()
        return found[0]

    def drag(self, css: str, start: tuple[Any, Any], end: tuple[Any, Any], trace: int = 0) -> None:
        """Drags over a figure from one place to another, in the data coordinates of a trace's axes: a box select, or a zoom."""
        x0, y0 = self._seen(css, "pixel", trace, *start)
        x1, y1 = self.page.evaluate("([css, ...at]) => tracelens.pixel(css, ...at)", [css, trace, *end])
        self.page.mouse.move(x0, y0)
        self.page.mouse.down()
        self.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2, steps=3)
        self.page.mouse.move(x1, y1, steps=3)
        self.page.mouse.up()

    def theme(self, *, dark: bool) -> None:
        """Switches the notebook's theme."""
        if dark != (self.page.evaluate("() => document.body.dataset.jpThemeLight") == "false"):
            name = "JupyterLab Dark" if dark else "JupyterLab Light"
            self.page.evaluate(
                "name => tracelens.command('apputils:change-theme', { theme: name }).then(() => true)", name
            )
            self.wait(f"document.body.dataset.jpThemeLight === '{str(not dark).lower()}'")
            # JupyterLab covers the page meanwhile, and a second switch before the cover is gone makes it take it away twice, and throw.
            self.page.wait_for_timeout(100)
            self.wait("!document.getElementById('jupyterlab-splash')")

    def save(self) -> None:
        """Saves the notebook."""
        self.page.evaluate("() => tracelens.command('docmanager:save').then(() => true)")
        self.wait("!tracelens.panel.context.model.dirty")

    # What it takes, and what the kernel knows.

    def latency(self, action: Callable[[], object], expression: str, seconds: float = 10) -> float:
        """Milliseconds from the action's first input event to the first animation frame in which a JavaScript expression holds.

        The input event is the first press of a key or button, or change of an input: pointer movements before it do not count. An action
        of one key or one click is measured best.

        Raises:
            Exception: if the expression holds before the action, or not within the time.
        """
        self.page.evaluate("expression => tracelens.watch(expression)", expression)
        action()
        self.wait("tracelens.measured !== null", seconds)
        return self.value("tracelens.measured")

    def ask(self, expression: str) -> Any:
        """A Python expression's value in the notebook's kernel (what JSON can say): `ask("explorer.tau.value")`."""
        import ast

        return json.loads(ast.literal_eval(self.page.evaluate("it => tracelens.ask(it)", expression)))

    def does(self, code: str) -> None:
        """Runs Python in the notebook's kernel, without a cell."""
        self.page.evaluate("code => tracelens.does(code)", code)

    def _seen(self, css: str, what: str, *at: Any) -> list[float]:
        """Scrolls to the figure, and says where the place is."""
        self.page.evaluate("css => tracelens.plot(css).scrollIntoView({ block: 'center' })", css)
        self.page.wait_for_timeout(50)
        return self.page.evaluate(f"([css, ...at]) => tracelens.{what}(css, ...at)", [css, *at])

    def _step_to(self, root: Any, readout: Any, value: str, most: int = 500) -> None:
        handle = root.locator(".noUi-handle").first
        for key in ("End", "Home", *["ArrowRight"] * most):
            handle.press(key)
            if readout.inner_text().strip() == value:
                return
        raise AssertionError(f"the slider never says {value}; its last is {readout.inner_text()}")
