"""Whatever comes from outside shows as text, in every figure, widget and page."""

import importlib
import pkgutil
import re
from dataclasses import replace

import pytest

from tests.views.all_figures import FIGURES, damage
from tests.views.hostile import EVIL, HOSTILE, poisoned, read, strings, written
from tests.views.made_up import made_up_report, made_up_sweep
from tests.views.made_up_evidence import HOSTILE as TOKENS
from tests.views.made_up_evidence import S, report_with_evidence
from tests.views.page_reader import Page
from tests.views.test_patching_figures import grid
from tracelens import views
from tracelens.optimization_auditor import SweepResult
from tracelens.views.escaping import in_figure, visible
from tracelens.views.report import audit_page

FIGURE_FUNCTIONS = {
    name: module
    for info in pkgutil.iter_modules(views.__path__)
    if info.name.endswith("_figures") or info.name == "figures"
    for module in [importlib.import_module(f"tracelens.views.{info.name}")]
    for name in vars(module)
    if name.endswith("_figure") and not name.startswith("_") and getattr(module, name).__module__ == module.__name__
}


BEGINNING = '"q"<b>b</b>'


@pytest.fixture(scope="module")
def study():
    return damage()


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_figure_reads_text_as_text(text):
    assert read(in_figure(text)) == visible(text)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_take_no_text_for_markup(name, study, monkeypatch):
    function = name.split()[0]
    module = FIGURE_FUNCTIONS[function]
    draw, given = getattr(module, function), []
    monkeypatch.setattr(module, function, lambda result, **_: given.append(result))
    FIGURES[name](study)
    drawn = [read(text) for text in strings(draw(poisoned(given[0])).to_dict())]
    # Beside an axis there may be room for its beginning only.
    assert BEGINNING in squeezed(" ".join(drawn)), "what was put in can be read"


def evil_report(**changes):
    """A report in which labels, names, behaviours, prompts, tokens and settings are hostile."""
    report = poisoned(report_with_evidence(**changes))
    settings = report.settings | {"dataset": EVIL, EVIL: EVIL, "shared": {EVIL: EVIL}}
    verdict = replace(report.verdict, headline=EVIL, text=f"{EVIL}. {EVIL}")
    return replace(report, settings=settings, verdict=verdict, absent=report.absent | {"labels": EVIL})


def ladder() -> SweepResult:
    return SweepResult({f"int{bits}": made_up_report(label=f"INT{bits}") for bits in (8, 4, 2)})


EXPLORERS = {
    "drift": lambda: views.FeatureDriftExplorer(evil_report()),
    "smearing": lambda: views.SmearingExplorer(evil_report()),
    "sweep": lambda: views.SweepExplorer(poisoned(made_up_sweep())),
    "muting": lambda: views.MutingExplorer(poisoned(ladder())),
    "patching": lambda: views.PatchingExplorer({EVIL: poisoned(grid())}),
}


@pytest.mark.parametrize("name", EXPLORERS)
def test_explorers_take_no_text_for_markup(name):
    explorer = EXPLORERS[name]()
    said = squeezed(written(explorer.box))
    # What falls silent is named by feature and bits; nothing of it is free text.
    assert name == "muting" or squeezed(visible(EVIL)) in said, "what was put in can be read"
    for text in strings(explorer.still().to_dict()):
        read(text)


def test_cards_show_tokens_as_text():
    explorer = views.FeatureDriftExplorer(evil_report())
    explorer.select(S, 3)
    said = written(explorer.box)
    for token in TOKENS:
        assert visible(token) in said
    assert "<b>no</b>" in said, "a promoted token"


def test_the_report_page_takes_no_text_for_markup():
    page, plain = Page(html := audit_page(evil_report())), Page(audit_page(report_with_evidence()))
    assert EVIL not in html
    assert (page.scripts, page.handlers, page.fetched) == (plain.scripts, [], [])
    text = squeezed(page.text)
    assert text.count(squeezed(visible(EVIL))) >= 10
    for token in TOKENS:
        assert squeezed(visible(token)) in text


# A table of pandas holds no half of a surrogate pair.
@pytest.mark.parametrize("text", [t for name, t in HOSTILE.items() if name != "surrogate"])
def test_the_report_page_shows_every_hostile_text(text):
    prompts = [(text, "refusal", True, 0.5, -0.25, "refuse→comply")]
    report = replace(made_up_report(prompts=prompts), label=text)
    page = Page(html := audit_page(report))
    html.encode("utf-8")
    assert page.handlers == []
    assert squeezed(visible(text)) in squeezed(page.text)


def test_data_inside_scripts_cannot_end_them():
    """JSON in a script element ends where `</script` stands, whatever the JSON says."""
    html = audit_page(evil_report())
    for script in re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL):
        assert "window.hacked" not in script.replace("\\u003c", "<").replace("<\\/", "</") or "<script" not in script
    assert not re.search(r"<script>window\.hacked", html)
