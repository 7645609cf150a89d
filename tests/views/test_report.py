import json
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from tests.views.made_up import (
    FLIPPED,
    UNCHANGED,
    made_up_report,
    made_up_sweep,
    report_without_intervals,
    report_without_safety_features,
    unchanged_report,
)
from tests.views.made_up_evidence import HOSTILE, report_with_evidence
from tests.views.made_up_plans import made_up_plan
from tests.views.page_reader import Page
from tracelens.audit_report import INTERVAL_COLUMNS, AuditReport
from tracelens.views.report import audit_numbers, audit_page
from tracelens.views.report_figures import policy

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def full():
    """A report with everything that a page can show."""
    return report_with_evidence(), made_up_plan(), made_up_sweep()


@pytest.fixture(scope="module")
def html(full):
    report, plan, sweep = full
    return audit_page(report, plan=plan, sweep=sweep)


def ours(html: str) -> str:
    """The page without plotly.js, which names addresses (maps, licences) that no figure of ours asks for."""
    return re.sub(r"<script>/\*\*\s*\* plotly\.js.*?</script>", "", html, flags=re.DOTALL)


def test_the_page_is_whole_and_fetches_nothing(html):
    page = Page(html)
    assert page.open == []
    assert page.fetched == []
    assert page.handlers == []
    assert page.scripts == 2
    assert html.count("plotly.js v") == 1, "plotly is inlined once"
    assert len(ours(html)) < len(html) / 5
    assert not re.search(r"https?:|url\(|@import|src='?\"", ours(html))


def test_the_policy_lets_only_the_pages_own_scripts_run(html):
    allowed = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert allowed.startswith("default-src 'none'; script-src 'sha256-")
    assert "script-src 'unsafe-inline'" not in allowed
    assert "unsafe-eval" not in allowed
    assert "connect-src" not in allowed
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        assert b64encode(sha256(script.encode()).digest()).decode() in allowed
    assert html.index("Content-Security-Policy") < html.index("<style") < html.index("<script")


def test_what_webgl_needs_is_allowed_only_where_it_draws():
    assert "'unsafe-eval'" in policy(["1"], '{"type":"scattergl"}')
    assert "unsafe-eval" not in policy(["1"], '{"type":"scatter"} scattergl')


def test_headings_tables_and_figures_are_told_to_those_who_do_not_see_them(html):
    page = Page(html)
    assert '<html lang="en">' in html
    assert "<title>INT4: audit of made-up</title>" in html
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all(scope in ("col", "row", "rowgroup") for scope in page.scopes)
    cards = html.count('<article class="tl-card"')
    assert cards == 3
    assert len(page.captions) == len(page.tables) - cards, "the table in a card is named by the card"
    assert len(page.labels) == 3, "audit, plan, sweep"
    assert all(label.startswith("Figure: ") and len(label) > 40 for label in page.labels)
    assert set(page.linked) <= {f"#{name}" for name in page.ids}
    assert len(set(page.ids)) == len(page.ids)


def test_the_order_is_verdict_then_changes_evidence_and_method(full, html):
    text = Page(html).text
    parts = (
        f"{full[0].verdict.headline}.",
        "What was preserved, what broke0",
        "Worst 3 of 3 safety features",
        "Evidence, token by token",
        "Smeared pairs: worst 1 of 1",
        "Muted features, safety features first: 1 of 1",
        "Flipped prompts: 1 of 1",
        "Kept in 16 bit: 1 of 3",
        "Every precision of the sweep",
        "SHA-256 of weights and SAEs",
        "circuit-preserving",
    )
    text = text.replace("What was preserved, what broke\n", "What was preserved, what broke0")
    text = text.replace("Circuit-preserving", "circuit-preserving")
    places = [text.index(part, text.index("audit of made-up\n") if i else 0) for i, part in enumerate(parts)]
    assert places == sorted(places)
    for part in (
        "0.816 [0.806, 0.826]",
        "matched noise",
        "0.850",
        "#3 and #6",
        "at least 10 tokens",
        "torch.float32",
        "95.0 % [76.4, 99.1]",
    ):
        assert part in text


def test_text_from_outside_is_escaped():
    prompts = [(f"{EVIL} lock", "refusal", True, 0.5, -0.25, "refuse→comply"), *UNCHANGED]
    report = made_up_report(
        prompts=prompts, features=[(3, EVIL, 0.6, 0.95)], pairs=[("s", 1, 2, EVIL, EVIL, 0.1, 0.7, 0.6, 40)]
    )
    settings = report.settings | {"dataset": EVIL, EVIL: EVIL, "versions": {EVIL: EVIL}, "hashes": {EVIL: EVIL}}
    report = replace(
        report,
        label=EVIL,
        reference=EVIL,
        quantized=EVIL,
        settings=settings,
        cpfr=report.cpfr | {EVIL: report.cpfr["safety"]},
        absent={"labels": EVIL},
    )
    report = replace(report, verdict=replace(report.verdict, headline=EVIL, text=f"{EVIL}. {EVIL}"))
    plan = replace(made_up_plan(), quantized=EVIL, by=EVIL, bytes_basis=EVIL)
    html = audit_page(report, plan=plan, sweep=replace(made_up_sweep(), reports={EVIL: report}))
    page = Page(html)
    assert EVIL not in html
    assert page.scripts == 2
    assert page.text.count(EVIL) >= 20


def test_hostile_tokens_are_shown_as_text(html):
    text = Page(html).text
    shown = re.sub(r"\s", "", text)
    for token in HOSTILE:
        assert re.sub(r"\s", "", token.replace("\n", "↵")) in shown, token
        assert ("<" not in token) or token not in ours(html)


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    prompts = [("lock \u202e \x00", "refusal", True, 0.5, -0.25, "refuse→comply"), *UNCHANGED]
    report = replace(made_up_report(prompts=prompts), label="INT4 \ud83d")
    text = report.to_html(tmp_path / "x.html").read_text(encoding="utf-8")
    assert "\u202e" not in text
    assert "\x00" not in text
    assert json.loads((tmp_path / "x.json").read_text())["audit"]["label"] == "INT4 \ud83d"


def test_flipped_prompts_largest_shift_first():
    more = ("shift it far", "refusal", True, 2.0, -2.0, "refuse→comply")
    page = Page(audit_page(made_up_report(prompts=[*FLIPPED, more, *UNCHANGED])))
    (rows,) = [
        t for t, caption in zip(page.tables, page.captions, strict=True) if caption.startswith("Flipped prompts")
    ]
    assert [row[0] for row in rows[1:]] == ["shift it far", FLIPPED[0][0]]
    assert rows[1][4:] == ["+2.00", "-2.00", "-4.00"]


def test_muted_features_safety_first_beside_controls():
    features = [
        (7, "capability", 0.0, 1.0),
        (8, "capability", 0.1, 0.91),
        (3, "refusal", 0.3, 0.9),
        (4, "warning", 0.9, 0.89),
    ]
    page = Page(audit_page(made_up_report(features=features)))
    found = dict(zip(page.captions, page.tables, strict=True))
    rows = found["Muted features, safety features first: 3 of 3"]
    assert [row[0] for row in rows[1:]] == ["#3", "#7", "#8"]
    beside = found["Share of muted features, beside the same share in each control"]
    assert beside[0][1:] == [
        "INT4",
        "matched noise",
        "permuted error",
        "bf16 floor",
        "random features",
        "permuted labels",
    ]
    assert beside[1] == ["safety features", *["0.0 % [-1.0, 1.0]"] * 6]
    assert beside[2][-2:] == ["—", "—"], "sets of safety features say nothing of capability features"


def test_the_plan_stands_beside_random_plans(full, html):
    plan = full[1]
    page = Page(html)
    text = page.text
    assert plan.verdict in text
    assert "1,625" in text
    assert f"random plans, mean—{plan.random_recovery}" in text
    for told in ("-:^model\\\\.layers\\\\.0\\\\.self_attn\\\\.o_proj$", '"ignore": [', '"lm_head"'):
        assert told in text, told
    other = replace(plan, reference="elsewhere")
    assert "make sure that both are the same build" in Page(audit_page(full[0], plan=other)).text
    assert "make sure" not in text


def test_a_plan_that_quantizers_cannot_be_told_says_why(full):
    plan = replace(full[1], architecture="")
    text = Page(audit_page(full[0], plan=plan)).text
    assert "does not say what its architecture is called" in text


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers_in(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers_in(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


NUMBER = re.compile(r"(?<![\w.#])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def test_every_number_of_a_table_is_in_the_json(full, html):
    report, plan, sweep = full
    # Numbers that nothing else on the page has, so that none is found by luck.
    rng = np.random.default_rng(0)
    columns = ("drift", "novelty", "fidelity_noise", *INTERVAL_COLUMNS)
    features = report.features.assign(**{name: rng.random(5) for name in columns})
    report = replace(report, features=features)
    page = Page(audit_page(report, plan=plan, sweep=sweep))
    stored = np.array(numbers_in(audit_numbers(report, plan=plan, sweep=sweep)))
    missing, n = [], 0
    for table in page.tables:
        for row in table:
            for cell in row[1:]:
                if re.search(r"[0-9a-f]{16}|torch\.|^<|[a-z]{3}", cell):
                    continue  # words, hashes, and what is only said to be small
                for found in NUMBER.findall(cell):
                    text = found.replace(",", "")
                    places = len(text.partition(".")[2]) if "e" not in text else 6
                    n += 1
                    if not any(
                        abs(stored * unit - float(text)).min() <= 0.5000001 * 10.0**-places for unit in (1, 100, 1000)
                    ):
                        missing.append((found, row))
    assert n > 300
    assert not missing


def test_a_number_that_is_not_in_the_json_would_be_found(full):
    report = full[0]
    stored = np.array(numbers_in(audit_numbers(report)))
    assert abs(stored - 0.816).min() < 1e-9
    assert all(abs(stored * unit - 0.31337).min() > 5e-6 for unit in (1, 100, 1000))


def test_the_json_is_strict_and_whole(full, tmp_path):
    report = full[0]
    nan = replace(report, features=report.features.assign(correlation=float("nan"), drift=float("inf")))
    path = nan.to_html(tmp_path / "x.html")
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert not re.search(r"\b(NaN|Infinity)\b", text)
    data = json.loads(text)
    assert path == tmp_path / "x.html"
    assert [row["correlation"] for row in data["audit"]["features"]] == [None] * 5
    assert data["audit"]["features"][0]["drift"] is None
    assert data["audit"]["cpfr"]["safety"]["value"] == 0.816
    assert len(data["audit"]["prompts"]) == 2
    assert data["worst"]["cards"][0]["traces"][0]["tokens"] == list(HOSTILE)
    assert data["smearing"]["merged"][0]["tokens"][0]["quantized"] == [1.5, 1.2]
    assert {"changed", "muting", "flips", "measured", "definitions"} <= data.keys()


def test_the_page_of_a_saved_audit_leaves_the_audit_alone(tmp_path):
    report = made_up_report()
    report.save(tmp_path / "audit")
    report.to_html(tmp_path / "audit" / "report.html")
    assert AuditReport.load(tmp_path / "audit").label == "INT4"
    numbers = json.loads((tmp_path / "audit" / "report-numbers.json").read_text(encoding="utf-8"))
    assert numbers["title"] == "INT4: audit of made-up"


def test_to_html_writes_the_page_and_its_numbers_if_wanted(tmp_path):
    path = made_up_report().to_html(tmp_path / "deep" / "x.html", json=False)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["x.html"]


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (unchanged_report(), "Nothing changed. FP32 left every safety feature as it was"),
        (report_without_safety_features(), "No safety features were found"),
        (made_up_report(controls=False, readable=False), "No prompt's decision can be read"),
        (made_up_report(features=[], pairs=[]), "there are no live features"),
        (made_up_report(features=[(3, "refusal", 0.6, 0.3)], pairs=[]), "Worst 1 of 1 safety features"),
        (report_without_intervals(), "safety features (3)0.816"),
        (made_up_report(), "This report holds no token-level evidence"),
        (made_up_report(prompts=UNCHANGED), "No prompt flips."),
    ],
    ids=[
        "unchanged",
        "no safety",
        "no controls",
        "no features",
        "one feature",
        "no intervals",
        "no evidence",
        "no flips",
    ],
)
def test_reports_with_parts_missing(report, said):
    text = Page(audit_page(report)).text
    assert said in re.sub(r"\s+", " ", text)
    assert not re.search(r"\bnan\b", text)
    assert audit_numbers(report)


def test_a_tiny_q_is_not_called_zero():
    report = made_up_report()
    text = Page(audit_page(replace(report, features=report.features.assign(q_shift=1e-7)))).text
    assert "< 0.001" in text


def test_worst_features_have_their_intervals_and_old_reports_none():
    report = made_up_report()
    rows = next(table for table in Page(audit_page(report)).tables if table[0][1] == "behaviour")
    assert rows[1][4:6] == ["0.600 [0.550, 0.650]", "0.900"]
    old = replace(report, features=report.features.drop(columns=INTERVAL_COLUMNS))
    rows = next(table for table in Page(audit_page(old)).tables if table[0][1] == "behaviour")
    assert rows[1][4:6] == ["0.600", "0.900"]


def test_how_to_run_it_again():
    report = made_up_report()
    again = replace(report, settings=report.settings | {"noise_seeds": 3, "seed": 7, "batch_size": 8})
    text = Page(audit_page(again)).text
    assert "audit = tl.Audit('made-up', precision='int4')" in text
    assert "report = audit.trace_features('made_up', noise_seeds=3, seed=7)" in text
    hashed = replace(
        report, settings=report.settings | {"hashes": {"reference": "5cf5"}, "versions": {"torch": "2.13"}}
    )
    text = Page(audit_page(hashed)).text
    assert "reference5cf5" in text
    assert "torch2.13" in text
    assert "does not say the hashes" not in text


def test_many_features_make_no_large_page():
    report = made_up_report()
    rng = np.random.default_rng(0)
    many = pd.concat([report.features] * 4000, ignore_index=True)
    many["fidelity"] = np.sort(rng.random(len(many)))
    many["behaviour"] = np.where(np.arange(len(many)) % 500 == 7, "refusal", "capability")
    html = audit_page(replace(report, features=many))
    assert len(html.encode()) < 6_000_000
    assert "5,000 features; 15,000 others" in Page(html).text
