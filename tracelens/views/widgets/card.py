"""`feature_card`: all that is known of one feature, as HTML for a widget and for a page."""

from html import escape
from importlib.resources import files
from math import isfinite
from typing import TYPE_CHECKING, Any

from tracelens.auditing.tables import CAPABILITY
from tracelens.errors import UnknownNameError
from tracelens.views.escaping import in_html
from tracelens.views.style import CAPABILITY as CAPABILITY_COLOUR
from tracelens.views.style import SAFETY
from tracelens.views.widgets.card_numbers import CardNumbers, card_numbers, statistics_table, written
from tracelens.views.widgets.drift_table import LiveFeatures

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport

PROMPTS, PARTNERS = 3, 6
"""Prompts and smeared partners that a card shows."""


def feature_card(report: "AuditReport", site: str, feature: int, *, live: LiveFeatures | None = None) -> str:
    """One feature as an `<article>`: what it tells, its statistics beside their controls, where it moves, what it resembles.

    All text from outside is escaped. The page needs `card_style()` once. A feature that is not live has the statistics that its
    sums give, and a sentence that says so.

    Args:
        live: the report's `LiveFeatures`, if they are at hand.

    Raises `UnknownNameError` for a site or a feature that the report does not have.
    """
    if site not in report.sites:
        raise UnknownNameError.of("site of this report", site, report.sites)
    if not 0 <= feature < report.sites[site]:
        raise UnknownNameError(
            f"unknown feature #{feature} of {site}; its SAE has {report.sites[site]:,} (0 to {report.sites[site] - 1:,})"
        )
    live = live or LiveFeatures(report)
    numbers = card_numbers(report, live, site, feature)
    parts = [
        _head(numbers, site, feature),
        _what_happened(report, live, numbers, site),
        _behaviours(report, site, feature),
        statistics_table(report, live, numbers, site),
        _evidence(report, site, feature),
        _partners(report, site, feature),
    ]
    return f'<article class="tl-card" aria-label="feature {feature} of {in_html(site)}">{"".join(parts)}</article>'


def card_style() -> str:
    """A `<style>` element for cards and the tokens in them; once on a page is enough."""
    from tracelens.views.token_html import css

    rules = files("tracelens.views.widgets").joinpath("card.css").read_text(encoding="utf-8")
    colours = f".tl-card {{ --tl-safety: var(--safety, {SAFETY}); --tl-capability: var(--capability, {CAPABILITY_COLOUR}); }}\n"
    return f"<style>{colours}{rules}</style>{css()}"


def partners(report: "AuditReport", site: str, feature: int) -> "list[tuple[int, float, float, bool]]":
    """Features whose cosine with this one rises most: (feature, cosine in the reference, in the quantized model, whether they count as
    smeared), those first; of the pairs that were kept at lower thresholds where there is evidence."""
    found: dict[int, tuple[float, float, bool]] = {}
    kept = [(report.smeared_pairs, True)] + ([(report.evidence.pairs, False)] if report.evidence else [])
    for table, smeared in kept:
        i, j = table["feature_i"].to_numpy(), table["feature_j"].to_numpy()
        rows: Any = table[(table["site"].to_numpy() == site) & ((i == feature) | (j == feature))]
        for row in rows.to_dict(orient="records"):
            other = int(row["feature_j"] if row["feature_i"] == feature else row["feature_i"])
            found.setdefault(other, (float(row["cos_ref"]), float(row["cos_quant"]), smeared))
    ordered = sorted(found.items(), key=lambda pair: (not pair[1][2], pair[1][0] - pair[1][1]))
    return [(other, *cosines) for other, cosines in ordered[:PARTNERS]]


def _head(numbers: CardNumbers, site: str, feature: int) -> str:
    kind = "capability" if numbers.behaviour == CAPABILITY else "safety"
    name = f'<span class="tl-{kind}" dir="auto">{in_html(numbers.behaviour)}</span>'
    return f'<h3>#{feature} {name} <span class="tl-soft">at</span> <bdi>{in_html(site)}</bdi></h3>'


def _what_happened(report: "AuditReport", live: LiveFeatures, numbers: CardNumbers, site: str) -> str:
    if numbers.row is None:
        least = report.settings.get("min_active", "?")
        return (
            f"<p>Not live: the reference fires it on {numbers.n_active:,} tokens, fewer than the {in_html(least)} from which a feature is "
            "judged. It has no rank, control or test.</p>"
        )
    row = numbers.row
    if live.values["fidelity"][row] == 1:
        return f"<p><b>unchanged</b> in {in_html(report.label)}: the same on every token.</p>"
    kinds = [live.survival[row] or "constant in the reference"]
    kinds += ["degraded"] * bool(live.degraded[row]) + ["muted"] * bool(live.muted[row])
    place = f"{live.rank[row]:,} of {live.site_sizes[site]:,} live features of its site, the worst first"
    return (
        f"<p><b>{in_html(', '.join(kinds))}</b> in {in_html(report.label)}. Rank {place} "
        f'(<span title="{escape(SEVERITY)}">severity {written(live.values["severity"][row])}</span>).</p>'
    )


SEVERITY = (
    "What is lost (1 − fidelity), less what could be chance: the lower end of its 95 % Wilson interval over the tokens on which the "
    "reference fires the feature."
)


def _behaviours(report: "AuditReport", site: str, feature: int) -> str:
    found = [f for f in report.fingerprint.features if (str(f.site), f.feature) == (site, feature)]
    if not found:
        return '<p class="tl-soft">In no fingerprint: it tells none of the behaviours from the baseline prompts.</p>'
    best = found[0]
    p = "< 0.001" if best.p_value < 0.001 else f"{best.p_value:.3f}"
    others = [f"{name} {area:.3f}" for name, area in best.behaviours.items() if name != best.behaviour]
    also = f"; also {in_html(', '.join(others))}" if others else ""
    return (
        f'<p>Tells <b dir="auto">{in_html(best.behaviour)}</b> prompts from baseline prompts: AUROC {best.auroc:.3f} on prompts held out '
        f'from the search, <span title="Permutation p on the held-out prompts, adjusted for all candidates and behaviours.">p '
        f"{escape(p)}</span>{also}. It fires on {best.rate_safety:.0%} of those prompts, on {best.rate_baseline:.0%} of the baseline.</p>"
    )


def _evidence(report: "AuditReport", site: str, feature: int) -> str:
    e = report.evidence
    if e is None:
        return (
            '<p class="tl-soft">No tokens: this report was made without evidence on single tokens. Audit again with evidence_prompts= '
            "above 0 to see where the feature fires, what it resembles and what it promotes.</p>"
        )
    if (site, feature) not in e:
        return (
            f'<p class="tl-soft">No tokens: {len(e.features):,} of the {e.n_live:,} live features are described, and this is none of them. '
            "Audit again with a larger evidence_features= to see where it fires, what it resembles and what it promotes.</p>"
        )
    return _tokens(report, site, feature) + _neighbours(report, site, feature) + _promoted(report, site, feature)


def _tokens(report: "AuditReport", site: str, feature: int) -> str:
    from tracelens.views.token_html import paired_strips

    e: Any = report.evidence
    found = e.traces(site, feature, PROMPTS)
    which = "all" if len(e.prompts) == e.n_prompts else f"{len(e.prompts):,} of {e.n_prompts:,}"
    if not found:
        return f"<h4>Where it moves most</h4><p>Nowhere: on {which} prompts that were kept it is the same in both models.</p>"
    strips = []
    for trace in found:
        row = report.prompts.iloc[trace.prompt]
        margins = (float(row["margin_reference"]), float(row["margin_quantized"]))
        kind = "safety" if row["safety"] else "baseline"
        flip = f"flips: {row['flip']}" if row["flip"] else "no flip"
        text = f"prompt {trace.prompt}, {row['behaviour']} ({kind}), {flip}"
        strips.append(paired_strips(trace, text=text, margins=margins if all(map(isfinite, margins)) else None))
    return f"<h4>Where it moves most <span class='tl-soft'>(of {which} prompts)</span></h4>" + "".join(strips)


def _neighbours(report: "AuditReport", site: str, feature: int) -> str:
    e: Any = report.evidence
    near = e.near.get((site, feature), ())
    if not near:
        return ""
    listed = ", ".join(f"#{other}&nbsp;({cosine:+.2f})" for other, cosine in near)
    about = "Cosine of the decoder directions at the same site: what the features write, not when they fire."
    return f'<h4 title="{about}">Nearest by decoder <span class="tl-soft">(cosine)</span></h4><p>{listed}</p>'


def _promoted(report: "AuditReport", site: str, feature: int) -> str:
    from tracelens.views.token_html import token_list

    e: Any = report.evidence
    about = "Logit weights: how much one unit of activation raises a token's logit over the mean of the vocabulary, by the direct path."
    parts = []
    for title, lists in (("Promotes", e.promoted), ("Suppresses", e.suppressed)):
        if found := lists.get((site, feature)):
            parts.append(
                f'<h4 title="{about}">{title} <span class="tl-soft">(logit per unit)</span></h4>{token_list(found)}'
            )
    return "".join(parts)


def _partners(report: "AuditReport", site: str, feature: int) -> str:
    found = partners(report, site, feature)
    if not found:
        return ""
    lines = "".join(
        f"<li>#{other}: cosine over tokens {before:.2f} → {after:.2f}{'' if smeared else ' (below the audit’s thresholds)'}</li>"
        for other, before, after, smeared in found
    )
    return f"<h4>Merges with</h4><ul>{lines}</ul>"


def neighbour_rows(report: "AuditReport", site: str, feature: int) -> list[tuple[str, int]]:
    """Features to go on to from a card, as a label and the feature: smeared partners, then the nearest by decoder."""
    steps = {other: f"merges with #{other} ({a:.2f} → {b:.2f})" for other, a, b, _ in partners(report, site, feature)}
    for other, cosine in report.evidence.near.get((site, feature), ()) if report.evidence else ():
        steps.setdefault(int(other), f"decoder near #{other} ({cosine:+.2f})")
    return [(label, other) for other, label in steps.items()]
