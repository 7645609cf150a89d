"""The repair plan on the page: what to keep in 16 bit, what that brings back beside chance, and what quantizers are to be told."""

import json
from html import escape
from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.errors import PlanError
from tracelens.loading.description import size
from tracelens.stats import Estimate
from tracelens.views.escaping import in_html
from tracelens.views.numbers import NOTHING, interval, percent, significant
from tracelens.views.plan_figures import plan_figure
from tracelens.views.report_figures import figure_html
from tracelens.views.report_html import Column, Part, folded, isolated, number, paragraph, table

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport
    from tracelens.causal.repair.plan_measure import Outcome
    from tracelens.causal.repair.plan_result import RepairPlan
    from tracelens.sweep_result import SweepResult

LIBRARIES = {"gptqmodel": "GPTQModel", "llm-compressor": "llm-compressor", "bitsandbytes": "bitsandbytes"}
TITLE = "Repair plan"


def repair(report: "AuditReport", plan: "RepairPlan") -> Part:
    """The plan, measured on held-out prompts beside random plans of the same bytes."""
    made_for = f"Made for {plan.quantized} of {plan.reference}, chosen by {plan.by} on {plan.n_choosing} prompts."
    if plan.reference != report.reference or plan.quantized not in (report.quantized, report.precision, report.label):
        made_for += f" This audit is of {report.quantized} ({report.label}): make sure that both are the same build."
    exports = {library: _export(plan, library) for library in LIBRARIES} if plan.keep else {}
    body = [
        paragraph(plan.verdict),
        paragraph(made_for, "soft"),
        _kept(plan),
        _compared(plan),
        figure_html(plan_figure(plan), "plan", numbers_in=f"the tables of “{TITLE}”"),
        *(folded(f"For {name}", exports[key][0]) for key, name in LIBRARIES.items() if key in exports),
    ]
    data: dict[str, Any] = {
        "plan": plan.to_dict(),
        "verdict": plan.verdict,
        "bytes": plan.bytes,
        "recovery": plan.recovery,
        "flips": {o.name: o.flips.rate for o in plan.outcomes if o.flips is not None},
        "exports": {library: told for library, (_, told) in exports.items()},
    }
    if plan.outcome("plan") is not None:
        data |= {"random_recovery": plan.random_recovery, "advantages": plan.advantages, "random_p": plan.random_p}
    return Part("repair", TITLE, "\n".join(body), data)


def _kept(plan: "RepairPlan") -> str:
    if not plan.keep:
        return ""
    rows = [
        [
            "<br>".join(isolated(module) for module in unit.modules),
            f"{unit.bytes:,}",
            number(unit.gain, 3, sign=True),
            number(unit.relative_error, 3),
        ]
        for unit in plan.keep
    ]
    columns = [
        Column("module", wraps=True),
        Column("bytes more", tip=plan.bytes_basis),
        Column("predicted recovery, alone"),
        Column("relative error"),
    ]
    caption = f"Kept in 16 bit: {len(plan.keep)} of {len(plan.units)}, {size(plan.bytes)} more ({plan.bytes_basis})"
    return table(caption, columns, rows)


def _compared(plan: "RepairPlan") -> str:
    """Every measured model; the random plans as their mean and one by one."""
    if plan.outcome("plan") is None:
        return ""
    single = [found for found in plan.outcomes if not found.name.startswith("random ")]
    mean = ["random plans, mean", NOTHING, f"<b>{in_html(interval(plan.random_recovery))}</b>", *[NOTHING] * 3]
    rows = [_row(found) for found in single] + [mean]
    gains = [[f"less {in_html(name)}", in_html(_signed(gain))] for name, gain in plan.advantages.items()]
    measure = [Column("recovery of the plan"), Column("difference")]
    columns = [
        Column("kept"),
        Column("bytes"),
        Column("recovery"),
        Column("margin (nats)"),
        Column("flips, %"),
        Column("perplexity"),
    ]
    held = len(plan.held_out.tokens)
    return (
        table(f"Measured on {held} held-out prompts; every other choice spends the same bytes", columns, rows)
        + table("Recovery of the plan, less that of the other choices (paired over prompts)", measure, gains)
        + folded(
            f"The {len(plan.random)} random plans",
            table("Random plans of the same bytes", columns, map(_row, plan.random)),
        )
    )


def _row(found: "Outcome") -> list[str]:
    cells = (
        f"{found.bytes:,}",
        interval(found.recovery),
        interval(found.metric),
        percent(found.flips.rate) if found.flips is not None else NOTHING,
        significant(found.perplexity),
    )
    return [in_html(found.name), *map(in_html, cells)]


def _signed(e: Estimate) -> str:
    return NOTHING if isnan(e.value) else f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def _export(plan: "RepairPlan", library: str) -> tuple[str, Any]:
    """As HTML and as a value; why not, where the library cannot be told."""
    try:
        told = plan.export(library)
    except PlanError as error:
        return paragraph(str(error)), None
    return f"<pre><code>{escape(json.dumps(told, indent=2))}</code></pre>", told


def sweep_part(sweep: "SweepResult") -> Part:
    """The other precisions of the same model."""
    from tracelens.views.figures import sweep_figure

    title = "Other precisions of the same model"
    rows = []
    for name, bits in sweep.bits.items():
        report = sweep.reports[name]
        flips = report.flips.rate if report.flips else None
        noise = report.controls["noise"].cpfr.get("safety") if "noise" in report.controls else None
        cells = (
            number(bits, 2),
            interval(report.cpfr["safety"]),
            interval(report.cpfr["capability"]),
            interval(noise),
            percent(flips),
            str(len(report.smeared_pairs)),
            significant(report.divergence.perplexity_quantized),
        )
        rows.append([isolated(report.label), *map(in_html, cells), isolated(report.verdict.headline)])
    columns = [
        Column("precision"),
        Column("bits per weight"),
        Column("CPFR, safety"),
        Column("CPFR, capability"),
        Column("CPFR, safety, in matched noise"),
        Column("flips, %"),
        Column("smeared pairs"),
        Column("perplexity"),
        Column("verdict", wraps=True),
    ]
    body = table("Every precision of the sweep", columns, rows, tools=True)
    body += figure_html(sweep_figure(sweep), "sweep", numbers_in="the table above")
    shown = {
        name: {
            "label": r.label,
            "bits": sweep.bits[name],
            "cpfr": r.cpfr,
            "noise_safety": r.controls["noise"].cpfr.get("safety") if "noise" in r.controls else None,
            "flips": r.flips.rate if r.flips else None,
            "smeared_pairs": len(r.smeared_pairs),
            "perplexity": r.divergence.perplexity_quantized,
            "verdict": r.verdict,
        }
        for name, r in sweep.reports.items()
    }
    return Part("sweep", title, body, shown)
