"""The report of one precision in place: verdict, numbers beside the controls, and the worst features."""

from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.views.escaping import in_html
from tracelens.views.numbers import CONTROLS, absent_lines, model_heads, model_sections, set_heads, set_sections
from tracelens.views.style import CONTROL

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport
    from tracelens.sweep_result import SweepResult

WORST = 5
# Another explorer may stand inside this one, whose cards are not to be dressed by it.
STYLE = """<style>
.tl-card.tl-sweep, .tracelens-sweep > .widget-html .tl-line { color: var(--jp-ui-font-color1, inherit); font-size: 12px; line-height: 1.45;
  overflow-wrap: anywhere; white-space: normal; }
.tl-card.tl-sweep h3 { font-size: 14px; margin: 0 0 .2em; } .tl-card.tl-sweep h4 { font-size: 12px; margin: .5em 0 .1em; }
.tl-card.tl-sweep p { margin: .2em 0; } .tl-card.tl-sweep ul { margin: .1em 0; padding-left: 1.2em; }
.tl-card.tl-sweep table { width: auto; border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums; margin: .2em 0; }
.tl-card.tl-sweep th, .tl-card.tl-sweep td { padding: .1em .9em .1em 0; border: 0; background: none; color: inherit;
  text-align: right; font-weight: 400; white-space: nowrap; }
.tl-card.tl-sweep th:first-child { text-align: left; } .tl-card.tl-sweep thead th { font-weight: 600; }
.tl-card.tl-sweep tr.tl-head th { font-weight: 600; text-align: left; padding-top: .4em; }
.tracelens-sweep > .tracelens-card { max-height: 172px; overflow: auto; border-top: 1px solid var(--jp-border-color2, #ccc); }
.tracelens-sweep > .widget-html .tl-line { display: block; }
.tracelens-sweep .widget-html, .tracelens-sweep .widget-html-content { min-width: 0; max-width: 100%; white-space: normal; }
.tracelens-sweep .tl-key { white-space: nowrap; margin-right: 1em; } .tracelens-sweep .tl-key i { display: inline-block; width: 22px;
  vertical-align: middle; margin-right: 4px; }
</style>"""
_DASH = {"noise": "dashed", "permuted": "dashed", "bf16": "solid", "random": "dotted", "labels": "dashed"}


def card(name: str, report: "AuditReport", bits: float, n_bytes: float) -> str:
    """HTML of one entry's report."""
    size = "size not known" if isnan(bits) else f"{bits:.3g} bits per weight"
    size += "" if isnan(n_bytes) else f", {n_bytes:,.0f} bytes of weights of linear layers"
    label = report.label if report.label.lower() == name.lower() else f"{name} ({report.label})"
    return (
        f'<div class="tl-card tl-sweep"><h3>{in_html(label)}: {size}</h3><p>{in_html(report.verdict.text)}</p>'
        f"{_worst(report)}{_table(model_heads(report), model_sections(report))}"
        f"{_table(set_heads(report), sections) if (sections := set_sections(report)) else ''}"
        f"{''.join(f'<p>{in_html(line)}</p>' for line in absent_lines(report))}</div>"
    )


def key(sweep: "SweepResult") -> str:
    """HTML: which line is which control."""
    there = [name for name in CONTROLS if any(name in report.controls for report in sweep.reports.values())]
    if not there:
        return '<span class="tl-line">No controls were measured: nothing tells what is usual for an error of this size.</span>'
    parts = [
        f'<span class="tl-key"><i style="border-top: 2px {_DASH[name]} {CONTROL[name]}"></i>{CONTROLS[name]}</span>'
        for name in there
    ]
    return f'<span class="tl-line">Bands, on the safety side: {"".join(parts)}</span>'


def _table(heads: list[str], sections: Any) -> str:
    head = "".join(f"<th>{in_html(cell)}</th>" for cell in ("", *heads))
    rows = []
    for section in sections:
        rows.append(f'<tr class="tl-head"><th colspan="{len(heads) + 1}">{in_html(section.title)}</th></tr>')
        for title, *cells in section.rows:
            rows.append(f"<tr><th>{in_html(title)}</th>{''.join(f'<td>{in_html(cell)}</td>' for cell in cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _worst(report: "AuditReport") -> str:
    """The worst features and the worst safety features; tables stand worst first."""
    safety = report.safety_features.head(WORST)
    if not len(report.features):
        return "<p>No feature fires often enough in the reference to be followed.</p>"
    changed = report.features["fidelity"] != 1
    if not changed.any():
        return f"<p>Nothing changed: each of the {len(changed):,} live features is the same in both models.</p>"
    parts = [("safety features", safety), ("of all features", report.features.head(WORST))]
    found = []
    for title, rows in parts:
        lines = [
            f"#{row.feature} ({in_html(row.behaviour)}, {in_html(row.site)}) fidelity {row.fidelity:.3f}"
            f"{_noise(row.fidelity_noise)}, muted on {row.muting_rate:.0%} of {int(row.n_active):,} tokens"
            for row in rows.itertuples()
        ]
        said = "; ".join(lines) if lines else "none is live"
        found.append(f"<p><b>Worst {title}</b>: {said}.</p>")
    return "".join(found)


def _noise(fidelity: float) -> str:
    return "" if isnan(fidelity) else f" (under noise {fidelity:.3f})"
