"""The statistics of one feature, with their intervals and controls, as the table of its card.

Fidelity, correlation, drift and retention have the report's bootstrap over prompts. Rates have Wilson's interval, which takes tokens for
independent draws; tokens of one prompt are not, so it is the least uncertainty there is. So is the interval of the correlation
(`survival_interval`) where the report has no bootstrap, as of a feature that is not live.
"""

from dataclasses import dataclass
from html import escape
from math import isfinite, isnan
from typing import TYPE_CHECKING, Literal

import numpy as np

from tracelens.auditing.tables import CAPABILITY
from tracelens.metrics.cpfr import fidelity
from tracelens.metrics.drift import correlation, drift, novelty, retention
from tracelens.metrics.muting import muting_rate
from tracelens.metrics.survival import survival_interval
from tracelens.stats import wilson
from tracelens.views.numbers import NOTHING
from tracelens.views.widgets.drift_table import AXES, AxisName, LiveFeatures, starts_of

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport

MEASURES = {
    "fidelity": fidelity,
    "correlation": correlation,
    "drift": drift,
    "retention": retention,
    "muting_rate": muting_rate,
    "novelty": novelty,
}
OVER_PROMPTS = "95 %, paired bootstrap over blocks of prompts."
LEAST = "95 %. The least uncertainty there is: tokens are taken for independent draws."
NO_INTERVAL = "None: there is one of live features that fire in two blocks of prompts or more, in audits that kept them, and none of means."
OVER_DRAWS = "Mean, and in brackets the least and the largest, over the draws of matched noise: what random errors of the same size do."


@dataclass(frozen=True)
class CardNumbers:
    """Of one feature; `row` is its place among the live features, None if it is not live."""

    row: int | None
    behaviour: str
    values: dict[str, float]
    """As the columns of `AuditReport.features`; NaN where there is none."""
    n_active: int
    n_quant: int
    tokens: int
    mean: tuple[float, float]
    """Mean activation over all tokens in the reference and in the quantized model."""
    intervals: dict[str, tuple[float, float]]
    """Of `AuditReport.features`, without those that are none; of the correlation there is always one if there is a correlation."""
    correlation_over: Literal["prompts", "tokens"]
    """What the interval of the correlation is over: its bootstrap, or `survival_interval`."""


def card_numbers(report: "AuditReport", live: LiveFeatures, site: str, feature: int) -> CardNumbers:
    """The table's numbers for a live feature; for another those that follow from its sums."""
    m = report.moments.select([starts_of(report)[site] + feature]).total()
    tokens = int(m.n[0])
    n_ref, n_quant = int(m.n_ref[0, 0]), int(m.n_quant[0, 0])
    mean = (float(m.sum_ref[0, 0]) / max(1, tokens), float(m.sum_quant[0, 0]) / max(1, tokens))
    row = live.index.get((site, feature))
    if row is None:
        behaviour, ends = CAPABILITY, {}
        values = {name: float(measure(m)[0, 0]) for name, measure in MEASURES.items()}
    else:
        behaviour, n_ref = str(live.behaviour[row]), int(live.n_active[row])
        values = {name: float(of[row]) for name, of in live.values.items()} | live.tests(row)
        there = [name for name in live.ends if isfinite(values[name])]
        ends = {name: found for name in there if isfinite((found := live.interval(row, name))[0])}
    over: Literal["prompts", "tokens"] = "prompts" if "correlation" in ends else "tokens"
    if over == "tokens" and isfinite(values["correlation"]):
        low, high = survival_interval(np.array([values["correlation"]]), np.array([tokens]))
        ends["correlation"] = float(low[0]), float(high[0])
    return CardNumbers(row, behaviour, values, n_ref, n_quant, tokens, mean, ends, over)


def statistics_table(report: "AuditReport", live: LiveFeatures, numbers: CardNumbers, site: str) -> str:
    """Rows of statistics: value, interval, the same under matched noise, and the median of the site's live features."""
    v = {name: numbers.values.get(name, float("nan")) for name in (*MEASURES, "fidelity_noise", "importance", "share")}
    p, q = numbers.values.get("p_shift", float("nan")), numbers.values.get("q_shift", float("nan"))
    tips: dict[AxisName, str] = {name: AXES[name].definition for name in ("fidelity", "correlation")}
    tips |= {"drift": f"{AXES['drift'].definition} ‖r − q‖ / ‖r‖.", "retention": "Σq / Σr."}
    rows = [
        _row(
            name,
            tip,
            v[name],
            numbers.intervals.get(name),
            _control(v["fidelity_noise"], numbers.intervals.get("fidelity_noise")) if name == "fidelity" else "",
            live.median(site, name),
            over=LEAST if name == "correlation" and numbers.correlation_over == "tokens" else OVER_PROMPTS,
        )
        for name, tip in tips.items()
    ]
    rows += [
        _rate("muting rate", "muting_rate", v["muting_rate"], numbers.n_active, live, site),
        _rate("novelty", "novelty", v["novelty"], numbers.n_quant, live, site),
        _rate(
            "fires, reference", "rate_reference", _share(numbers.n_active, numbers.tokens), numbers.tokens, live, site
        ),
        _rate(
            "fires, quantized", "rate_quantized", _share(numbers.n_quant, numbers.tokens), numbers.tokens, live, site
        ),
    ]
    means: list[tuple[str, AxisName, float]] = [
        ("reference", "mean_reference", numbers.mean[0]),
        ("quantized", "mean_quantized", numbers.mean[1]),
    ]
    rows += [
        _row(f"mean, {model}", AXES[name].definition, value, None, "", live.median(site, name), digits="g")
        for model, name, value in means
    ]
    if isfinite(v["importance"]):
        rows.append(
            _row(
                "importance, nats",
                AXES["importance"].definition,
                v["importance"],
                None,
                "",
                live.median(site, "importance"),
                digits="g",
            )
        )
    head = "".join(
        f'<th scope="col" title="{escape(tip)}">{title}</th>'
        for title, tip in (
            ("", ""),
            ("value", ""),
            ("95 % interval", "Over prompts where there is such a one; each says by hovering what it is over."),
            ("under noise", OVER_DRAWS),
            ("site’s median", "Over the live features of the same site."),
        )
    )
    counts = f"Fires on {numbers.n_active:,} of {numbers.tokens:,} tokens in the reference, on {numbers.n_quant:,} in the quantized model."
    test = (
        f' Its shift: <span title="Sign flips over blocks of prompts, that its summed activation is the same on average; q adjusts p over '
        f'all live features.">p {_p(p)}, q {_p(q)}</span>.'
        if isfinite(p)
        else ""
    )
    over_tokens = "rates and of the correlation" if numbers.correlation_over == "tokens" else "rates"
    caution = (
        f"Intervals are over prompts, those of {over_tokens} over tokens, which gives the least uncertainty there is."
    )
    note = f'<p class="tl-soft">{counts}{test} {caution}</p>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"


def written(value: float, digits: str = "f") -> str:
    """Three digits, or a dash for what is no number."""
    if isnan(value):
        return NOTHING
    return f"{value:.3g}" if digits == "g" else f"{value:.3f}"


def _rate(title: str, name: AxisName, value: float, n: int, live: LiveFeatures, site: str) -> str:
    """A row for a share of `n` tokens, with Wilson's interval."""
    estimate = None if isnan(value) or not n else wilson(min(n, round(value * n)), n)
    ends = (estimate.low, estimate.high) if estimate else None
    return _row(title, AXES[name].definition, value, ends, "", live.median(site, name), over=LEAST)


def _row(
    title: str,
    tip: str,
    value: float,
    ends: tuple[float, float] | None,
    control: str,
    median: float,
    *,
    over: str = "",
    digits: str = "f",
) -> str:
    interval = NOTHING if ends is None else f"[{written(ends[0])}, {written(ends[1])}]"
    about = f' title="{escape(NO_INTERVAL if ends is None else over)}"'
    return (
        f'<tr><th scope="row" title="{escape(tip)}"><span>{title}</span></th><td><b>{written(value, digits)}</b></td><td{about}>{interval}'
        f"</td><td>{control}</td><td>{written(median, digits)}</td></tr>"
    )


def _control(value: float, ends: tuple[float, float] | None) -> str:
    """The mean of the draws, and below it the ends of their range."""
    between = "" if ends is None else f'<br><span class="tl-soft">({written(ends[0])} to {written(ends[1])})</span>'
    return written(value) + between


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _p(value: float) -> str:
    return NOTHING if isnan(value) else "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
