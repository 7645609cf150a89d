"""What the smearing explorer says in words: the card of a pair, and how many pairs there are."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from tracelens.views import token_html
from tracelens.views.escaping import in_html
from tracelens.views.widgets.smearing_pairs import KINDS, StoredPairs

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport

COSINE = (
    "Σ a_i a_j / √(Σ a_i² Σ a_j²) over the tokens of all prompts, a the two features' activations in one model: 1 if they fire together in "
    "proportion, 0 if never on the same token"
)
NO_EVIDENCE = (
    "Nothing was kept of single tokens, nor pairs below the audit's thresholds: audit again with this version "
    "(trace_features(..., evidence_prompts=512)) to move the thresholds down and to see the tokens."
)


def pair_card(report: "AuditReport", pairs: StoredPairs, row: int, tau: float, delta: float) -> str:
    """HTML of one pair. All text from outside is escaped; the page needs `token_html.css()` once."""
    site, i, j = str(pairs.site[row]), int(pairs.feature_i[row]), int(pairs.feature_j[row])
    b_i, b_j = in_html(pairs.behaviour_i[row]), in_html(pairs.behaviour_j[row])
    rise, after = pairs.increase[row], pairs.cos_quant[row]
    now = "smeared" if pairs.smeared(tau, delta)[row] else "not smeared"
    parts = [
        f"<h3>#{i} <bdi>{b_i}</bdi> with #{j} <bdi>{b_j}</bdi>, {in_html(site)}</h3>",
        f'<p><b title="{in_html(COSINE)}">Cosine {pairs.cos_ref[row]:.3f} → {after:.3f}</b> (+{rise:.3f}), over the tokens of all '
        f"prompts; the reference fires the rarer of the two on {pairs.n_active[row]:,.0f}. At these thresholds {now}. "
        "No interval of a single cosine is stored.</p>",
        f"<p>{in_html(noise_sentence(report))}</p>",
        _decoder(report, site, i, j),
        _tokens(report, site, i, j),
    ]
    return f'<article class="tl-card">{"".join(parts)}</article>'


def noise_sentence(report: "AuditReport") -> str:
    """How many pairs are smeared without anything but noise, at the audit's thresholds."""
    control, own = report.controls.get("noise"), len(report.smeared_pairs)
    at = f"τ = {report.settings.get('smearing_tau', 0.5):g}, δ = {report.settings.get('smearing_delta', 0.2):g}"
    if control is None or control.smeared is None:
        why = report.absent.get("noise", "")
        return (
            "No control: under matched noise pairs were not counted, so how many an error of this size merges anyhow is not known."
            + (f" ({why})" if why else "")
        )
    return (
        f"Control: of the same model under matched noise {control.smeared:,} pairs are smeared at the audit's {at} (one draw, all sites "
        f"and kinds), of {report.label} {own:,}."
    )


def counts_html(pairs: StoredPairs, smeared: Bool[np.ndarray, "pair"], site: str) -> str:
    """Pairs by kind, beside how many there could be."""
    cells = []
    for k, kind in enumerate(KINDS):
        n, there = int((smeared & (pairs.kind == k)).sum()), pairs.possible[kind]
        share = f" ({n / there:.2%})" if there and not site else ""
        cells.append(f"{kind} <b>{n:,}</b>{share}")
    title = "In brackets, of all pairs of live features of one site of this kind. Pairs share features: they are no independent trials."
    return f'<span title="{title}">{"; ".join(cells)}</span>'


def _decoder(report: "AuditReport", site: str, i: int, j: int) -> str:
    evidence = report.evidence
    if evidence is None:
        return f"<p>{NO_EVIDENCE}</p>"
    for a, b in ((i, j), (j, i)):
        for other, cosine in evidence.near.get((site, a), ()):
            if other == b:
                return f"<p>Cosine of their decoder directions: {cosine:+.3f}.</p>"
    known = (site, i) in evidence.near or (site, j) in evidence.near
    return "<p>Their decoder directions are not among each other's nearest.</p>" if known else ""


def _tokens(report: "AuditReport", site: str, i: int, j: int) -> str:
    evidence = report.evidence
    if evidence is None:
        return ""
    parts = []
    if (site, i) in evidence and (site, j) in evidence:
        found = evidence.merged(site, i, j)
        kept = f"{len(evidence.prompts):,} of {evidence.n_prompts:,} prompts"
        head = "Tokens on which the reference fires one of them or neither, and the quantized model both"
        if found:
            shown = token_html.merged_tokens(found, (f"#{i}", f"#{j}"))
            parts.append(f"<h4>{head} (strongest {len(found)}; {kept} were kept)</h4>{shown}")
        else:
            parts.append(
                f"<p>{head}: none on the {kept} that were kept. They merge in strength, or on other prompts.</p>"
            )
    else:
        parts.append(
            "<p>Tokens were kept for the safety features, the worst of the others and the worst pairs; not for both of these.</p>"
        )
    for feature in (i, j):
        if promoted := evidence.promoted.get((site, feature)):
            parts.append(f"<h4>#{feature} promotes (logit weights)</h4>{token_html.token_list(promoted)}")
    return "".join(parts)
