"""`write_report`: an audit as one self-contained page, for light and dark screens and for paper, and the same numbers as JSON.

Whatever comes from outside (prompts, tokens, labels, names, settings) is escaped on its way into the page, and the page's security policy
lets no script run but its own two and fetches nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.output import MARKER, write_atomically
from tracelens.views.escaping import in_html
from tracelens.views.report_changed import flipped, muted, preserved
from tracelens.views.report_features import smeared, worst
from tracelens.views.report_figures import policy, scripts, themes
from tracelens.views.report_html import Part
from tracelens.views.report_method import definitions, measured
from tracelens.views.style import CAPABILITY, FONT, SAFETY
from tracelens.views.text import nothing_changed, safety_findings, what_was_compared
from tracelens.views.widgets.card import card_style

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport
    from tracelens.causal.repair.plan_result import RepairPlan
    from tracelens.sweep_result import SweepResult

VERSION = 1
FINDINGS = 5
"""Findings on safety features told with the verdict."""


def write_report(
    report: "AuditReport",
    path: Path,
    *,
    plan: "RepairPlan | None" = None,
    sweep: "SweepResult | None" = None,
    numbers: bool = True,
) -> Path:
    """Writes the page, and with `numbers` its JSON beside it (`numbers_path`); returns the page's path."""
    parts = _parts(report, plan, sweep)
    if numbers:
        text = json.dumps(_numbers(report, parts), indent=1, allow_nan=False)
        write_atomically(numbers_path(path), text + "\n")
    return write_atomically(path, _page(report, parts))


def numbers_path(path: Path) -> Path:
    """Where a page's numbers go: `x.html` → `x.json`, and `report.html` → `report-numbers.json`, as a saved audit keeps itself
    in a `report.json`.
    """
    beside = path.with_suffix(".json")
    return beside.with_name(f"{path.stem}-numbers.json") if beside.name == MARKER else beside


def audit_page(report: "AuditReport", *, plan: "RepairPlan | None" = None, sweep: "SweepResult | None" = None) -> str:
    """The audit as HTML that needs no network: verdict, numbers beside controls, figure, worst features with evidence, pairs, flips,
    the repair plan and the other precisions if they are given, how it was measured, definitions.
    """
    return _page(report, _parts(report, plan, sweep))


def audit_numbers(
    report: "AuditReport", *, plan: "RepairPlan | None" = None, sweep: "SweepResult | None" = None
) -> dict[str, Any]:
    """Every number on that page, unrounded, as strict JSON can hold it: the report under "audit", then what each section adds."""
    return _numbers(report, _parts(report, plan, sweep))


def _parts(report: "AuditReport", plan: "RepairPlan | None", sweep: "SweepResult | None") -> list[Part]:
    parts = [preserved(report), worst(report), smeared(report), muted(report), flipped(report)]
    if plan is not None or sweep is not None:
        from tracelens.views.report_repair import repair, sweep_part

        parts += [repair(report, plan)] if plan is not None else []
        parts += [sweep_part(sweep)] if sweep is not None else []
    return [*parts, measured(report), definitions(report)]


def _numbers(report: "AuditReport", parts: list[Part]) -> dict[str, Any]:
    whole = {"tracelens_page": VERSION, "title": _title(report), "audit": report.to_dict()}
    return _strict(whole | {part.anchor: part.data for part in parts if part.data})


def _title(report: "AuditReport") -> str:
    return f"{report.label}: audit of {report.reference}"


def _page(report: "AuditReport", parts: list[Part]) -> str:
    title = in_html(_title(report))
    contents = "".join(f'<li><a href="#{part.anchor}">{in_html(part.title)}</a></li>\n' for part in parts)
    body = "\n".join(
        [
            '<a class="skip" href="#changed">Skip to the numbers</a>',
            f"<header><h1>{title}</h1>",
            f'<p class="soft">{in_html(what_was_compared(report))}</p></header>',
            f"<main>\n{_verdict(report)}",
            f'<nav aria-label="Contents"><ol>\n{contents}</ol></nav>',
            *(part.html for part in parts),
            "</main>",
            themes(),
        ]
    )
    allowed = scripts()
    colours = f":root {{ --safety: {SAFETY}; --capability: {CAPABILITY}; --font: {FONT}; }}\n"
    css = colours + files("tracelens.views").joinpath("page.css").read_text(encoding="utf-8")
    running = "\n".join(f"<script>{text}</script>" for text in allowed)
    whole = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(allowed, body)}">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">\n'
        f"<style>{css}</style>{card_style()}</head>\n<body>\n{body}\n{running}\n</body></html>\n"
    )
    return whole.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written


def _verdict(report: "AuditReport") -> str:
    """In the verdict's own words; then the worst findings on safety features."""
    changed = "Nothing changed. " if nothing_changed(report) else ""
    rest = report.verdict.text.removeprefix(f"{report.verdict.headline}.").strip()
    found = safety_findings(report)
    lines = "".join(f"<li>{in_html(line.removeprefix('Warning: '))}</li>" for line in found[:FINDINGS])
    more = ""
    if found:
        of = f"the worst {FINDINGS} of {len(found)}" if len(found) > FINDINGS else str(len(found))
        more = f"<p>Findings on safety features ({of}):</p><ul>{lines}</ul>"
    return (
        f'<div class="verdict" role="note" aria-label="Verdict"><strong>{in_html(changed + report.verdict.headline)}.</strong>'
        f"<p>{in_html(rest)}</p>{more}</div>"
    )


def _strict(value: Any) -> Any:
    """As strict JSON can hold it: dataclasses as dicts, arrays as lists, NaN and infinity as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _strict(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _strict(value.tolist())
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
