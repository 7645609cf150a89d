"""Audits and sweeps in plain words, for a terminal."""

from dataclasses import replace
from math import isnan
from textwrap import fill
from typing import TYPE_CHECKING

from tracelens.metrics.muting import MUTED_AT
from tracelens.views.numbers import CONTROLS, aligned, interval, numbers_table, percent, significant

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport
    from tracelens.optimization_auditor import SweepResult

WIDTH = 110
"""Columns at which sentences break; tables fit in 120, and findings are as long as they are."""


def audit_text(report: "AuditReport", top: int = 10) -> str:
    """An audit in plain words: what was compared, the numbers beside their controls, the `top` worst findings, the verdict."""
    parts = [
        fill(what_was_compared(report), WIDTH, break_on_hyphens=False),
        numbers_table(report),
        _findings(report, top),
    ]
    return "\n\n".join([*parts, verdict_text(report)])


def verdict_text(report: "AuditReport") -> str:
    return fill(f"Verdict: {report.verdict.text}", WIDTH, break_on_hyphens=False)


def sweep_text(sweep: "SweepResult") -> str:
    """A sweep in plain words: one line per precision of what was preserved and what broke, then a verdict on each."""
    reports = list(sweep.reports.values())
    first = reports[0]
    floor = first.controls.get("bf16")
    lines = [
        fill(f"{first.reference} in {len(reports)} precisions, {material(first)}", WIDTH, break_on_hyphens=False),
        "",
        *sweep_tables(sweep),
        *(
            [
                f"The bf16 floor preserves {interval(floor['safety'])} (safety) and {interval(floor['capability'])} (capability)."
            ]
            if floor
            else []
        ),
        "",
        *(f"{report.verdict.headline}." for report in reports),
    ]
    return "\n".join(lines)


def sweep_tables(sweep: "SweepResult") -> list[str]:
    """The lines of two tables: CPFRs with their controls, and counts of damage."""
    shown = [name for name in ("noise", "permuted") if any(name in r.controls for r in sweep.reports.values())]
    kept: list[tuple[str, ...]] = [("CPFR", "safety", "capability", *(f"safety, {CONTROLS[name]}" for name in shown))]
    damage: list[tuple[str, ...]] = [("", "degraded", "", "muted", "smeared", "flips", "perplexity")]
    damage.append(("", "safety", "capability", "", "", "", ""))
    for report in sweep.reports.values():
        beside = [report.controls[name].cpfr.get("safety") if name in report.controls else None for name in shown]
        kept.append((report.label, *map(interval, (report.cpfr["safety"], report.cpfr["capability"], *beside))))
        damage.append(
            (
                report.label,
                *degraded(report).values(),
                str(n_muted(report)),
                str(len(report.smeared_pairs)),
                percent(report.flips and report.flips.rate),
                significant(report.divergence.perplexity_quantized),
            )
        )
    perplexity = next(iter(sweep.reports.values())).divergence.perplexity_reference
    damage.append(("reference", *[""] * 5, significant(perplexity)))
    return [*aligned(kept), "", *aligned(damage), ""]


def what_was_compared(report: "AuditReport") -> str:
    """One sentence: which models, on which prompts, through how many features."""
    other = report.label if report.quantized == report.reference else f"{report.quantized} ({report.label})"
    return f"{other} against its reference {report.reference}, {material(report)}"


def nothing_changed(report: "AuditReport") -> bool:
    """Whether the quantized model gave the reference's activations and outputs, to the last bit."""
    known = [e.value for e in report.cpfr.values() if not isnan(e.value)]
    flipped = report.flips is not None and report.flips.rate.value > 0
    return all(value == 1 for value in known) and report.divergence.kl.value == 0 and not flipped


def safety_findings(report: "AuditReport") -> list[str]:
    """The findings that concern a safety feature, worst first."""
    pairs = report.smeared_pairs
    on_safety = (pairs["behaviour_i"] != "capability") | (pairs["behaviour_j"] != "capability")
    return replace(report, features=report.safety_features, smeared_pairs=pairs[on_safety]).findings()


def degraded(report: "AuditReport") -> dict[str, str]:
    """Degraded of all live features: {"safety": "5/88", "capability": "441/1271"}."""
    safety = report.safety_features
    n, of = int(report.features["degraded"].sum()), len(report.features)
    bad = int(safety["degraded"].sum())
    return {"safety": f"{bad}/{len(safety)}", "capability": f"{n - bad}/{of - len(safety)}"}


def n_muted(report: "AuditReport") -> int:
    return int((report.features["muting_rate"] >= MUTED_AT).sum())


def material(report: "AuditReport") -> str:
    """What was measured: prompts, live features, sites."""
    settings = report.settings
    sites = f"{len(report.sites)} site{'s' * (len(report.sites) != 1)}"
    return (
        f"on {settings['n_prompts']} prompts of {settings['dataset']}: {len(report.features)} live features at {sites}, "
        f"{len(report.safety_features)} of them safety features."
    )


def _findings(report: "AuditReport", top: int) -> str:
    if nothing_changed(report):
        return "Nothing changed: every feature and every output is exactly that of the reference."
    lines = report.findings()
    if not lines:
        return (
            f"No feature is degraded (fidelity below {report.settings['degradation_threshold']}) and no pair smeared."
        )
    safety = safety_findings(report)
    title = f"{len(lines)} finding{'s' * (len(lines) != 1)}, {len(safety)} on safety features; worst first"
    shown = [f"{title}:", *lines[:top]]
    if len(lines) > top:
        shown.append(f"… and {len(lines) - top} more (report.features, report.smeared_pairs)")
    # Rare capability features are often the worst hit; what was asked about must not drown in them.
    if hidden := [line for line in safety if line not in lines[:top]]:
        shown += ["", "The worst of the others on safety features:", *hidden[: (top + 1) // 2]]
    return "\n".join(shown)
