"""`Lab`: notebooks shown in a real JupyterLab by a real browser."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from tests.browser.server import TOKEN, Server
from tests.browser.shown import Shown

FLAGS = (
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
    "--enable-unsafe-swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
CLOSE_WIDGETS = "import sys; 'ipywidgets' in sys.modules and sys.modules['ipywidgets'].Widget.close_all()"
Kernel = Literal["shared", "own", "fresh"]
SCRIPTS = Path(__file__).with_name("page.js")


def find_chromium() -> str | None:
    """Debian's chromium or a Chrome; `TRACELENS_CHROMIUM` names another."""
    named = os.environ.get("TRACELENS_CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def notebook(*cells: str) -> dict[str, Any]:
    """A notebook of code cells that have not run."""
    import nbformat

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": kernel}
    )
    return json.loads(nbformat.writes(made))


class Lab:
    """A browser beside a server. All its notebooks share one kernel, unless one asks for its own.

    Attributes:
        blocked: addresses outside this machine that pages asked for (and did not get).
    """

    def __init__(self, server: Server) -> None:
        from playwright.sync_api import sync_playwright

        self.server = server
        self.blocked: list[str] = []
        self._kernel = ""
        self._idle: list[Any] = []
        self._using: dict[int, tuple[Any, Shown]] = {}
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))

    def show(
        self,
        *cells: str,
        kernel: Kernel = "shared",
        dark: bool = False,
        size: tuple[int, int] = (1366, 768),
        seconds: float = 120,
    ) -> Shown:
        """Writes a notebook of these cells, opens it, runs all, and waits until the kernel is idle and the widgets are drawn."""
        shown = self.open_new(*cells, kernel=kernel, dark=dark, size=size)
        shown.run_all(seconds)
        return shown

    def open_new(
        self, *cells: str, kernel: Kernel = "shared", dark: bool = False, size: tuple[int, int] = (1366, 768)
    ) -> Shown:
        """The same, without running it."""
        path = f"shown_{time.time_ns()}.ipynb"
        (self.server.root / path).write_text(json.dumps(notebook(*cells)), encoding="utf-8")
        return self.open(path, kernel=kernel, dark=dark, size=size)

    def open(
        self,
        path: str,
        *,
        kernel: Kernel = "shared",
        dark: bool = False,
        size: tuple[int, int] = (1366, 768),
    ) -> Shown:
        """Opens a notebook of the server's folder, and runs nothing.

        `kernel`: the one that the module shares, one of its own, or a fresh one, which JupyterLab starts itself where the notebook has none
        running (with the kernel that made the notebook's outputs gone). A notebook whose kernel runs keeps it.
        """
        running = {s["path"] for s in self.server.ask("GET", "sessions")}
        if kernel != "fresh" and path not in running:
            self.server.ask("POST", "sessions", self._session(path, kernel == "own"))
        shown = self._shown(self._idle.pop() if self._idle else self._page(lab=True), size)
        shown.path = path
        shown.shared = kernel == "shared" and path not in running
        shown.page.evaluate("path => tracelens.open(path)", path)
        shown.page.wait_for_function("() => tracelens.ready()", timeout=60_000)
        shown.theme(dark=dark)
        return shown

    def file(self, path: Path, size: tuple[int, int] = (1366, 768)) -> Shown:
        """Opens an HTML file from disk, as a double click would."""
        shown = self._shown(self._page(lab=False), size)
        shown.page.goto(path.resolve().as_uri())
        return shown

    def forget(self, path: str) -> None:
        """Shuts a notebook's kernel down."""
        for session in self.server.ask("GET", "sessions"):
            if session["path"] == path:
                self.server.ask("DELETE", f"sessions/{session['id']}")

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()
        for kernel in self.server.ask("GET", "kernels"):
            self.server.ask("DELETE", f"kernels/{kernel['id']}")

    def _give_back(self, shown: Shown) -> None:
        """A page without a scar serves the next notebook: JupyterLab takes seconds to load."""
        page = self._using.pop(id(shown), (None,))[0]
        if page is None:
            return
        if shown.shared and not any(other.shared for _, other in self._using.values()):
            # Else the next notebook of this kernel would load them all again.
            shown.does(CLOSE_WIDGETS)
        if shown.errors or not page.url.startswith(self.server.url):
            page.context.close()
        else:
            page.evaluate("() => tracelens.leave()")
            self._idle.append(page)

    def _shown(self, page: Any, size: tuple[int, int]) -> Shown:
        page.set_viewport_size({"width": size[0], "height": size[1]})
        shown = Shown(page, self.blocked, self._give_back)
        self._using[id(shown)] = (page, shown)
        return shown

    def _hears(self, page: Any, text: str) -> None:
        """An error on a page belongs to the notebook that it shows now."""
        for used, shown in self._using.values():
            if used is page:
                shown.errors.append(text)

    def _session(self, path: str, own: bool) -> dict[str, Any]:
        kernel: dict[str, Any] = {"name": "python3"}
        if not own:
            self._kernel = self._kernel or self.server.ask("POST", "kernels", {"name": "python3"})["id"]
            kernel = {"id": self._kernel}
        return {"path": path, "name": path, "type": "notebook", "kernel": kernel}

    def _page(self, lab: bool) -> Any:
        """An empty page with a context of its own, or one with an empty JupyterLab."""
        context = self._browser.new_context(service_workers="block")
        context.route("**/*", self._gate)
        context.add_init_script(path=SCRIPTS)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("websocket", lambda socket: None if self._is_near(socket.url) else self.blocked.append(socket.url))
        page.on("pageerror", lambda error: self._hears(page, str(error)))
        page.on("console", lambda line: self._hears(page, line.text) if line.type == "error" else None)
        if lab:
            page.goto(f"{self.server.url}/lab/workspaces/w{time.time_ns()}?token={TOKEN}")
            page.wait_for_function("() => window.jupyterapp?.restored.then(() => true)", timeout=60_000)
        return page

    def _is_near(self, url: str) -> bool:
        here = self.server.url.removeprefix("http")
        return url.startswith(("data:", "blob:", "file:", "about:", f"http{here}", f"ws{here}"))

    def _gate(self, route: Any) -> None:
        if self._is_near(route.request.url):
            route.continue_()
        else:
            self.blocked.append(route.request.url)
            route.abort()
