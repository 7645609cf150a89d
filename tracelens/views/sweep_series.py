"""The lines of one measure of a sweep: what is estimated of every entry, and in its controls."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from tracelens.stats import Estimate, wilson
from tracelens.views.bands import in_percent
from tracelens.views.numbers import CONTROLS
from tracelens.views.style import CAPABILITY, FLIP, QUANTIZED, SAFETY

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport, Control
    from tracelens.sweep_result import SweepResult


@dataclass(frozen=True)
class Series:
    """A line of a panel: its estimate in a report (None: none), and in a control, if the control has it."""

    name: str
    colour: str
    symbol: str
    of: dict[str, Estimate]
    controls: dict[str, dict[str, Estimate]]
    """Control → entry → estimate."""


def series(sweep: "SweepResult", measure: str, behaviour: str | None) -> list[Series]:
    """The lines of a panel, the one that is asked about first."""
    about = behaviour or "safety"
    if measure in ("CPFR", "muted", "degraded", "damaged"):
        sets = [(about, SAFETY, "circle"), ("capability", CAPABILITY, "square")]
        return [
            _series(sweep, f"{name} features", colour, symbol, lambda of, name=name: _of_set(of, measure, name))
            for name, colour, symbol in sets
        ]
    if measure == "flips":
        return _flips(sweep, behaviour)
    if measure == "smeared":
        return _smeared(sweep, behaviour)
    reading = {
        "KL": (lambda r: r.divergence.kl, lambda c: c.kl),
        "perplexity": (lambda r: r.divergence.perplexity_quantized, lambda c: c.perplexity),
    }[measure]
    return [_series(sweep, "quantized", QUANTIZED, "circle", *reading)]


def _series(sweep: "SweepResult", name: str, colour: str, symbol: str, of: Any, of_control: Any = None) -> Series:
    own = {entry: e for entry, report in sweep.reports.items() if (e := of(report)) is not None}
    controls = {
        control: found
        for control in CONTROLS
        if (found := dict(_of_controls(sweep.reports.items(), control, of_control or of)))
    }
    return Series(name, colour, symbol, own, controls)


def _of_controls(reports: Iterable[tuple[str, "AuditReport"]], control: str, of: Any) -> Iterable[tuple[str, Estimate]]:
    for entry, report in reports:
        found = of(report.controls[control]) if control in report.controls else None
        if found is not None and not isnan(found.value):
            yield entry, found


def _of_set(of: "AuditReport | Control", measure: str, name: str) -> Estimate | None:
    if measure == "CPFR":
        return of.cpfr.get(name)
    shares = of.shares.get(name)
    return None if shares is None else in_percent(shares[measure])


def _flips(sweep: "SweepResult", behaviour: str | None) -> list[Series]:
    ways = {
        "both ways": (QUANTIZED, "circle"),
        "refuse→comply": (FLIP["refuse→comply"], "triangle-down"),
        "comply→refuse": (FLIP["comply→refuse"], "triangle-up"),
    }
    of = {entry: flips_of(report, behaviour) for entry, report in sweep.reports.items()}
    found = []
    for way, (colour, symbol) in ways.items():
        own = {entry: in_percent(rates[way]) for entry, rates in of.items() if way in rates}
        # Controls are known over all prompts only.
        of_control = (
            (lambda c: c.flips and in_percent(c.flips)) if way == "both ways" and behaviour is None else lambda c: None
        )
        found.append(_series(sweep, way, colour, symbol, lambda r: None, of_control))
        found[-1] = Series(way, colour, symbol, own, found[-1].controls)
    return found


def flips_of(report: "AuditReport", behaviour: str | None) -> dict[str, Estimate]:
    """Shares of flipped prompts, both ways and each way; of the prompts of one behaviour, or all. Empty where no decision can be read."""
    if report.flips is None:
        return {}
    if behaviour is None:
        f = report.flips
        return {"both ways": f.rate, "refuse→comply": f.refuse_to_comply, "comply→refuse": f.comply_to_refuse}
    rows: Any = report.prompts[report.prompts["behaviour"] == behaviour]
    rows = rows[rows["margin_reference"].notna() & rows["margin_quantized"].notna()]
    if not len(rows):
        return {}
    refused, flipped = rows["margin_reference"] > 0, rows["flip"] != ""
    counts = {
        "both ways": (int(flipped.sum()), len(rows)),
        "refuse→comply": (int((flipped & refused).sum()), int(refused.sum())),
        "comply→refuse": (int((flipped & ~refused).sum()), int((~refused).sum())),
    }
    return {way: wilson(k, n) for way, (k, n) in counts.items() if n}


def _smeared(sweep: "SweepResult", behaviour: str | None) -> list[Series]:
    nan = float("nan")

    def about(report: "AuditReport") -> Estimate:
        sides = [report.smeared_pairs[side] for side in ("behaviour_i", "behaviour_j")]
        rows = [side == behaviour if behaviour else side != "capability" for side in sides]
        return Estimate(float((rows[0] | rows[1]).sum()), nan, nan)

    whole = _series(
        sweep,
        "all pairs",
        QUANTIZED,
        "square",
        lambda r: Estimate(float(len(r.smeared_pairs)), nan, nan),
        lambda c: None if c.smeared is None else Estimate(float(c.smeared), nan, nan),
    )
    part = _series(sweep, f"pairs with a {behaviour or 'safety'} feature", SAFETY, "circle", about, lambda c: None)
    # Controls count all pairs, so that all pairs are what stands beside them.
    return [whole, part]
