"""How an audit was measured: versions, hashes, settings, prompts, the code that runs it again; and what the words mean."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from html import escape
from typing import TYPE_CHECKING, Any

from tracelens.audit_settings import AuditSettings
from tracelens.views.escaping import in_html
from tracelens.views.report_definitions import DEFINITIONS
from tracelens.views.report_html import Column, Part, folded, isolated, number, paragraph, table

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport

PROMPTS = 400
"""Prompts that the page lists; the JSON and the saved tables hold all."""
FREE = ("progress", "batch_size", "padding_side", "memory")
"""Settings on which the numbers do not depend."""


def measured(report: "AuditReport") -> Part:
    """Everything needed to trust the numbers, and to make them again."""
    settings = dict(report.settings)
    versions, hashes = settings.pop("versions", {}), settings.pop("hashes", {})
    saes, shared = settings.pop("saes", {}), settings.pop("shared", {})
    for name in ("tracelens", "torch"):
        if name in settings:
            versions = {name: settings.pop(name), **versions}
    if "saes" not in hashes:
        hashes = {**hashes, "saes": {str(site): digest for site, digest in report.fingerprint.saes.items()}}
    found = report.fingerprint
    plain = {
        "reference": report.reference,
        "quantized": report.quantized,
        "precision": report.precision or "as loaded",
        "safety features found on": ", ".join(f"{n} {name}" for name, n in found.n_prompts.items())
        + f" and {found.n_baseline} baseline prompts",
        **settings,
    }
    parts = [
        _settings_table("Models, data and settings", plain),
        _settings_table("Versions", versions),
        _settings_table("SHA-256 of weights and SAEs", hashes),
    ]
    if not report.settings.get("hashes"):
        parts.append(paragraph("This report does not say the hashes of the models' weights.", "soft"))
    more = _settings_table("What both models share", shared) + _settings_table("SAEs", saes)
    if more:
        parts.append(folded("What both models share, and the SAEs", more, kind="appendix"))
    parts += ["<h3>Run it again</h3>", paragraph(_where(report)), f"<pre><code>{escape(code(report))}</code></pre>"]
    parts.append(_prompts(report))
    data = {"versions": versions, "hashes": hashes, "code": code(report)}
    return Part("measured", "How it was measured", "\n".join(parts), data)


def code(report: "AuditReport") -> str:
    """Python that makes the audit again, with every setting that is not the default and on which numbers depend."""
    changed = {
        f.name: report.settings[f.name]
        for f in fields(AuditSettings)
        if f.name in report.settings and f.name not in FREE and report.settings[f.name] != f.default
    }
    options = "".join(f", {name}={value!r}" for name, value in changed.items())
    same = report.quantized == report.reference
    models = [repr(report.reference), *([] if same else [f"quant_model={report.quantized!r}"])]
    if report.precision is not None:
        models.append(f"precision={report.precision!r}")
    return "\n".join(
        [
            "import tracelens as tl",
            "",
            f"audit = tl.Audit({', '.join(models)})",
            'audit.load_sae("...")  # the SAEs of the hashes above',
            f"report = audit.trace_features({report.settings.get('dataset')!r}{options})",
            "report.save('audit')",
        ]
    )


def _where(report: "AuditReport") -> str:
    return (
        "Names are those that the report knows: give folders where models were loaded from folders, and the prompts where they were "
        f"not a built-in set. Seed {report.settings.get('seed', 'not said')}."
    )


def _prompts(report: "AuditReport") -> str:
    rows = [
        [
            isolated(str(row.prompt)),
            isolated(str(row.behaviour)),
            "safety" if row.safety else "baseline",
            number(row.margin_reference, 2, sign=True),
            number(row.margin_quantized, 2, sign=True),
        ]
        for row in report.prompts.head(PROMPTS).itertuples()
    ]
    columns = [
        Column("prompt", wraps=True),
        Column("behaviour", text=True),
        Column("set", text=True),
        Column("margin, reference (nats)"),
        Column("margin, quantized (nats)"),
    ]
    caption = f"Prompts: {len(rows)} of {len(report.prompts)}"
    said = f"All {len(rows)} prompts" if len(rows) == len(report.prompts) else caption
    return folded(said, table(caption, columns, rows, tools=True), kind="appendix") if rows else ""


def _settings_table(caption: str, values: Mapping[str, Any]) -> str:
    rows = [[isolated(key), f'<span class="value">{isolated(str(value))}</span>'] for key, value in _leaves(values)]
    columns = [Column("what", text=True), Column("value", text=True, wraps=True)]
    return table(caption, columns, rows) if rows else ""


def _leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as one list: names joined by ": "."""
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}: ")
        else:
            yield name, "none" if value is None else value


def definitions(report: "AuditReport") -> Part:
    """What the words mean, with this report's thresholds."""
    said = {term: text.format_map(report.settings) for term, text in DEFINITIONS.items()}
    entries = "".join(f"<dt>{in_html(term)}</dt><dd>{in_html(text)}</dd>\n" for term, text in said.items())
    return Part("definitions", "What the words mean", f"<dl>\n{entries}</dl>", said)
