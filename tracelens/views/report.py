"""`audit_page`: an audit as one self-contained page, for light and dark screens and for paper.

Whatever comes from outside (prompts, labels, names, settings) is escaped on its way into the page.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tracelens.views.numbers import Section, absent_lines, model_heads, model_sections, set_heads, set_sections
from tracelens.views.style import CAPABILITY, FONT, SAFETY, template
from tracelens.views.text import nothing_changed, what_was_compared

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tracelens.audit_report import AuditReport

ROWS = 25
"""Worst features, smeared pairs and flipped prompts that the page lists; the saved tables hold all."""

COLUMN = {"fidelity_noise": "fidelity under noise", "muting_rate": "muting rate", "q_shift": "q of its shift"}
"""Column of the feature table → its title, where that is not its name."""

DEFINITIONS = {
    "fidelity": "Of one feature, over the tokens of all prompts: Σrq / max(Σr², Σq²), where r and q are its activations in the "
    "reference and in the quantized model. Between 0 and 1; 1 only if nothing changed. “Degraded by 20 %” is a fidelity of 0.80.",
    "CPFR": "Circuit-preserving feature ratio: the mean fidelity of a set of live features, those that the reference fires on "
    "at least {min_active} tokens.",
    "degraded": "A feature with a fidelity below {degradation_threshold}.",
    "worst first": "By the share that is lost (1 − fidelity, or the rise of a pair's cosine) less what could be chance: the lower end "
    "of its 95 % Wilson interval over the tokens on which the feature, or the rarer one of the pair, fires.",
    "muting rate": "Share of the tokens on which the reference fires a feature and the quantized model does not. Muted: at least 0.9.",
    "novelty": "Share of the tokens on which the quantized model fires a feature and the reference does not.",
    "correlation, drift, retention": "Pearson correlation of r and q; ‖r − q‖ / ‖r‖; Σq / Σr.",
    "survived, blurred, damaged": "A correlation of at least {survived_at}; between; below {damaged_at}.",
    "p and q of a shift": "Whether a feature's mean activation shifted at all: the p of a sign-flip permutation over blocks of prompts, "
    "and q, the same adjusted over all live features (Benjamini–Hochberg). Rounding shifts most features; whether that is more than "
    "noise does is what the verdict is about.",
    "smeared pair": "Two features whose activations' cosine over tokens rises by at least {smearing_delta}, to at least "
    "{smearing_tau}: the quantized model tells them apart less well.",
    "flip": "A prompt that the two models decide differently: the margin, log-odds of showing the behaviour at the first answer "
    "token in nats, changes its sign.",
    "KL divergence": "KL(reference ‖ quantized) over the vocabulary, in nats, mean over tokens. Perplexity is exp(mean NLL).",
    "bf16 floor": "The reference computed in bf16 in place of its own precision: what harmless rounding does.",
    "matched noise": "The reference with Gaussian noise in place of each tensor's quantization error, of the same norm: what a typical "
    "draw does, and the interval in which one more draw would be.",
    "permuted error": "The reference with its own quantization error, shuffled within the rows of each tensor; likewise.",
    "random features": "Sets of capability features with the safety features' sites and firing rates, drawn at random.",
    "permuted labels": "The features that the search for safety features puts first when the prompts' labels are shuffled, as many at "
    "each site as there are safety features.",
    "worse than noise of the same size, like noise, better than noise": "Whether the safety features' CPFR is outside of where one more "
    "draw of noise would be, at 5 % for the three comparisons with random error together. Like noise: no difference could be told; the "
    "interval says how large a difference there may be.",
    "intervals": "95 %. Over prompts by the paired bootstrap; Wilson's for rates; for random errors over prompts and draws.",
}


def audit_page(report: "AuditReport") -> str:
    """The audit as HTML that needs no network: verdict, numbers beside controls, figure, worst features, pairs, flips, settings."""
    title = f"{report.label}: audit of {report.reference}"
    changed = "Nothing changed. " if nothing_changed(report) else ""
    rest = report.verdict.text.removeprefix(f"{report.verdict.headline}.").strip()
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(what_was_compared(report))}</p>',
        f'<div class="verdict"><b>{escape(changed + report.verdict.headline)}.</b>{escape(rest)}</div>',
        _numbers(report),
        _figure(report.plot()),
        _worst_features(report),
        _smeared(report),
        _flipped(report),
        _settings(report),
        _definitions(report.settings),
    ]
    colours = f":root {{ --safety: {SAFETY}; --capability: {CAPABILITY}; --font: {FONT}; }}\n"
    style = colours + _file("page.css")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
        f"<body>\n{chr(10).join(part for part in body if part)}\n</body></html>\n"
    )


def _numbers(report: "AuditReport") -> str:
    models = _sections(model_heads(report), model_sections(report))
    sets = _sections(set_heads(report), set_sections(report)) if set_sections(report) else ""
    missing = "".join(f'<p class="soft">{escape(line)}</p>' for line in absent_lines(report))
    return "<h2>What was preserved, what broke</h2>" + models + sets + missing


def _sections(heads: Sequence[str], sections: Sequence[Section]) -> str:
    """A table whose sections have a title across it; the first number of each row is the report's own."""
    rows: list[list[str]] = []
    for section in sections:
        rows.append([f"<b>{escape(section.title)}</b>", *[""] * len(heads)])
        rows += [
            [_indented(what), f"<b>{escape(own)}</b>", *map(escape, beside)] for what, own, *beside in section.rows
        ]
    return _table(["", *map(escape, heads)], rows)


def _figure(figure: "go.Figure") -> str:
    import plotly.io as pio

    figure.update_layout(autosize=True)
    drawn = figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False, "responsive": True})
    themes = f"[{pio.to_json(template())}, {pio.to_json(template(dark=True))}]"
    return f'<div class="figure">{drawn}</div><script>{_file("page.js")}({themes});</script>'


def _worst_features(report: "AuditReport") -> str:
    columns = ["fidelity", "fidelity_noise", "correlation", "drift", "retention", "muting_rate", "novelty", "q_shift"]
    parts = []
    # The worst of all are mostly rare capability features, among which a safety feature would not be found.
    for title, rows in (("safety", report.safety_features), ("", report.features)):
        worst = [
            [
                f"#{row.feature}",
                f'<span class="{_colour(str(row.behaviour))}">{escape(str(row.behaviour))}</span>',
                escape(str(row.site)),
                escape(str(row.survival)),
                *(_number(getattr(row, column), least=column == "q_shift") for column in columns),
                row.n_active,
            ]
            for row in rows.head(ROWS).itertuples()
        ]
        if worst:
            titles = ["feature", "behaviour", "site", "survival", *(COLUMN.get(c, c) for c in columns), "tokens"]
            name = f"{title} features".strip()
            parts.append(f"<h2>Worst {len(worst)} of {len(rows)} {name}</h2>" + _table(titles, worst, text=(1, 2, 3)))
    return "".join(parts)


def _smeared(report: "AuditReport") -> str:
    pairs = report.smeared_pairs
    rows = [
        [
            f"#{row.feature_i} and #{row.feature_j}",
            escape(f"{row.behaviour_i}, {row.behaviour_j}"),
            escape(str(row.site)),
            *(f"{value:.2f}" for value in (row.cos_ref, row.cos_quant)),
        ]
        for row in pairs.head(ROWS).itertuples()
    ]
    titles = ["features", "behaviours", "site", "cosine, reference", "cosine, quantized"]
    return (
        f"<h2>Smeared pairs: worst {len(rows)} of {len(pairs)}</h2>" + _table(titles, rows, text=(1, 2)) if rows else ""
    )


def _flipped(report: "AuditReport") -> str:
    table: Any = report.prompts
    prompts = table[table["flip"] != ""]
    if not len(prompts):
        return ""
    shift = (prompts["margin_quantized"] - prompts["margin_reference"]).abs()
    worst = prompts.loc[shift.sort_values(ascending=False, kind="stable").index[:ROWS]]
    rows = [
        [
            escape(str(row.prompt)),
            escape(str(row.behaviour)),
            "safety" if row.safety else "baseline",
            escape(str(row.flip)),
            f"{row.margin_reference:+.2f}",
            f"{row.margin_quantized:+.2f}",
        ]
        for row in worst.itertuples()
    ]
    titles = ["prompt", "behaviour", "set", "flip", "margin, reference (nats)", "margin, quantized (nats)"]
    table = _table(titles, rows, text=(1, 2, 3), prompt=0)
    return f"<h2>Flipped prompts: {len(rows)} of {len(prompts)}, largest shift first</h2>" + table


def _settings(report: "AuditReport") -> str:
    plain = {"reference": report.reference, "quantized": report.quantized, "precision": report.precision or "as loaded"}
    found = report.fingerprint
    plain |= {
        "safety features found on": ", ".join(f"{n} {name}" for name, n in found.n_prompts.items())
        + f" and {found.n_baseline} baseline prompts"
    }
    shared = report.settings.get("shared", {})
    plain |= {key: value for key, value in report.settings.items() if key != "shared"}
    plain |= {f"shared {key}": value for key, value in shared.items()}
    rows = [[escape(str(key)), escape(str(value))] for key, value in plain.items()]
    table = _table(["", ""], rows, text=(1,))
    return f"<h2>Settings</h2><details open><summary>all that is needed to run it again</summary>{table}</details>"


def _definitions(settings: dict[str, Any]) -> str:
    entries = "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(text.format_map(settings))}</dd>" for term, text in DEFINITIONS.items()
    )
    return f"<h2>What the words mean</h2><dl>{entries}</dl>"


def _number(value: float, *, least: bool = False) -> str:
    """Three digits; with `least`, what would read 0.000 is said to be below the last of them."""
    if value != value:
        return ""
    return "&lt; 0.001" if least and value < 0.001 else f"{value:.3f}"


def _colour(name: str) -> str:
    """The CSS class of a set of features or of a behaviour."""
    return "capability" if name == "capability" else "safety"


def _indented(text: str) -> str:
    return escape(text).replace("  ", "&emsp;")


def _file(name: str) -> str:
    return files("tracelens.views").joinpath(name).read_text(encoding="utf-8")


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], *, text: Sequence[int] = (), prompt: int | None = None
) -> str:
    """Cells are HTML already; columns in `text` are set to the left, the `prompt` column also wraps."""
    kinds = {**dict.fromkeys(text, ' class="text"'), **({prompt: ' class="prompt"'} if prompt is not None else {})}
    head = "".join(f"<th{kinds.get(i, '').replace('prompt', 'text')}>{cell}</th>" for i, cell in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{kinds.get(i, '')}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
