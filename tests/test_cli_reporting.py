"""`tracelens report`."""

import json

import pytest

from tests.test_cli import run
from tests.views.made_up import made_up_report, made_up_sweep
from tests.views.made_up_plans import made_up_plan


@pytest.fixture
def audit(tmp_path):
    return made_up_report().save(tmp_path / "audit")


def test_the_page_of_a_saved_audit(audit):
    ran = run("report", audit)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("Safety features suffered less than capability features in INT4.")
    for name in ("report.html", "report-numbers.json"):
        assert str(audit / name) in ran.out
        assert (audit / name).is_file()
    assert run("report", audit).code == 0, "the saved audit is still there"


def test_with_a_plan_and_a_sweep(audit, tmp_path):
    plan, sweep, out = (
        made_up_plan().save(tmp_path / "plan.json"),
        made_up_sweep().save(tmp_path / "sweep"),
        tmp_path / "new" / "x.html",
    )
    ran = run("report", audit, "--plan", plan, "--sweep", sweep, "--out", out)
    assert ran.code == 0, ran.err
    page = out.read_text(encoding="utf-8")
    assert 'id="repair"' in page
    assert 'id="sweep"' in page
    assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["repair"]["bytes"] == 1625


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "is not an audit report that AuditReport.save wrote"),
        (["{audit}", "--out", "x.pdf"], "give the name of a page, such as x.html"),
        (["{audit}", "--plan", "{audit}/features.csv"], "is not a repair plan that Tracelens wrote"),
        (["{audit}", "--sweep", "{audit}"], "is not a sweep that SweepResult.save wrote"),
    ],
)
def test_bad_input_is_one_clear_message(audit, args, message):
    ran = run("report", *(arg.format(audit=audit) for arg in args))
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
