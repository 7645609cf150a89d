import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.views.made_up import (
    FLIPPED,
    UNCHANGED,
    made_up_report,
    report_without_intervals,
    report_without_safety_features,
    unchanged_report,
)
from tracelens.views.report import audit_page

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The page as a browser reads it: text outside of scripts and styles, scripts, and what it would fetch."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.scripts, self.fetched = "", 0, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data


def test_the_page_is_whole_and_fetches_nothing():
    html = audit_page(made_up_report())
    page = Page(html)
    assert page.open == []
    assert page.fetched == []
    assert html.count("plotly.js v") == 1, "plotly is inlined once"
    # plotly.js itself names addresses (maps, licences) that no figure of ours asks for.
    ours = re.sub(r"<script[^>]*>/\*\*\s*\* plotly\.js.*?</script>", "", html, flags=re.DOTALL)
    assert len(ours) < len(html) / 5
    assert not re.search(r"https?:|url\(|@import|src=", ours)


def test_the_verdict_comes_before_the_numbers():
    report = made_up_report()
    text = Page(audit_page(report)).text
    places = [
        text.index(part) for part in (report.verdict.headline, "What was preserved, what broke", "Worst", "Settings")
    ]
    assert places == sorted(places)
    for part in (
        "0.816 [0.806, 0.826]",
        "matched noise",
        "0.850",
        "#3 and #6",
        "CPFR",
        "at least 10 tokens",
        "torch.float32",
    ):
        assert part in text


def test_text_from_outside_is_escaped():
    prompts = [(f"{EVIL} lock", "refusal", True, 0.5, -0.25, "refuse→comply"), *UNCHANGED]
    report = made_up_report(
        prompts=prompts, features=[(3, EVIL, 0.6, 0.3)], pairs=[("s", 1, 2, EVIL, EVIL, 0.1, 0.7, 0.6, 40)]
    )
    settings = report.settings | {"dataset": EVIL, EVIL: EVIL}
    report = replace(
        report,
        label=EVIL,
        reference=EVIL,
        quantized=EVIL,
        settings=settings,
        cpfr=report.cpfr | {EVIL: report.cpfr["safety"]},
    )
    report = replace(report, verdict=replace(report.verdict, headline=EVIL, text=f"{EVIL}. {EVIL}"))
    page, plain = Page(html := audit_page(report)), Page(audit_page(made_up_report()))
    assert EVIL not in html
    assert page.scripts == plain.scripts
    assert page.text.count(EVIL) >= 10


def test_only_flipped_prompts_are_listed():
    text = Page(audit_page(made_up_report())).text
    assert FLIPPED[0][0] in text
    assert UNCHANGED[0][0] not in text


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (unchanged_report(), "Nothing changed. FP32 left every safety feature as it was"),
        (report_without_safety_features(), "No safety features were found"),
        (made_up_report(controls=False, readable=False), "no prompt's decision can be read"),
        (made_up_report(features=[], pairs=[]), "0 live features"),
        (made_up_report(features=[(3, "refusal", 0.6, 0.3)], pairs=[]), "Worst 1 of 1 safety features"),
        (report_without_intervals(), "safety features (3)0.816"),
    ],
    ids=["unchanged", "no safety features", "no controls", "no features", "one feature", "no intervals"],
)
def test_reports_with_parts_missing(report, said):
    text = Page(audit_page(report)).text
    assert said in re.sub(r"\s+", " ", text)
    assert "nan" not in text


def test_a_tiny_q_is_not_called_zero():
    report = made_up_report()
    text = Page(audit_page(replace(report, features=report.features.assign(q_shift=1e-7)))).text
    assert "< 0.001" in text


def test_to_html_writes_the_page(tmp_path):
    path = made_up_report().to_html(tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
