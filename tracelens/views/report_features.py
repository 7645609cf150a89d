"""The worst features with their evidence, and the smeared pairs with the tokens on which they merge."""

from math import isfinite
from typing import TYPE_CHECKING, Any

from tracelens.views.report_html import Column, Part, coloured, folded, isolated, number, paragraph, rate_of, table
from tracelens.views.token_html import merged_tokens
from tracelens.views.widgets.card import PROMPTS, feature_card, partners
from tracelens.views.widgets.card_numbers import card_numbers
from tracelens.views.widgets.drift_table import LiveFeatures

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport

ROWS = 25
"""Worst features and smeared pairs that the page lists; the JSON and the saved tables hold all."""
CARDS = {"safety": 10, "all": 6}
"""Worst features of each list whose evidence the page shows."""
PAIRS, MERGED = 10, 6
"""Worst pairs whose merging tokens the page shows, and how many of each."""
NO_EVIDENCE = (
    "This report holds no token-level evidence: it was made without it. Run the audit again with this version of "
    "Tracelens to see on which tokens features move."
)

MEASURES = {
    "fidelity": ("fidelity", "Σrq / max(Σr², Σq²): 1 = unchanged; 95 % bootstrap over prompts"),
    "fidelity_noise": ("fidelity under noise", "of the same feature under matched noise: the control beside it"),
    "correlation": ("correlation", "Pearson, of its activation in both models"),
    "drift": ("drift", "‖r − q‖ / ‖r‖"),
    "retention": ("retention", "Σq / Σr"),
    "muting_rate": ("muting rate", "share of the reference's firings that are gone"),
    "novelty": ("novelty", "share of the quantized model's firings that are new"),
    "q_shift": ("q of its shift", "sign flips over blocks of prompts, adjusted over all live features"),
}
"""Column of the feature table → its title and what it says."""
WITH_INTERVAL = ("fidelity",)
"""Columns that are written with their interval; with those of the others, which cards have, the table is wider than a page."""


def worst(report: "AuditReport") -> Part:
    """Both lists, safety features first: the worst of all are mostly rare capability features, among which a safety feature would
    not be found. Below them the evidence, one card a feature.
    """
    columns = [
        Column("feature"),
        Column("behaviour", text=True),
        Column("site", text=True),
        Column("survival", text=True, tip="by its correlation"),
        *(Column(title, tip=tip) for title, tip in MEASURES.values()),
        Column("tokens", tip="on which the reference fires it"),
    ]
    if len(report.features) and (report.features["fidelity"] == 1).all():
        n = len(report.features)
        same = (
            f"Nothing changed: each of the {n:,} live features is the same in both models, so there are no worst ones."
        )
        return Part("worst", "Worst features, with evidence", paragraph(same))
    shown = _shown(report)
    parts, data = [], {}
    for kind, table_of in (("safety", report.safety_features), ("all", report.features)):
        if not len(table_of):
            continue
        rows = [_row(row, shown) for row in table_of.head(ROWS).itertuples()]
        name = "safety features" if kind == "safety" else "features"
        caption = f"Worst {len(rows)} of {len(table_of)} {name}"
        parts.append(table(caption, columns, rows, tools=True))
    if not parts:
        parts.append(
            paragraph("The reference fires no feature on enough tokens to be looked at: there are no live features.")
        )
    elif report.evidence is None:
        parts.append(paragraph(NO_EVIDENCE, "soft"))
    elif shown:
        parts.append("<h3>Evidence, token by token</h3>")
        parts.append(
            paragraph(
                "Statistics beside their control, and the prompts on which the feature moves most (Σ over tokens of |r − q|): its "
                "activation in the reference above, in the quantized model below.",
                "soft",
            )
        )
        live = LiveFeatures(report)
        parts += [_folded_card(report, live, *key) for key in shown]
        data["cards"] = [_card_data(report, live, *key) for key in shown]
    return Part("worst", "Worst features, with evidence", "\n".join(parts), data)


def _shown(report: "AuditReport") -> dict[tuple[str, int], Any]:
    """Feature → its row in the table, of those whose evidence is shown."""
    if report.evidence is None:
        return {}
    rows = [
        row
        for table_of, n in ((report.safety_features, CARDS["safety"]), (report.features, CARDS["all"]))
        for row in table_of.head(n).itertuples()
    ]
    found = {(str(row.site), int(row.feature)): row for row in rows}
    return {key: row for key, row in found.items() if key in report.evidence}


def _row(row: Any, shown: dict[tuple[str, int], Any]) -> list[Any]:
    key = (str(row.site), int(row.feature))
    name = f"#{row.feature}"
    return [
        f'<a href="#{_anchor(*key)}">{name}</a>' if key in shown else name,
        coloured(str(row.behaviour)),
        isolated(str(row.site)),
        isolated(str(row.survival)),
        *(_measure(row, column) for column in MEASURES),
        row.n_active,
    ]


def _measure(row: Any, column: str) -> str:
    """`0.614 [0.520, 0.701]`, without brackets where there is no interval."""
    written = number(getattr(row, column), least=column == "q_shift")
    ends = [getattr(row, f"{column}_{end}", float("nan")) for end in ("low", "high")]
    if column not in WITH_INTERVAL or not all(map(isfinite, ends)):
        return written
    return f"{written} <small>[{number(ends[0])}, {number(ends[1])}]</small>"


def _anchor(site: str, feature: int) -> str:
    safe = "".join(c if c.isascii() and c.isalnum() else "-" for c in site)
    return f"feature-{safe}-{feature}"


def _folded_card(report: "AuditReport", live: LiveFeatures, site: str, feature: int) -> str:
    row = live.index[site, feature]
    of = {name: number(float(live.values[name][row])) for name in ("fidelity", "fidelity_noise", "muting_rate")}
    summary = (
        f"#{feature} {coloured(str(live.behaviour[row]))}, {isolated(site)}: fidelity {of['fidelity']} "
        f"(under noise {of['fidelity_noise']}), muting rate {of['muting_rate']}"
    )
    return folded(summary, feature_card(report, site, feature, live=live), anchor=_anchor(site, feature), kind="card")


def _card_data(report: "AuditReport", live: LiveFeatures, site: str, feature: int) -> dict[str, Any]:
    """The numbers of a card: values, intervals, the site's medians, and the evidence."""
    evidence, key = report.evidence, (site, feature)
    assert evidence is not None
    numbers = card_numbers(report, live, site, feature)
    rates = {
        "muting_rate": (numbers.values["muting_rate"], numbers.n_active),
        "novelty": (numbers.values["novelty"], numbers.n_quant),
        "rate_reference": (numbers.n_active / max(1, numbers.tokens), numbers.tokens),
        "rate_quantized": (numbers.n_quant / max(1, numbers.tokens), numbers.tokens),
    }
    return {
        "site": site,
        "feature": feature,
        "statistics": numbers,
        "intervals": {name: rate_of(share, n) for name, (share, n) in rates.items()} | numbers.intervals,
        "site_medians": {name: live.median(site, name) for name in live.values},
        "traces": evidence.traces(site, feature, PROMPTS),
        "promoted": evidence.promoted.get(key, ()),
        "suppressed": evidence.suppressed.get(key, ()),
        "near": evidence.near.get(key, ()),
        "merges_with": partners(report, site, feature),
    }


def smeared(report: "AuditReport") -> Part:
    """The pairs, and the tokens on which they were told apart and no longer are."""
    pairs: Any = report.smeared_pairs
    rows = [
        [
            f"#{row.feature_i} and #{row.feature_j}",
            f"{coloured(str(row.behaviour_i))}, {coloured(str(row.behaviour_j))}",
            isolated(str(row.site)),
            *(number(value, 2) for value in (row.cos_ref, row.cos_quant, row.increase)),
            row.n_active,
        ]
        for row in pairs.head(ROWS).itertuples()
    ]
    columns = [
        Column("features"),
        Column("behaviours", text=True),
        Column("site", text=True),
        Column("cosine, reference"),
        Column("cosine, quantized"),
        Column("rise"),
        Column("tokens", tip="on which the reference fires the rarer of the two"),
    ]
    noise = report.controls.get("noise")
    beside = "" if noise is None or noise.smeared is None else f" One draw of matched noise smears {noise.smeared}."
    tau, delta = (report.settings.get(f"smearing_{name}") for name in ("tau", "delta"))
    said = f"{len(pairs)} pairs are smeared: their cosine rises by at least {delta}, to at least {tau}.{beside}"
    parts = [paragraph(said)]
    if rows:
        parts.append(table(f"Smeared pairs: worst {len(rows)} of {len(pairs)}", columns, rows, tools=True))
    merged = _merged(report)
    for row, found in merged:
        names = (f"#{row.feature_i}", f"#{row.feature_j}")
        summary = (
            f"{names[0]} and {names[1]}, {isolated(str(row.site))}: cosine {row.cos_ref:.2f} → {row.cos_quant:.2f}; "
            f"merging on {len(found)} tokens shown"
        )
        parts.append(folded(summary, merged_tokens(found, names), kind="card"))
    if rows and report.evidence is None:
        parts.append(paragraph(NO_EVIDENCE, "soft"))
    data = {
        "n": len(pairs),
        "merged": [
            {"site": str(row.site), "feature_i": int(row.feature_i), "feature_j": int(row.feature_j), "tokens": found}
            for row, found in merged
        ],
    }
    return Part("smearing", "Smeared pairs", "\n".join(parts), data)


def _merged(report: "AuditReport") -> list[tuple[Any, list[Any]]]:
    """Of the worst pairs those that merge on a kept prompt, with the tokens."""
    if report.evidence is None:
        return []
    found = [
        (row, report.evidence.merged(str(row.site), int(row.feature_i), int(row.feature_j), MERGED))
        for row in report.smeared_pairs.head(PAIRS).itertuples()
    ]
    return [(row, tokens) for row, tokens in found if tokens]
