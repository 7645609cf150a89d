"""What changed: safety against capability features and outputs, each beside its controls; flips with their prompts; muted features."""

from typing import TYPE_CHECKING, Any

from tracelens.audit_report import severity
from tracelens.metrics.muting import MUTED_AT
from tracelens.views.figures import audit_figure
from tracelens.views.numbers import (
    CONTROLS,
    absent_lines,
    feature_sets,
    model_heads,
    model_sections,
    percent,
    set_heads,
    set_sections,
)
from tracelens.views.report_figures import figure_html
from tracelens.views.report_html import (
    Column,
    Part,
    coloured,
    isolated,
    number,
    paragraph,
    rate_of,
    sections_table,
    table,
)

if TYPE_CHECKING:
    import pandas as pd

    from tracelens.audit_report import AuditReport

ROWS = 25
"""Rows of the lists on the page; the saved tables and the JSON hold all."""
POINTS = 5000
"""Features in the page's figure: more would not fit into the page."""


def preserved(report: "AuditReport") -> Part:
    """The numbers beside their controls, and the figure of them."""
    title = "What was preserved, what broke"
    models = sections_table(
        "The same measurements in the quantized model and in the models that are controls",
        model_heads(report),
        model_sections(report),
    )
    sets = (
        sections_table("The same measurements on other sets of features", set_heads(report), found)
        if (found := set_sections(report))
        else ""
    )
    missing = "".join(paragraph(line, "soft") for line in absent_lines(report))
    figure = figure_html(audit_figure(report, POINTS), "audit", numbers_in=f"the tables of “{title}”")
    flips = report.flips
    data: dict[str, Any] = {"live_features": feature_sets(report)}
    if flips is not None:
        data["flips"] = {
            "n_comply": flips.n - flips.n_refusing,
            "rate": flips.rate,
            "refuse_to_comply": flips.refuse_to_comply,
            "comply_to_refuse": flips.comply_to_refuse,
        }
    return Part("changed", title, models + sets + missing + figure, data)


def muted(report: "AuditReport") -> Part:
    """The features that fell silent, safety features first."""
    features: Any = report.features
    silent: Any = features[features["muting_rate"] >= MUTED_AT]
    capability = silent["behaviour"] == "capability"
    order = silent.assign(_capability=capability, _rank=-severity(silent) if len(silent) else 0.0)
    silent = order.sort_values(["_capability", "_rank"], kind="stable").drop(columns=["_capability", "_rank"])
    n_safety = int((~capability).sum())
    rates = [rate_of(row.muting_rate, row.n_active) for row in silent.itertuples()]
    rows = [
        [
            f"#{row.feature}",
            coloured(str(row.behaviour)),
            isolated(str(row.site)),
            percent(rate),
            number(row.fidelity),
            row.n_active,
        ]
        for row, rate in zip(silent.head(ROWS).itertuples(), rates, strict=False)
    ]
    columns = [
        Column("feature"),
        Column("behaviour", text=True),
        Column("site", text=True),
        Column("muting rate, %", tip="of the tokens on which the reference fires it"),
        Column("fidelity"),
        Column("tokens", tip="on which the reference fires it"),
    ]
    shown = (
        table(f"Muted features, safety features first: {len(rows)} of {len(silent)}", columns, rows, tools=True)
        if rows
        else paragraph("No live feature is muted.")
    )
    kept = len(report.features) - len(report.safety_features)
    said = (
        f"{n_safety} of {len(report.safety_features)} live safety features and {len(silent) - n_safety} of {kept} capability "
        f"features are muted: silent on at least {MUTED_AT:.0%} of the tokens on which the reference fires them."
    )
    data = {
        "n_safety": n_safety,
        "n_capability": len(silent) - n_safety,
        "features": [
            {"site": str(row.site), "feature": int(row.feature), "muting_rate": rate, "n_active": int(row.n_active)}
            for row, rate in zip(silent.itertuples(), rates, strict=True)
        ],
    }
    return Part("muting", "Muted features", paragraph(said) + _muted_shares(report) + shown, data)


def _muted_shares(report: "AuditReport") -> str:
    """Share of muted features, with its interval, beside every control that has one."""
    named = [
        (report.label, report.shares),
        *((CONTROLS[c], report.controls[c].shares) for c in CONTROLS if c in report.controls),
    ]
    sets = [name for name in ("safety", "capability") if name in report.shares]
    rows = [
        [f"{name} features", *(percent(shares[name].muted) if name in shares else "—" for _, shares in named)]
        for name in sets
    ]
    columns = [Column(""), *(Column(title) for title, _ in named)]
    return table("Share of muted features, beside the same share in each control", columns, rows) if rows else ""


def flipped(report: "AuditReport") -> Part:
    """The prompts that the two models decide differently, largest shift first."""
    if report.flips is None:
        return Part(
            "flips", "Flipped prompts", paragraph("No prompt's decision can be read, so none can be said to flip.")
        )
    prompts = _by_shift(report)
    rows = [
        [
            isolated(str(row.prompt)),
            isolated(str(row.behaviour)),
            "safety" if row.safety else "baseline",
            isolated(str(row.flip)),
            number(row.margin_reference, 2, sign=True),
            number(row.margin_quantized, 2, sign=True),
            number(row.margin_quantized - row.margin_reference, 2, sign=True),
        ]
        for row in prompts.head(ROWS).itertuples()
    ]
    columns = [
        Column("prompt", wraps=True),
        Column("behaviour", text=True),
        Column("set", text=True),
        Column("flip", text=True),
        Column("margin, reference (nats)"),
        Column("margin, quantized (nats)"),
        Column("shift (nats)"),
    ]
    flips = report.flips
    said = (
        f"{len(flips.prompts)} of {flips.n} decisions flip: {percent(flips.rate)}; refuse→comply {percent(flips.refuse_to_comply)} of "
        f"{flips.n_refusing}, comply→refuse {percent(flips.comply_to_refuse)} of {flips.n - flips.n_refusing}."
    )
    if (noise := report.controls.get("noise")) is not None and noise.flips is not None:
        said += f" Matched noise flips {percent(noise.flips)}."
    shift = flips.mean_shift
    said += f" The margins shift by {number(shift.value, 3, sign=True)} [{shift.low:+.3f}, {shift.high:+.3f}] nats on average."
    shown = (
        table(f"Flipped prompts: {len(rows)} of {len(prompts)}, largest shift first", columns, rows, tools=True)
        if rows
        else paragraph("No prompt flips.")
    )
    data = {"shift": [float(x) for x in prompts["margin_quantized"] - prompts["margin_reference"]]}
    return Part("flips", "Flipped prompts", paragraph(said) + shown, data)


def _by_shift(report: "AuditReport") -> "pd.DataFrame":
    prompts: Any = report.prompts
    prompts = prompts[prompts["flip"] != ""]
    shift = (prompts["margin_quantized"] - prompts["margin_reference"]).abs()
    return prompts.loc[shift.sort_values(ascending=False, kind="stable").index]
