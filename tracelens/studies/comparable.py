"""Which audits may be read together: those of one reference, through the same SAEs, on the same prompts."""

from collections.abc import Sequence

import torch

from tracelens.audit_report import AuditReport
from tracelens.errors import PairMismatchError

TOLERANCE = 1e-4
"""Relative difference of the reference's sums that batches, threads or devices may make."""


def check_same_reference(reports: Sequence[AuditReport]) -> None:
    """Raises `PairMismatchError`, saying what differs, unless all reports saw the same reference do the same."""
    first = reports[0]
    for report in reports[1:]:
        if differences := _differences(first, report):
            raise PairMismatchError(
                f"the audits of {first.label} and {report.label} cannot be compared feature by feature, they differ in\n"
                + "\n".join(f"- {line}" for line in differences)
                + "\nAudit both against one reference, with the same SAEs, prompts and min_active."
            )


def _differences(a: AuditReport, b: AuditReport) -> list[str]:
    named = [
        ("sites", a.sites, b.sites),
        ("SAEs", a.fingerprint.saes, b.fingerprint.saes),
        ("min_active", a.settings["min_active"], b.settings["min_active"]),
        ("tokens", a.moments.n.sum().item(), b.moments.n.sum().item()),
    ]
    lines = [f"{name}: {_short(ours)} and {_short(theirs)}" for name, ours, theirs in named if ours != theirs]
    if not lines:
        # Sums over the reference's activations are the same only if model, tokens and SAEs are.
        ours, theirs = (r.moments.total().sum_ref[0].cpu() for r in (a, b))
        if not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(ours.mean())):
            lines.append("the reference's activations: another reference, or other prompts of the same length")
    return lines


def _short(value: object, length: int = 80) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
