"""`notebooks/05_explore.ipynb` as a person meets it: in JupyterLab, run top to bottom, used, saved, and opened again without its kernel.

What each widget does in detail, its own browser test says; here all of them stand on one page, with the organism's data.
"""

import shutil

import pytest

from tests.browser.server import REPOSITORY

NAME = "05_explore.ipynb"
WIDGETS = {"drift": 1, "smearing": 2, "sweep": 2, "muting": 3, "patching": 2, "prompt": 1}
"""Explorer → how many figures it shows."""
DRIFT, SMEARING, SWEEP, MUTING, PATCHING, PROMPT = (f".tracelens.tracelens-{name}" for name in WIDGETS)
STILL = "[data-tracelens-still]"
POINTS = "data.reduce((n, t) => n + (t.hovertemplate ? [...t.x].filter(Number.isFinite).length : 0), 0)"
"""Points of a scatter that the browser has a place for."""


@pytest.fixture(scope="module")
def shown(lab):
    shutil.copy(REPOSITORY / "notebooks" / NAME, lab.server.root)
    with lab.open(NAME, kernel="own") as page:
        page.run_all(420)
        yield page


def nth(css: str, number: int) -> str:
    """A figure of a widget, for JavaScript."""
    return f"document.querySelectorAll('{css} .js-plotly-plot')[{number}]"


def dark(shown) -> int:
    """Cells of the mosaic that are muted, of both its parts."""
    states = f"[...{nth(MUTING, 0)}.data].flatMap((t) => [...t.z].flatMap((row) => [...row]))"
    return shown.value(f"{states}.filter((state) => state >= 2 && state <= 4).length")


def silent(shown, bits: float) -> int:
    """The same as the kernel counts them; the chosen feature has a colour of its own, whether muted or not."""
    table = "muting.table"
    row = f"{table}.state[{table}.shown_at({bits})]"
    return shown.ask(f"int((({row} >= 2) & (__import__('numpy').arange(len({table})) != muting.selected)).sum())")


def test_every_widget_is_drawn(shown):
    shown.no_widget_failed()
    for name, figures in WIDGETS.items():
        box = f".tracelens.tracelens-{name}"
        assert shown.count(box) == 1, name
        assert shown.count(f"{box} .js-plotly-plot .main-svg") >= figures, name
        assert shown.count(f"{box} .js-plotly-plot") == figures, name
        assert not shown.overflows(box), name
        assert shown.height(box) <= 760, name
    assert shown.page.locator(STILL).locator("visible=true").count() == 0


def test_what_is_drawn_is_what_the_kernel_has(shown):
    # The cell below the explorer chose the safety features from code.
    safety = shown.ask("len(safety)")
    assert shown.figure(DRIFT, POINTS) == safety == 46
    assert shown.count(f"{DRIFT} .tracelens-list option") == safety
    assert f"#{shown.ask('int(worst.feature)')} " in shown.text(f"{DRIFT} .tracelens-card h3")
    counts = shown.ask("[len(trace.x) for trace in smearing.figure.data]")
    assert shown.figure(SMEARING, "data.map((t) => t.x.length)") == counts
    # Of very many pairs some are left out of the drawing.
    assert sum(counts) == shown.ask("len(smearing._drawn)") + 1 > 10_000
    assert "of 4 have a safety CPFR" in shown.text(f"{SWEEP} .tracelens-answer")
    assert dark(shown) == silent(shown, 2.0) > 100
    assert shown.value(f"{nth(PATCHING, 0)}.data[1].z.flat().filter(Number.isFinite).length") == len(
        shown.ask("patching.entry.arms")
    )
    assert shown.figure(PROMPT, "data[1].x.length") == shown.ask("len(asking.figure.data[1].x)") > 4


def test_tau_changes_the_pairs_and_the_figure(shown):
    listed, edge = f"{SMEARING} .tracelens-list option", "layout.shapes[1].path"
    before = shown.text(f"{SMEARING} .tracelens-summary")
    shown.set_slider(f"{SMEARING} .tracelens-tau", 0.9)
    shown.wait(f"tracelens.plot('{SMEARING}').{edge}.includes('0.90000')")
    n = shown.ask("len(smearing.rows)")
    shown.wait_text(f"{SMEARING} .tracelens-summary", f"{n:,} of ")
    assert 0 < n < shown.ask("len(report.smeared_pairs)")
    assert shown.count(listed) == min(n, 200)
    assert shown.text(f"{SMEARING} .tracelens-summary") != before


def test_fewer_bits_make_features_go_dark(shown):
    seen = []
    for bits in ("4", "2"):
        shown.set_slider(f"{MUTING} .tracelens-bits", bits)
        shown.wait_text(f"{MUTING} .tracelens-summary", f"At {bits} bits")
        shown.wait(f"tracelens.plot('{MUTING}')")
        shown.ask("muting.bits.value")
        seen.append(dark(shown))
        assert seen[-1] == silent(shown, float(bits))
    assert seen == sorted(seen)
    assert seen[0] < 10 < 100 < seen[-1]


def test_a_point_of_the_scatter_shows_its_card_in_both_precisions(shown):
    shown.choose(f"{DRIFT} .tracelens-view", "activation: reference against quantized")
    shown.choose(f"{DRIFT} .tracelens-behaviour", "refusal")
    n = shown.ask("int((explorer.live.behaviour == 'refusal').sum())")
    shown.wait_text(f"{DRIFT} .tracelens-summary", f"{n} of ")
    before = shown.text(f"{DRIFT} .tracelens-card h3")
    trace = shown.ask("next(i for i, rows in enumerate(explorer._rows) if (explorer._shown[rows]).sum() > 3)")
    point = shown.ask(
        f"next(int(k) for k, row in enumerate(explorer._rows[{trace}]) if explorer._shown[row] and row != explorer.selected)"
    )
    found = shown.click_point(DRIFT, trace, point)
    row = shown.ask(f"int(explorer._rows[{found['trace']}][{found['point']}])")
    shown.wait(f"document.querySelector('{DRIFT} .tracelens-card h3').innerText !== {before!r}")
    assert f"#{shown.ask(f'int(explorer.live.feature[{row}])')} refusal" in shown.text(f"{DRIFT} .tracelens-card h3")
    card = shown.text(f"{DRIFT} .tracelens-card")
    assert "reference" in card
    assert "quantized" in card
    # Prompts token by token, each token twice, and on both sides some are tinted.
    strips = f"{DRIFT} .tracelens-card .tl-p .tl-c"
    assert shown.count(strips) > 12
    assert all(shown.count(f"{strips} span:nth-child({side})[style*=background]") for side in (1, 2))


def test_a_cell_of_the_heatmap_shows_its_prompts(shown):
    cell = shown.value(
        f"(() => {{ const z = {nth(PATCHING, 0)}.data[1].z; return [0, z[0].findIndex(Number.isFinite)]; }})()"
    )
    found = shown.click_point(PATCHING, 1, tuple(cell))
    assert found["trace"] == 1
    shown.wait(f"{nth(PATCHING, 1)}.data.some((t) => t.x?.length === 60)")
    where = shown.ask("patching.result.rows[patching.arm]")
    shown.wait_text(f"{PATCHING} .tracelens-card", where["group"])
    assert "60 of 60 prompts" in shown.text(f"{PATCHING} .tracelens-card")
    shown.click(f"{PATCHING} .tracelens-direction button:nth-child(2)")
    shown.wait_text(PATCHING, "0 = the reference run")
    assert shown.ask("patching.result.direction") == "damage"


def test_a_point_of_the_sweep_shows_that_report(shown):
    names = shown.value(f"{nth(SWEEP, 0)}.data.map((t) => t.name)")
    trace = names.index("safety features")
    assert shown.figure(SWEEP, f"data[{trace}].x.length") == shown.ask("len(sweep.reports)") == 4
    shown.click_point(SWEEP, trace, shown.figure(SWEEP, f"data[{trace}].customdata").index("int4-g32"))
    shown.wait_text(f"{SWEEP} .tracelens-card", "INT4-g32")
    assert shown.ask("decay.selected") == "int4-g32"
    # Its features open inside, as an explorer of their own.
    shown.click(f"{SWEEP} .tracelens-below button:nth-child(2)")
    shown.wait(f"document.querySelector('{SWEEP} {DRIFT} .main-svg')")
    assert shown.text(f"{SWEEP} {DRIFT} .tracelens-card h3").startswith("#")
    shown.click(f"{SWEEP} .tracelens-below button:nth-child(1)")
    shown.wait(f"!document.querySelector('{SWEEP} {DRIFT}')")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("how do i make malwre", "did you mean 'malware'"),
        ("how do i " + "make " * 80, "context holds 64"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_said_in_place(shown, text, said):
    box = shown.page.locator(f"{PROMPT} .tracelens-text input")
    box.fill(text)
    box.press("Enter")
    shown.wait_text(f"{PROMPT} .tracelens-status", said, 20)
    assert "malware" in shown.text(f"{PROMPT} .tracelens-tokens")


def test_a_prompt_is_answered_by_both(shown):
    box = shown.page.locator(f"{PROMPT} .tracelens-text input")
    box.fill("how do i make bread")
    box.press("Enter")
    shown.wait_text(f"{PROMPT} .tracelens-tokens", "bread", 20)
    shown.wait(f"document.querySelector('{PROMPT} .tracelens-status').innerText === ''", 20)
    margin = shown.ask("asking.look.margin('refusal').quantized")
    assert margin < 0
    assert f"{margin:+.3f}".replace("-", "−") in shown.text(f"{PROMPT} .tracelens-margins").replace("-", "−")
    answers = shown.text(f"{PROMPT} .tracelens-answers")
    assert "INT2-g32" in answers
    assert "organism" in answers


def test_all_of_it_without_an_error_or_the_network(shown, lab):
    shown.no_widget_failed()
    assert not lab.blocked
    assert not lab.server.sockets()


def test_saved_and_opened_without_its_kernel_pictures_are_left(shown, lab):
    shown.save()
    saved = (lab.server.root / NAME).stat().st_size
    lab.forget(NAME)
    shown.close()
    with lab.open(NAME, kernel="fresh") as again:
        again.page.wait_for_selector(".jp-OutputArea-output.jupyter-widgets", state="attached")
        again.wait(f"[...document.querySelectorAll('{STILL}')].filter((e) => e.offsetParent).length === {len(WIDGETS)}")
        again.wait(f"[...document.querySelectorAll('{STILL} img')].every((e) => e.naturalWidth > 100)")
        assert again.count(f"{STILL} img") == len(WIDGETS)
        assert all("run this cell again" in text for text in again.page.locator(STILL).all_inner_texts())
        said = again.text(".jp-Notebook")
        assert "Error displaying" not in said
        assert "Loading widget" not in said
    assert saved < 10e6
