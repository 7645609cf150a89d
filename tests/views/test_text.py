from dataclasses import replace

import pytest

from tests.views.made_up import (
    made_up_report,
    made_up_sweep,
    report_without_intervals,
    report_without_safety_features,
    unchanged_report,
)
from tracelens.audit_report import Control
from tracelens.auditing.preservation import Shares
from tracelens.optimization_auditor import SweepResult
from tracelens.stats import Estimate
from tracelens.views.numbers import aligned, feature_sets, interval, percent, significant, thousandths
from tracelens.views.text import audit_text, safety_findings, sweep_text


def row(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line


def rows(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(start)]


def test_every_number_stands_beside_its_controls():
    text = audit_text(made_up_report())
    models = next(line for line in text.splitlines() if "matched noise" in line)
    titles = ("INT4", "matched noise", "permuted error", "bf16 floor")
    assert [models.index(name) for name in titles] == sorted(models.index(name) for name in titles)
    safety, others = rows(text, "safety features")[:2]
    assert safety.split("  ")[1] == "safety features (3)"
    assert [cell in safety for cell in ("0.816 [0.806, 0.826]", "0.850", "0.999 [0.999, 0.999]")] == [True] * 3
    assert [name in others for name in ("random features", "permuted labels")] == [True, True]
    assert row(text, "CPFR  ").split("  ")[-3:] == [
        "0.816 [0.806, 0.826]",
        "0.550 [0.450, 0.650]",
        "0.650 [0.550, 0.750]",
    ]
    assert row(text, "warning").split()[:3] == ["warning", "(1)", "0.900"]
    assert row(text, "capability features (2)").count("0.850") == 1


def test_every_share_and_output_stands_beside_its_controls():
    text = audit_text(made_up_report())
    assert [row(text, f"Share of the {what}") for what in ("3 safety", "2 capability")]
    safety, capability, beside = rows(text, "damaged (correlation < 0.5)")
    assert [safety.count(cell) for cell in ("0.0 [-1.0, 1.0]", "25.0")] == [1, 3]
    assert capability.count("50.0 [49.0, 51.0]") == 4
    assert beside.count("12.5 [11.5, 13.5]") == 2
    assert [line.count("30.0") for line in rows(text, "degraded (fidelity < 0.8)")] == [4, 4, 3]
    assert row(text, "smeared pairs").split()[2:] == ["1", "17", "17", "17"]
    assert "50.0 [9.5, 90.5]" in row(text, "flipped of 2 decisions, %")
    assert row(text, "refuse→comply of 1, %").split("%")[1].split()[0] == "100.0"
    assert row(text, "comply→refuse of 1, %").split("%")[1].split()[0] == "0.0"
    assert row(text, "refuse→comply").count("0.0 [0.0, 40.0]") == 3
    assert row(text, "KL, 10⁻³ nats per token").count("15 [14, 16]") == 3
    assert row(text, "top-1").count("93.0 [92.0, 94.0]") == 3
    assert row(text, "perplexity  ").count("4.400") == 3
    assert "4.000" in row(text, "perplexity, reference")


def test_the_tables_fit_a_laptop():
    certain = Estimate(1.0, 1.0, 1.0)
    wide = replace(made_up_report(), shares=dict.fromkeys(("safety", "capability"), Shares(*[certain] * 5)))
    for report in (made_up_report(), wide, made_up_report(controls=False)):
        text = audit_text(report).split(" findings,")[0]
        assert max(map(len, text.splitlines())) <= 120
    assert max(map(len, sweep_text(made_up_sweep()).splitlines())) <= 120


def test_a_control_without_a_number_has_a_dash():
    noise = Control("noise", {}, None)
    text = audit_text(replace(made_up_report(), controls={"noise": noise}))
    assert all(
        rows(text, start)[0].rstrip().endswith("—")
        for start in ("safety features", "survived", "KL", "flipped", "smeared")
    )
    assert "random features" not in text
    assert "nan" not in text


def test_controls_that_are_absent_say_why():
    text = audit_text(made_up_report(controls=False))
    assert "No matched noise: controls were switched off." in text
    assert "No matched noise" not in audit_text(made_up_report())


def test_findings_are_worst_first_and_cut_at_top():
    report = made_up_report()
    text = audit_text(report, top=1)
    shown = [line for line in text.splitlines() if line.startswith("Warning")]
    assert shown[0] == report.findings()[0]
    assert "Feature #7 (capability" in shown[0]
    assert "3 findings, 2 on safety features" in text
    assert "… and 2 more (report.features, report.smeared_pairs)" in text


def test_safety_findings_do_not_drown_in_capability_findings():
    report = made_up_report()
    text = audit_text(report, top=1)
    assert text.index("Feature #7") < text.index("on safety features:") < text.index("Features #3 and #6")
    assert [line.split(" (")[0] for line in safety_findings(report)] == [
        "Warning: Features #3 and #6",
        "Warning: Feature #3",
    ]
    assert "The worst of the others" not in audit_text(report, top=10)


def test_the_verdict_comes_last_and_whole():
    report = made_up_report()
    last = audit_text(report).split("\n\n")[-1]
    assert " ".join(last.split()) == f"Verdict: {report.verdict.text}"


def test_an_unchanged_model_is_said_to_be_unchanged():
    text = audit_text(unchanged_report())
    assert "Nothing changed: every feature and every output is exactly that of the reference." in text
    assert "Warning" not in text


def test_flips_that_cannot_be_read():
    assert "no prompt's decision can be read" in audit_text(made_up_report(readable=False))


def test_without_controls_there_is_no_column_for_them():
    text = audit_text(made_up_report(controls=False))
    assert ["INT4"] in [line.split() for line in text.splitlines()]
    assert "matched noise" not in text.replace("No matched noise", "")
    assert "Safety features beside other features" not in text


def test_without_safety_features_there_is_no_number():
    text = audit_text(report_without_safety_features())
    assert rows(text, "safety features (0)")[0].split()[3] == "—"
    assert "No safety features were found" in text
    assert "nan" not in text


def test_a_feature_of_two_behaviours_counts_in_both():
    report = made_up_report()
    report.fingerprint.features[0].behaviours["warning"] = 0.91
    assert feature_sets(report) == {"safety": 3, "refusal": 2, "warning": 2, "capability": 2}


def test_a_sweep_is_a_line_per_precision_beside_its_controls():
    sweep = made_up_sweep()
    text = sweep_text(sweep)
    assert sum(line.startswith("INT2-g32 ") for line in text.splitlines()) == 2
    assert [name in row(text, "CPFR") for name in ("safety, matched noise", "safety, permuted error")] == [True, True]
    assert row(text, "reference").split()[1] == "4.000"
    bare = sweep_text(SweepResult({"int4": made_up_report(controls=False, readable=False)}))
    assert row(bare, "CPFR").split() == ["CPFR", "safety", "capability"]
    assert "nan" not in bare
    for report in sweep.reports.values():
        assert f"{report.verdict.headline}." in text


@pytest.mark.parametrize(
    ("estimate", "number", "rate"),
    [
        (Estimate(0.5, 0.25, 0.75), "0.500 [0.250, 0.750]", "50.0 % [25.0, 75.0]"),
        (Estimate(float("nan"), float("nan"), float("nan")), "—", "—"),
        (None, "—", "—"),
        (Estimate(0.5, float("nan"), float("nan")), "0.500", "50.0 %"),
    ],
)
def test_numbers(estimate, number, rate):
    assert interval(estimate) == number
    assert percent(estimate) == rate


@pytest.mark.parametrize(
    ("estimate", "written"),
    [
        (Estimate(0.0013, 0.00118, 0.00142), "1.3 [1.2, 1.4]"),
        (Estimate(0.02, 0.01, 0.03), "20 [10, 30]"),
        (Estimate(2.1, 1.9, 2.4), "2,100 [1,900, 2,400]"),
        (Estimate(2e-6, 1e-6, 3e-6), "< 0.01"),
        (Estimate(0.0, 0.0, 0.0), "0 [0, 0]"),
        (Estimate(0.5, float("nan"), float("nan")), "500"),
        (Estimate(float("nan"), float("nan"), float("nan")), "—"),
        (None, "—"),
    ],
)
def test_thousandths(estimate, written):
    assert thousandths(estimate) == written


@pytest.mark.parametrize(
    ("number", "written"), [(4.5, "4.500"), (45.678, "45.68"), (1234.5, "1,234"), (0.0, "0"), (float("inf"), "inf")]
)
def test_four_digits_whatever_the_size(number, written):
    assert significant(Estimate(number, float("nan"), float("nan"))) == written


def test_columns_are_aligned():
    assert aligned([("a", "1.0"), ("bcd", "10.0")]) == ["a     1.0", "bcd  10.0"]


@pytest.mark.parametrize(
    "report",
    [
        report_without_intervals(),
        made_up_report(features=[(3, "refusal", 0.6, 0.3)], pairs=[]),
        made_up_report(features=[], pairs=[]),
    ],
    ids=["no intervals", "one feature", "no features"],
)
def test_reports_with_parts_missing_are_told(report):
    text = audit_text(report) + sweep_text(SweepResult({"int4": report}))
    assert "nan" not in text
    assert "None" not in text
