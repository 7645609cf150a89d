"""The page of an audit in a real browser: opened from disk, light and dark, on a phone, on paper, and without scripts."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from tests.browser.lab import find_chromium
from tests.views.made_up import made_up_sweep
from tests.views.made_up_evidence import report_with_evidence
from tests.views.made_up_plans import made_up_plan

sync_api = pytest.importorskip("playwright.sync_api")
DARK, LIGHT = "rgb(21, 24, 29)", "rgb(255, 255, 255)"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    report = report_with_evidence()
    return report.to_html(tmp_path_factory.mktemp("page") / "x.html", made_up_plan(), made_up_sweep())


@pytest.fixture(scope="module")
def browser():
    chromium = find_chromium()
    if not chromium:
        pytest.skip("no chromium is installed (on Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """The page, what it asked for and what its scripts said went wrong."""

    def __init__(self, browser, path, *, width=1200, drawn=True, **options) -> None:
        self.page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
        self.asked, self.errors = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.goto(path.resolve().as_uri())
        if drawn:
            self.page.wait_for_function("() => document.querySelectorAll('.plot .main-svg').length >= 3")

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.page.context.close()

    def value(self, script: str):
        return self.page.evaluate(f"() => {script}")


@pytest.fixture(scope="module")
def opened(browser, path):
    with Opened(browser, path) as page:
        yield page


def test_it_opens_from_disk_and_asks_for_nothing_else(opened, path):
    assert opened.asked == [path.resolve().as_uri()]
    assert opened.errors == []
    assert opened.value("document.querySelectorAll('.plot .scatterlayer .point').length") > 10
    verdict = opened.page.locator(".verdict").bounding_box()
    assert verdict["y"] + verdict["height"] < 500, "the verdict is what one sees first"
    assert opened.value("document.title") == "INT4: audit of made-up"


def test_hostile_tokens_do_not_run(opened):
    assert opened.value("typeof window.hacked") == "undefined"
    assert "<script>window.hacked=1</script>" in opened.value("document.body.textContent")


def test_the_policy_stops_scripts_and_the_network(browser, path):
    with Opened(browser, path) as opened:
        opened.value(
            "{ const s = document.createElement('script'); s.textContent = 'window.hacked = 2'; document.body.append(s); }"
        )
        opened.value(
            "{ const e = document.createElement('b'); e.setAttribute('onclick', 'window.hacked = 3'); document.body.append(e); e.click(); }"
        )
        opened.value("{ const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i); }")
        assert opened.value("fetch('http://127.0.0.1:9/').then(() => 'reached', () => 'stopped')") == "stopped"
        assert opened.value("typeof window.hacked") == "undefined"
        assert len([said for said in opened.errors if "Content Security Policy" in said]) >= 4


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found = Counter()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found[tag] += 1


def test_the_browser_finds_the_elements_that_were_written(opened, path):
    """Whatever it had to close, move or make up by itself would change their numbers."""
    html = re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    script = "html => [...new DOMParser().parseFromString(html, 'text/html').querySelectorAll('*')].map(e => e.tagName.toLowerCase())"
    assert Counter(opened.page.evaluate(script, html)) == Tags(html).found


def test_a_link_opens_the_evidence_also_by_keyboard(browser, path):
    with Opened(browser, path) as opened:
        card = opened.page.locator("details.card").first
        assert not card.evaluate("e => e.open")
        link = opened.page.locator("td a, th a").first
        link.focus()
        opened.page.keyboard.press("Enter")
        opened.page.wait_for_function("() => document.querySelector('details.card').open")
        assert "Where it moves most" in card.inner_text()
        summary = opened.page.locator("details.card > summary").nth(1)
        summary.focus()
        opened.page.keyboard.press("Enter")
        assert opened.page.locator("details.card").nth(1).evaluate("e => e.open")
        opened.page.locator(".bar button").first.click()
        assert opened.value("[...document.querySelectorAll('#worst details.card')].every(e => e.open)")
        assert opened.errors == []


def test_tables_are_sorted_and_filtered(browser, path):
    with Opened(browser, path) as opened:
        table = opened.page.locator("table.tools", has_text="Worst 5 of 5 features")
        first = lambda: table.locator("tbody tr").first.locator("th").inner_text()  # noqa: E731
        assert first() == "#7"
        button = table.locator("thead button", has_text="tokens")
        button.focus()
        opened.page.keyboard.press("Enter")
        assert table.locator("thead th[aria-sort=ascending]").inner_text().startswith("tokens")
        button.press("Enter")
        assert first() == "#6"
        table.locator("thead button", has_text="feature").click()
        assert [first(), table.locator("tbody tr").last.locator("th").inner_text()] == ["#3", "#7"]
        words = table.locator("xpath=../preceding-sibling::p[1]").locator("input")
        words.fill("refusal blurred")
        assert table.locator("tbody tr:visible th").all_inner_texts() == ["#3"]
        assert opened.page.locator("output", has_text="1 of 5 rows").count() == 1


def test_dark_screens_and_the_switch(browser, path):
    with Opened(browser, path, color_scheme="dark") as opened:
        paper = "getComputedStyle(document.querySelector('.plot .main-svg')).backgroundColor"
        assert opened.value("getComputedStyle(document.body).backgroundColor") == DARK
        assert opened.value(paper) == DARK
        opened.page.emulate_media(color_scheme="light")
        opened.page.wait_for_function(f"() => {paper} === '{LIGHT}'")
        assert opened.value("getComputedStyle(document.body).backgroundColor") == LIGHT


def test_a_phone_scrolls_tables_and_figures_and_not_the_page(browser, path):
    with Opened(browser, path, width=390) as opened:
        opened.value("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert opened.value("document.documentElement.scrollWidth") <= 390
        assert opened.value("[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)")


def test_on_paper_all_is_open_light_and_inside_the_margins(browser, path):
    with Opened(browser, path, width=695, color_scheme="dark") as opened:
        closed = opened.value("document.querySelectorAll('details:not([open])').length")
        assert closed > 5
        opened.page.emulate_media(media="print")
        opened.value("dispatchEvent(new Event('beforeprint'))")
        opened.page.wait_for_timeout(300)
        assert opened.value("[...document.querySelectorAll('details:not([open])')].map(e => e.className)") == [
            "appendix",
            "appendix",
        ]
        assert opened.value("getComputedStyle(document.body).backgroundColor") == LIGHT
        papers = "[...document.querySelectorAll('.plot .main-svg:first-child')].map(e => getComputedStyle(e).backgroundColor)"
        assert set(opened.value(papers)) == {LIGHT}
        wide = "[...document.querySelectorAll('table, .plot .main-svg, pre')].filter(e => e.getBoundingClientRect().right > 696)"
        wide += ".map(e => e.outerHTML.slice(0, 200))"
        assert opened.value(wide) == []
        opened.value("dispatchEvent(new Event('afterprint'))")
        opened.page.emulate_media(media="screen")
        assert opened.value("document.querySelectorAll('details:not([open])').length") == closed
        assert opened.page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_without_scripts_all_text_is_there(browser, path):
    with Opened(browser, path, drawn=False, java_script_enabled=False) as opened:
        text = opened.page.locator("body").inner_text()
        assert text.count("scripts are switched off or failed here") == 3
        for part in (
            "Safety features suffered",
            "0.816 [0.806, 0.826]",
            "Worst 3 of 3 safety features",
            "Kept in 16 bit",
            "What the words mean",
        ):
            assert part in text
        summary = opened.page.locator("details.card > summary").first
        summary.click()
        assert "Where it moves most" in opened.page.locator("details.card").first.inner_text()
