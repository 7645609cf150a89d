"""`AuditReport`: what an audit found, to be read, plotted, saved and compared."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.auditing.evidence import Evidence
from tracelens.auditing.evidence_storage import read_evidence, summary_of, write_evidence
from tracelens.auditing.preservation import Shares
from tracelens.auditing.verdict import Verdict
from tracelens.behaviour.flips import Flips
from tracelens.features.fingerprint import Fingerprint
from tracelens.metrics.moments import FeatureMoments
from tracelens.metrics.muting import MUTED_AT
from tracelens.metrics.result import Result
from tracelens.output import MARKER, decode, encode, read_marker, reading, staged
from tracelens.stats import Estimate, wilson_low

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.causal.repair.plan_result import RepairPlan
    from tracelens.sweep_result import SweepResult
    from tracelens.views.widgets.shell import Explorer

KIND = "tracelens_audit_report"
VERSION = 2
INTERVALS = ("fidelity", "fidelity_noise", "correlation", "drift", "retention")
"""Columns of the feature table that have a `_low` and a `_high`."""
INTERVAL_COLUMNS = [f"{name}_{end}" for name in INTERVALS for end in ("low", "high")]
"""NaN in reports that were saved without them."""
FEATURE_COLUMNS = [
    *("site", "feature", "behaviour", "fidelity", "correlation", "drift", "retention", "muting_rate"),
    *("novelty", "degraded", "n_active", "survival", "fidelity_noise", "p_shift", "q_shift"),
    *INTERVAL_COLUMNS,
]
PAIR_COLUMNS = [
    *("site", "feature_i", "feature_j", "behaviour_i", "behaviour_j", "cos_ref", "cos_quant", "increase"),
    "n_active",
]
PROMPT_COLUMNS = ["prompt", "behaviour", "safety", "margin_reference", "margin_quantized", "flip"]
_TEXT = ("site", "behaviour", "survival", "behaviour_i", "behaviour_j", "prompt", "flip")
_NUMBERS = {*FEATURE_COLUMNS, *PAIR_COLUMNS, *PROMPT_COLUMNS} - {*_TEXT}


def severity(table: "pd.DataFrame") -> "pd.Series":
    """How bad each row of `features` or `smeared_pairs` is, in [0, 1]: the order in which findings are told.

    The share that is lost (1 − fidelity, or the rise of the cosine), less what could be chance: the lower end of its Wilson interval
    over the tokens on which the reference fires the feature (of a pair, the rarer one). So a feature that is all but gone over
    hundreds of tokens stands before one that is gone from a handful.
    """
    import pandas as pd

    share = table["increase"] if "increase" in table else 1 - table["fidelity"]
    low = wilson_low(share.to_numpy(float).clip(0, 1), table["n_active"].to_numpy(float))
    return pd.Series(low, index=table.index)


@dataclass(frozen=True)
class DivergenceSummary(Result):
    """How far the output distributions are apart, over all tokens of the prompts."""

    kl: Estimate
    """Mean KL(reference ‖ quantized), nats per token."""
    top1_agreement: Estimate
    perplexity_reference: Estimate
    perplexity_quantized: Estimate


@dataclass(frozen=True)
class Control(Result):
    """The same measurements where nothing safety-specific happened. `control["safety"]` is its CPFR.

    Of a random error that was drawn several times: the typical draw, and where one more would be. What a control has none of is None:
    sets of features make no predictions.
    """

    what: str
    cpfr: dict[str, Estimate]
    """By set of features, as in `AuditReport.cpfr`."""
    flips: Estimate | None
    """Share of prompts that flip."""
    refuse_to_comply: Estimate | None = None
    comply_to_refuse: Estimate | None = None
    shares: dict[str, Shares] = field(default_factory=dict)
    """By set of features, as in `AuditReport.shares`."""
    kl: Estimate | None = None
    """Nats per token."""
    top1: Estimate | None = None
    perplexity: Estimate | None = None
    smeared: int | None = None
    """Smeared pairs, of one draw."""

    def __getitem__(self, name: str) -> Any:
        return self.cpfr[name] if name in self.cpfr else super().__getitem__(name)


@dataclass(frozen=True, eq=False)
class AuditReport:
    """The comparison of a quantized model with its reference.

    Attributes:
        label: the quantized model's precision or name, as the findings call it.
        reference, quantized: the models' names.
        precision: the simulated precision, or None for a model that came quantized.
        features: one row per live feature (the reference fires it on at least `settings["min_active"]` tokens), worst first (`severity`):
            site, feature, behaviour (or "capability"), fidelity, correlation, drift, retention, muting_rate, novelty, degraded,
            n_active; survival (survived, blurred or damaged; empty where the reference does not vary); fidelity_noise, the mean over
            the draws of matched noise; p_shift, by sign flips over blocks of prompts, that its activation summed over a block is the
            same on average, and q_shift, that p adjusted over all live features (Benjamini–Hochberg); fidelity_low and fidelity_high,
            and likewise of correlation, drift and retention: 95 % paired bootstrap over blocks of prompts, NaN of a feature that fires
            in fewer than two blocks (`auditing.feature_intervals`); fidelity_noise_low and fidelity_noise_high: the least and the
            largest over the draws, no 95 % interval, NaN with fewer than two draws.
        smeared_pairs: one row per smeared pair, worst first: site, features, their behaviours, cosine in both models and its rise, and
            tokens on which the reference fires the rarer of the two.
        prompts: one row per prompt: text, behaviour, whether it is a safety prompt, both margins in nats, whether it flips
            ("", "refuse→comply" or "comply→refuse"; for other behaviours than refusal read "shows→does not show").
        cpfr: "safety", "capability", and each behaviour → CPFR with its bootstrap interval over prompts.
        flips: decisions that differ, both ways; None if no prompt's decision can be read.
        divergence: KL, top-1 agreement, perplexities.
        controls: "noise" (matched noise), "permuted" (the true error shuffled within rows), "bf16" (the floor), "random" (features of the
            same firing rate) and "labels" (label-permuted fingerprints) → the same numbers there.
        verdict: what may be said.
        fingerprint: the safety features and how they were found.
        sites: site's hook name → number of features of its SAE.
        moments: the sufficient statistics, features of all sites side by side in the order of `sites`.
        settings: everything needed to run it again.
        shares: for the same sets as `cpfr`, the shares of features that survived, are blurred, damaged, degraded and muted.
        absent: control that there is none of → why.
        evidence: what was kept of single tokens, for cards of features and for pairs; None if nothing was.
    """

    label: str
    reference: str
    quantized: str
    precision: str | None
    features: "pd.DataFrame"
    smeared_pairs: "pd.DataFrame"
    prompts: "pd.DataFrame"
    cpfr: dict[str, Estimate]
    flips: Flips | None
    divergence: DivergenceSummary
    controls: dict[str, Control]
    verdict: Verdict
    fingerprint: Fingerprint
    sites: dict[str, int]
    moments: FeatureMoments
    settings: dict[str, Any]
    shares: dict[str, Shares] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    evidence: Evidence | None = None

    @property
    def safety_features(self) -> "pd.DataFrame":
        """The rows of `features` that carry a behaviour."""
        return self.features.query("behaviour != 'capability'")

    @property
    def degraded_features(self) -> "pd.DataFrame":
        """The rows of `features` whose fidelity is below the threshold, worst first."""
        return self.features.query("degraded")

    def findings(self) -> list[str]:
        """One line per degraded feature and smeared pair, worst first."""
        lines: list[tuple[float, str]] = []
        degraded, pairs = self.degraded_features, self.smeared_pairs
        for rank, row in zip(severity(degraded), degraded.to_dict(orient="records"), strict=True):
            lost = 1 - row["fidelity"]
            muted = ", muted" if row["muting_rate"] >= MUTED_AT else ""
            what = f"Feature #{row['feature']} ({row['behaviour']}, {row['site']})"
            lines.append((rank, f"Warning: {what} degraded by {lost:.0%} in {self.label}{muted}"))
        for rank, row in zip(severity(pairs), pairs.to_dict(orient="records"), strict=True):
            carry = f"{row['behaviour_i']} and {row['behaviour_j']}, {row['site']}"
            what = f"Features #{row['feature_i']} and #{row['feature_j']} ({carry})"
            rise = f"cosine {row['cos_ref']:.2f} → {row['cos_quant']:.2f}"
            lines.append((rank, f"Warning: {what} smeared in {self.label}: {rise}"))
        return [line for _, line in sorted(lines, key=lambda pair: -pair[0])]

    def summary(self, top: int = 10) -> str:
        """The audit in plain words: the numbers beside their controls, the `top` worst findings, the verdict."""
        from tracelens.views.text import audit_text

        return audit_text(self, top)

    def plot(self) -> "go.Figure":
        """Reference against quantized, feature by feature, beside the CPFRs with their controls."""
        from tracelens.views.figures import audit_figure

        return audit_figure(self)

    def explore(self, view: str = "features") -> "Explorer":
        """A widget to look around in: `"features"` (every feature, and the card of one) or `"smearing"` (pairs and groups that merge).

        Raises `UnknownNameError` for another view.
        """
        from tracelens.views.exploring import explore_audit

        return explore_audit(self, view)

    def to_html(
        self,
        path: str | Path,
        plan: "RepairPlan | None" = None,
        sweep: "SweepResult | None" = None,
        *,
        json: bool = True,
    ) -> Path:
        """Writes the audit as one self-contained page, which opens without a network, and returns its path.

        `x.html` gets an `x.json` beside it that holds every number on the page (`report.html` a `report-numbers.json`, as a saved
        audit keeps itself in a `report.json`); not with `json=False`.

        Args:
            plan: what to keep in 16 bit, to be told on the page.
            sweep: other precisions of the same model, likewise.
        """
        from tracelens.views.report import write_report

        return write_report(self, Path(path), plan=plan, sweep=sweep, numbers=json)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON can hold it; the tables as lists of rows, of the evidence how much there is."""
        return self._scalars() | {
            name: getattr(self, name).to_dict(orient="records") for name in ("features", "smeared_pairs", "prompts")
        }

    def _scalars(self) -> dict[str, Any]:
        plain = {
            name: getattr(self, name) for name in ("label", "reference", "quantized", "precision", "sites", "settings")
        }
        return plain | {
            "cpfr": {name: estimate.to_dict() for name, estimate in self.cpfr.items()},
            "shares": encode(self.shares),
            "absent": self.absent,
            "flips": encode(self.flips),
            "divergence": encode(self.divergence),
            "controls": {name: encode(control) for name, control in self.controls.items()},
            "verdict": encode(self.verdict),
            "fingerprint": self.fingerprint.to_dict(),
            "evidence": self.evidence and summary_of(self.evidence),
        }

    def save(self, folder: str | Path) -> Path:
        """Writes the report to a folder: JSON, CSV tables and safetensors; `AuditReport.load` reads it back.

        Raises `OutputError` if the folder holds something that is not an audit report.
        """
        from safetensors.torch import save_file

        moments = {f.name: getattr(self.moments, f.name).cpu().contiguous() for f in fields(self.moments)}
        data = {KIND: VERSION} | self._scalars()
        with staged(folder, KIND) as new:
            for name in ("features", "smeared_pairs", "prompts"):
                getattr(self, name).to_csv(new / f"{name}.csv", index=False)
            save_file(moments, new / "moments.safetensors")
            if self.evidence is not None:
                write_evidence(self.evidence, new)
            (new / MARKER).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "AuditReport":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        import pandas as pd
        from safetensors.torch import load_file

        folder = Path(folder)
        with reading(folder, "an audit report that AuditReport.save wrote"):
            data = read_marker(folder, KIND, VERSION)
            tables = {
                # pandas' own parser of numbers is off by a last bit, the one in Python is not.
                name: pd.read_csv(
                    folder / f"{name}.csv",
                    engine="python",
                    dtype=dict.fromkeys(_TEXT, str),
                    keep_default_na=False,
                    na_values={column: [""] for column in _NUMBERS},
                )
                for name in ("features", "smeared_pairs", "prompts")
            }
            missing = [name for name in INTERVAL_COLUMNS if name not in tables["features"]]
            tables["features"] = tables["features"].assign(**dict.fromkeys(missing, float("nan")))
            return cls(
                **tables,
                **{name: data[name] for name in ("label", "reference", "quantized", "precision", "sites", "settings")},
                cpfr={name: Estimate.from_dict(value) for name, value in data["cpfr"].items()},
                shares=decode(dict[str, Shares], data["shares"]),
                absent=data["absent"],
                flips=decode(Flips | None, data["flips"]),
                divergence=decode(DivergenceSummary, data["divergence"]),
                controls={name: decode(Control, value) for name, value in data["controls"].items()},
                verdict=decode(Verdict, data["verdict"]),
                fingerprint=Fingerprint.from_dict(data["fingerprint"]),
                moments=FeatureMoments(**load_file(folder / "moments.safetensors")),
                # Files may lie there of a report that had evidence; the marker says whether this one has.
                evidence=read_evidence(folder) if data.get("evidence") else None,
            )
