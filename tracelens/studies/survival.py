"""Survival against bits: which share of the features each precision of a sweep preserves, blurs and damages (arXiv 2606.03002)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from tracelens.audit_report import AuditReport
from tracelens.auditing.preservation import Shares
from tracelens.errors import ResultFileError, UnknownNameError
from tracelens.metrics.survival import CLASSES, SurvivalClass, survival_class
from tracelens.optimization_auditor import SweepResult
from tracelens.output import encode, reading, write_atomically
from tracelens.stats import Estimate, wilson

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "tracelens_survival_curve"
VERSION = 1
FeatureSet = Literal["all", "safety", "capability"]
SETS: tuple[FeatureSet, ...] = get_args(FeatureSet)
CONTROLS = ("noise", "permuted", "bf16")
_TEXT = ("precision", "label", "set")
_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class SurvivalCurve:
    """Shares of survived, blurred and damaged features by precision.

    Attributes:
        reference: the reference's name.
        survived_at, damaged_at: a feature has survived if its correlation ρ reaches the first, is damaged below the second, and blurred
            between.
        table: a row per precision and set of features, most bits first: precision, label, bits (per weight, scales included), set, n
            (live features); survived, blurred, damaged, each with _low and _high (Wilson over features), _prompts_low and _prompts_high
            (bootstrap over prompts); the same shares in the controls, noise_survived and so on, each with _low and _high, for noise,
            permuted and bf16; median_rho; perplexity and perplexity_reference with _low and _high (bootstrap over prompts), kl (nats),
            flips. NaN where the audit did not measure it.
    """

    reference: str
    survived_at: float
    damaged_at: float
    table: "pd.DataFrame"

    def of(self, features: FeatureSet) -> "pd.DataFrame":
        """The rows of one set of features; raises `UnknownNameError` for a set that was not asked for."""
        if features not in (known := list(dict.fromkeys(self.table["set"]))):
            raise UnknownNameError.of("set of features", features, known)
        return self.table.loc[self.table["set"] == features].reset_index(drop=True)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per precision and set of features."""
        return self.table.copy()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: NaN as None."""
        rows = self.table.to_dict(orient="records")
        numbers = {name: getattr(self, name) for name in ("reference", "survived_at", "damaged_at")}
        return {KIND: VERSION, **numbers, "table": encode(rows)}

    def plot(self, features: FeatureSet = "all") -> "go.Figure":
        """The three shares against bits, with perplexity below."""
        from tracelens.views.survival_figures import survival_figure

        return survival_figure(self, features)

    def save(self, path: str | Path) -> Path:
        """Writes the curve as one JSON file; `SurvivalCurve.load` reads it back."""
        return write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SurvivalCurve":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        import pandas as pd

        with reading(path, "a survival curve that SurvivalCurve.save wrote"):
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop(KIND) != VERSION:
                raise ResultFileError(f"{path} was written by another version of Tracelens; this one reads {VERSION}")
            table = pd.DataFrame(data.pop("table"))
            numbers = {name: float for name in table.columns if name not in (*_TEXT, "n")}
            return cls(table=table.astype(numbers), **data)


def survival_curve(
    sweep: SweepResult,
    *,
    survived_at: float | None = None,
    damaged_at: float | None = None,
    sets: Sequence[FeatureSet] = SETS,
) -> SurvivalCurve:
    """Survival of the live features at every precision of a sweep.

    Args:
        survived_at, damaged_at: by default those of the audits.
        sets: of features: "all", "safety" (those of the fingerprint), "capability" (the others).

    Controls and bootstrap intervals were made at the audits' thresholds; at others there are none (NaN). Of all features together they are
    the mean of those of safety and capability features by their numbers, ends included, which is wider than needed if anything.
    Raises `MetricInputError` unless damaged_at ≤ survived_at, `UnknownNameError` for a set that does not exist.
    """
    import pandas as pd

    for name in sets:
        if name not in SETS:
            raise UnknownNameError.of("set of features", name, SETS)
    entries = sorted(sweep.bits.items(), key=lambda entry: (np.isnan(entry[1]), -entry[1]))
    first = sweep[entries[0][0]]
    survived_at = float(first.settings["survived_at"] if survived_at is None else survived_at)
    damaged_at = float(first.settings["damaged_at"] if damaged_at is None else damaged_at)
    at = (survived_at, damaged_at)
    rows = [_row(name, bits, sweep[name], features, *at) for name, bits in entries for features in sets]
    return SurvivalCurve(first.reference, survived_at, damaged_at, pd.DataFrame(rows))


def _row(
    name: str, bits: float, report: AuditReport, features: FeatureSet, survived_at: float, damaged_at: float
) -> dict[str, Any]:
    rho = report.features["correlation"].to_numpy(np.float64)[_members(report, features)]
    rho = rho[~np.isnan(rho)]
    classes = survival_class(rho, survived_at, damaged_at)
    row: dict[str, Any] = {"precision": name, "label": report.label, "bits": bits}
    row |= {"set": features, "n": len(rho)}
    for each in CLASSES:
        row |= _columns(each, wilson(int((classes == each).sum()), len(rho)))
    row |= _measured(report, features, survived_at, damaged_at)
    row["median_rho"] = float(np.median(rho)) if len(rho) else _NAN
    row |= _columns("perplexity", report.divergence.perplexity_quantized)
    row |= _columns("perplexity_reference", report.divergence.perplexity_reference)
    return row | {
        "kl": report.divergence.kl.value,
        "flips": report.flips.rate.value if report.flips else _NAN,
    }


def _measured(report: AuditReport, features: FeatureSet, survived_at: float, damaged_at: float) -> dict[str, float]:
    """What the audit itself says of the shares: intervals over prompts, and the shares in the controls."""
    at = (report.settings["survived_at"], report.settings["damaged_at"])
    known = at == (survived_at, damaged_at)
    columns: dict[str, float] = {}
    for name in CLASSES:
        own = _share(report, report.shares if known else {}, features, name)
        columns |= {f"{name}_prompts_low": own.low, f"{name}_prompts_high": own.high}
        for control in CONTROLS:
            there = known and control in report.controls
            shares = report.controls[control].shares if there else {}
            columns |= _columns(f"{control}_{name}", _share(report, shares, features, name))
    return columns


def _share(report: AuditReport, shares: Mapping[str, Shares], features: FeatureSet, name: SurvivalClass) -> Estimate:
    """One share of a set of features; of all, the mean of both kinds by their numbers."""
    kinds: list[FeatureSet] = [kind for kind in SETS if kind != "all" and features in ("all", kind)]
    counts = [int(_members(report, kind).sum()) for kind in kinds]
    found = [(n, shares[kind][name]) for n, kind in zip(counts, kinds, strict=True) if n and kind in shares]
    total = sum(n for n, _ in found)
    if not total or total < sum(counts):
        return Estimate(_NAN, _NAN, _NAN)
    value, low, high = (sum(n * getattr(e, end) for n, e in found) / total for end in ("value", "low", "high"))
    return Estimate(value, low, high)


def _members(report: AuditReport, features: FeatureSet) -> np.ndarray:
    """Mask over the rows of `report.features`."""
    capability = report.features["behaviour"].to_numpy(object) == "capability"
    return {"all": np.ones(len(capability), dtype=bool), "safety": ~capability, "capability": capability}[features]


def _columns(name: str, e: Estimate) -> dict[str, float]:
    return {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
