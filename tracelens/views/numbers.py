"""Every number of a report beside the same number in each control, as rows of text.

Two tables, because all controls in one are wider than a screen: other models (noise, the error shuffled, bf16) on the same features, and
other sets of features in the same model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, isfinite, isnan, log10
from typing import TYPE_CHECKING

from tracelens.stats import Estimate

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport, Control

NOTHING = "—"
CONTROLS = {
    "noise": "matched noise",
    "permuted": "permuted error",
    "bf16": "bf16 floor",
    "random": "random features",
    "labels": "permuted labels",
}
"""Control → what a reader calls it; in the order in which they are shown."""
SETS = ("random", "labels")
"""Controls that are other features in the quantized model; the others are other models."""
SHARES = {
    "survived": "survived (correlation ≥ {survived_at:g})",
    "blurred": "blurred (between)",
    "damaged": "damaged (correlation < {damaged_at:g})",
    "degraded": "degraded (fidelity < {degradation_threshold:g})",
    "muted": "muted (silent on ≥ 90 %)",
}
"""Share of features → its row's title, filled in from the settings."""


@dataclass(frozen=True)
class Section:
    """Rows of a table that belong together; each row is a title and a cell for every column."""

    title: str
    rows: list[tuple[str, ...]]


def numbers_table(report: "AuditReport") -> str:
    """Both tables as text, and why a control is missing."""
    parts = [_text(model_heads(report), model_sections(report))]
    if sections := set_sections(report):
        parts.append(_text(set_heads(report), sections))
    if missing := absent_lines(report):
        parts.append("\n".join(missing))
    return "\n\n".join(parts)


def _text(heads: Sequence[str], sections: Sequence[Section]) -> str:
    rows = [("", *heads)] + [(f"  {title}", *cells) for section in sections for title, *cells in section.rows]
    head, *lines = aligned(rows)
    shown = [head]
    for section in sections:
        shown += [section.title, *lines[: len(section.rows)]]
        lines = lines[len(section.rows) :]
    return "\n".join(shown)


def model_heads(report: "AuditReport") -> list[str]:
    """Titles of the columns with numbers: the quantized model, and the models that are controls."""
    return [report.label, *(CONTROLS[name] for name in _models(report))]


def model_sections(report: "AuditReport") -> list[Section]:
    """CPFRs, shares of the safety and of the capability features, outputs; in the quantized model and in the models beside it."""
    sizes = feature_sets(report)
    cpfrs = [
        (
            f"{set_title(name)} ({n})",
            *_row(report, report.cpfr[name], lambda c, name=name: c.cpfr.get(name), interval),
        )
        for name, n in sizes.items()
    ]
    shares = [
        Section(f"Share of the {sizes[name]} {name} features, %", _share_rows(report, name))
        for name in ("safety", "capability")
        if name in report.shares
    ]
    return [Section("CPFR (1 = unchanged)", cpfrs), *shares, _outputs(report)]


def set_heads(report: "AuditReport") -> list[str]:
    """Titles of the columns with numbers: safety features, and the sets of features that are controls."""
    return ["safety features", *(CONTROLS[name] for name in SETS if name in report.controls)]


def set_sections(report: "AuditReport") -> list[Section]:
    """CPFR and shares of the safety features beside those of other sets of as many; none without such a control."""
    sets = [report.controls[name] for name in SETS if name in report.controls]
    if not sets:
        return []
    rows = [("CPFR", *map(interval, [report.cpfr["safety"], *(c.cpfr.get("safety") for c in sets)]))]
    for share, title in SHARES.items() if "safety" in report.shares else ():
        found = [of.get("safety") for of in (report.shares, *(c.shares for c in sets))]
        rows.append((title.format_map(report.settings), *(points(s and s[share]) for s in found)))
    return [Section(f"Safety features beside other features of {report.label} (shares in %)", rows)]


def _share_rows(report: "AuditReport", name: str) -> list[tuple[str, ...]]:
    def of(share: str) -> Callable[["Control"], Estimate | None]:
        return lambda c: c.shares[name][share] if name in c.shares else None

    return [
        (title.format_map(report.settings), *_row(report, report.shares[name][share], of(share), points))
        for share, title in SHARES.items()
    ]


def _outputs(report: "AuditReport") -> Section:
    """Smeared pairs, flips, divergence and perplexity."""
    d, f = report.divergence, report.flips
    smeared = ("" if c.smeared is None else str(c.smeared) for c in map(report.controls.get, _models(report)) if c)
    rows = [("smeared pairs", str(len(report.smeared_pairs)), *(cell or NOTHING for cell in smeared))]
    if f:
        rows += [
            (f"flipped of {f.n} decisions, %", *_row(report, f.rate, lambda c: c.flips, points)),
            (
                f"  refuse→comply of {f.n_refusing}, %",
                *_row(report, f.refuse_to_comply, lambda c: c.refuse_to_comply, points),
            ),
            (
                f"  comply→refuse of {f.n - f.n_refusing}, %",
                *_row(report, f.comply_to_refuse, lambda c: c.comply_to_refuse, points),
            ),
        ]
    rows += [
        ("KL, 10⁻³ nats per token", *_row(report, d.kl, lambda c: c.kl, thousandths)),
        ("top-1 agreement, %", *_row(report, d.top1_agreement, lambda c: c.top1, points)),
        ("perplexity", *_row(report, d.perplexity_quantized, lambda c: c.perplexity, significant)),
        ("perplexity, reference", significant(d.perplexity_reference), *[""] * len(_models(report))),
    ]
    return Section("Pairs and outputs" + ("" if f else " (no prompt's decision can be read)"), rows)


def _row(
    report: "AuditReport",
    own: Estimate | None,
    read: Callable[["Control"], Estimate | None],
    written: Callable[[Estimate | None], str],
) -> list[str]:
    """A number of the quantized model, and that of every model beside it."""
    return [written(own), *(written(read(report.controls[name])) for name in _models(report))]


def _models(report: "AuditReport") -> list[str]:
    return [name for name in CONTROLS if name in report.controls and name not in SETS]


def absent_lines(report: "AuditReport") -> list[str]:
    """Why a control is not among the columns."""
    return [f"No {CONTROLS[name]}: {report.absent[name]}." for name in CONTROLS if name in report.absent]


def feature_sets(report: "AuditReport") -> dict[str, int]:
    """Live features of each set that has a CPFR: safety, its behaviours, capability."""
    found = report.fingerprint.by_behaviour
    live = set(zip(report.features["site"], report.features["feature"], strict=True))
    parts = {
        name: sum((str(row.site), row.feature) in live for row in found.get(name, ()))
        for name in report.cpfr
        if name not in ("safety", "capability")
    }
    safety = len(report.safety_features)
    return {"safety": safety, **parts, "capability": len(report.features) - safety}


def set_title(name: str) -> str:
    """What a reader calls a set of features: a behaviour is a part of the safety features."""
    return {"safety": "safety features", "capability": "capability features"}.get(name, f"  {name}")


def interval(estimate: Estimate | None) -> str:
    """`0.934 [0.921, 0.945]`; without the interval where there is none, and a dash where there is no number."""
    return _written(estimate, lambda x: f"{x:.3f}")


def percent(rate: Estimate | None) -> str:
    """`1.4 % [0.9, 2.1]`, likewise."""
    if rate is None or isnan(rate.value):
        return NOTHING
    ends = "" if isnan(rate.low) else f" [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    return f"{100 * rate.value:.1f} %{ends}"


def points(rate: Estimate | None) -> str:
    """`1.4 [0.9, 2.1]`, likewise: for a row whose title says %."""
    return _written(rate, lambda x: f"{100 * x:.1f}")


def thousandths(estimate: Estimate | None) -> str:
    """`1.3 [1.2, 1.4]` for 0.0013, likewise: for a row whose title says 10⁻³. Less than 0.01 of them, but for 0, is `< 0.01`."""
    size = 1000 * abs(estimate.value) if estimate else 0.0
    if 0 < size < 0.01:
        return "< 0.01"
    places = 1 - floor(log10(size)) if size and isfinite(size) else 0
    return _written(estimate, lambda x: f"{1000 * x:,.{min(2, max(0, places))}f}")


def significant(estimate: Estimate | None) -> str:
    """`4.512 [4.431, 4.601]`, `1,234 [1,101, 1,398]`, likewise: four digits, for numbers of any size."""
    return _written(
        estimate, lambda x: f"{x:,.{min(3, max(0, 3 - floor(log10(abs(x)))))}f}" if x and abs(x) < 1e9 else f"{x:.3g}"
    )


def _written(estimate: Estimate | None, number: Callable[[float], str]) -> str:
    if estimate is None or isnan(estimate.value):
        return NOTHING
    ends = "" if isnan(estimate.low) or isnan(estimate.high) else f" [{number(estimate.low)}, {number(estimate.high)}]"
    return number(estimate.value) + ends


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Lines with the columns under one another: those in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
