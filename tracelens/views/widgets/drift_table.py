"""`LiveFeatures`: everything the drift explorer can put on an axis or filter by, as arrays over the live features."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from tracelens.audit_report import INTERVALS, severity
from tracelens.auditing.tables import CAPABILITY
from tracelens.errors import UnknownNameError
from tracelens.metrics.muting import MUTED_AT

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport

AxisName = Literal[
    "mean_reference",
    "mean_quantized",
    "strength_reference",
    "strength_quantized",
    "rate_reference",
    "rate_quantized",
    "fidelity",
    "fidelity_noise",
    "correlation",
    "drift",
    "retention",
    "muting_rate",
    "novelty",
    "importance",
    "share",
    "severity",
]
DamageKind = Literal["survived", "blurred", "damaged", "muted", "constant"]


@dataclass(frozen=True)
class Axis:
    """What may stand on an axis of the scatter."""

    title: str
    definition: str
    unit: str = ""
    """Axes with one unit get a diagonal: on it nothing changed."""
    log: bool = False
    """Whether it spans orders of magnitude, and is never negative."""
    bounded: bool = False
    """In [0, 1]."""


_ALL, _FIRING = "of the activation, over all tokens", "over the tokens on which that model fires it"
AXES: dict[AxisName, Axis] = {
    "mean_reference": Axis("mean activation, reference", f"Σr / n: mean {_ALL}.", "mean", log=True),
    "mean_quantized": Axis("mean activation, quantized", f"Σq / n: mean {_ALL}.", "mean", log=True),
    "strength_reference": Axis("strength, reference", f"Σr / #(r > 0): mean {_FIRING}.", "strength", log=True),
    "strength_quantized": Axis("strength, quantized", f"Σq / #(q > 0): mean {_FIRING}.", "strength", log=True),
    "rate_reference": Axis("firing rate, reference (share of tokens)", "#(r > 0) / n.", "rate", log=True),
    "rate_quantized": Axis("firing rate, quantized (share of tokens)", "#(q > 0) / n.", "rate", log=True),
    "fidelity": Axis("fidelity (1 = unchanged)", "Σrq / max(Σr², Σq²).", "fidelity", bounded=True),
    "fidelity_noise": Axis(
        "fidelity under matched noise (control)",
        "The same where Gaussian noise of the error's norm stands in for the error: mean over the draws.",
        "fidelity",
        bounded=True,
    ),
    "correlation": Axis("correlation of r and q", "Pearson's, over all tokens."),
    "drift": Axis("drift ‖r − q‖ / ‖r‖", "Over all tokens."),
    "retention": Axis("retention Σq / Σr (1 = unchanged)", "Share of the total activation that is left."),
    "muting_rate": Axis("muting rate", "Share of the reference's firings that are gone.", "share", bounded=True),
    "novelty": Axis("novelty", "Share of the quantized model's firings that are new.", "share", bounded=True),
    "importance": Axis(
        "importance (nats of margin)",
        "Mean over prompts of the first-order effect on the reference's margin of removing the feature, its sign left out. "
        "Measured of the described features only (all safety features, the worst others, those of smeared pairs): a gap may be of "
        "that choice.",
        log=True,
    ),
    "share": Axis(
        "share of its site's activation energy",
        "Σr² over the Σr² of all features of the site: how much of what the SAE writes it is, if decoder directions are of one "
        "length and overlap little. Not an effect on what the model says.",
        log=True,
    ),
    "severity": Axis(
        "severity", "Lower end of the 95 % Wilson interval of 1 − fidelity over the tokens it fires on.", bounded=True
    ),
}


class LiveFeatures:
    """The live features of a report, worst first (`severity`).

    Attributes:
        site, feature, behaviour, kind, n_active, safety, degraded: one entry per feature.
        values: axis → one number per feature; NaN where there is none. `importance` only where the evidence measured it.
        ends: column → lower and upper ends, of those that have an interval over prompts or, `fidelity_noise`, a range over the draws; NaN
            where there is none.
        members: behaviour → mask of the features that tell it, those found for several behaviours under each.
        rank: place of each feature among the live features of its site, the worst is 1.
        site_sizes: site → live features.
    """

    def __init__(self, report: "AuditReport") -> None:
        bad = severity(report.features).to_numpy(float)
        order = np.argsort(-bad, kind="stable")
        table = report.features.iloc[order]
        self.site: np.ndarray = table["site"].to_numpy(object)
        self.feature: np.ndarray = table["feature"].to_numpy(np.int64)
        self.behaviour: np.ndarray = table["behaviour"].to_numpy(object)
        self.n_active: np.ndarray = table["n_active"].to_numpy(np.int64)
        self.safety: np.ndarray = self.behaviour != CAPABILITY
        self.degraded: np.ndarray = table["degraded"].to_numpy(bool)
        self.survival: np.ndarray = table["survival"].to_numpy(object)
        self.values: dict[AxisName, np.ndarray] = {
            "severity": bad[order],
            **_of_moments(report, self.site, self.feature),
        }
        for name in ("fidelity", "fidelity_noise", "correlation", "drift", "retention", "muting_rate", "novelty"):
            self.values[name] = table[name].to_numpy(np.float64)
        self.muted = self.values["muting_rate"] >= MUTED_AT
        self.kind = np.where(self.muted, "muted", np.where(self.survival == "", "constant", self.survival))
        self.index = {key: row for row, key in enumerate(zip(self.site, self.feature.tolist(), strict=True))}
        self.values["importance"] = self._importance(report)
        self.ends: dict[str, Float[np.ndarray, "2 feature"]] = {
            name: np.stack([_column(table, f"{name}_{end}") for end in ("low", "high")]) for name in INTERVALS
        }
        self._tests = {name: table[name].to_numpy(np.float64) for name in ("p_shift", "q_shift")}
        self._medians: dict[tuple[str, AxisName], float] = {}
        self.members = self._members(report)
        self.rank, self.site_sizes = self._ranks()

    def __len__(self) -> int:
        return len(self.feature)

    def row(self, site: str, feature: int) -> int:
        """Raises `UnknownNameError` for a feature that is not live."""
        if site not in self.site_sizes:
            raise UnknownNameError.of("site with live features", site, self.site_sizes)
        if (site, feature) not in self.index:
            raise UnknownNameError(
                f"feature #{feature} of {site} is not among its {self.site_sizes[site]:,} live features: the reference fires it too "
                "rarely; lower min_active in the audit to have it measured"
            )
        return self.index[site, feature]

    def tests(self, row: int) -> dict[str, float]:
        """p and q of a shift of the feature's mean activation; see `AuditReport.features`."""
        return {name: float(values[row]) for name, values in self._tests.items()}

    def interval(self, row: int, name: str) -> tuple[float, float]:
        """Lower and upper end of one of `ends`."""
        low, high = self.ends[name][:, row]
        return float(low), float(high)

    def median(self, site: str, name: AxisName) -> float:
        """Over the live features of a site that have the number; NaN if none has."""
        if (site, name) not in self._medians:
            values = self.values[name][self.site == site]
            values = values[np.isfinite(values)]
            self._medians[site, name] = float(np.median(values)) if len(values) else float("nan")
        return self._medians[site, name]

    def drawn_at(self, name: AxisName, *, log: bool) -> Float[np.ndarray, "feature"]:
        """Places along an axis. On a logarithmic one, what is 0 stands at `floor`; NaN where there is no number."""
        values = self.values[name]
        if not (log and AXES[name].log):
            return values
        return np.where(values > 0, values, np.where(values == 0, self.floor(name), np.nan))

    def floor(self, name: AxisName) -> float:
        """Where 0 is drawn on a logarithmic axis: at half of the smallest value above it."""
        values = self.values[name]
        above = values[values > 0]
        return float(above.min() / 2) if len(above) else 1.0

    def _importance(self, report: "AuditReport") -> Float[np.ndarray, "feature"]:
        values = np.full(len(self), np.nan)
        for key, value in (report.evidence.importance if report.evidence else {}).items():
            if key in self.index:
                values[self.index[key]] = value
        return values

    def _members(self, report: "AuditReport") -> dict[str, Bool[np.ndarray, "feature"]]:
        names = [*report.fingerprint.n_prompts, *self.behaviour[self.safety]]
        masks = {name: self.behaviour == name for name in dict.fromkeys(names)}
        for found in report.fingerprint.features:
            row = self.index.get((str(found.site), found.feature))
            for name in found.behaviours if row is not None else ():
                if name in masks:
                    masks[name][row] = True
        return masks

    def _ranks(self) -> tuple[Int[np.ndarray, "feature"], dict[str, int]]:
        rank, sizes = np.zeros(len(self), np.int64), {}
        for name in dict.fromkeys(self.site):
            here = np.flatnonzero(self.site == name)
            rank[here] = np.arange(1, len(here) + 1)
            sizes[name] = len(here)
        return rank, sizes


def _column(table: Any, name: str) -> Float[np.ndarray, "feature"]:
    """NaN for a column that the table lacks."""
    return table[name].to_numpy(np.float64) if name in table else np.full(len(table), np.nan)


def _of_moments(report: "AuditReport", site: np.ndarray, feature: np.ndarray) -> dict[Any, np.ndarray]:
    """Means, strengths, rates and shares of the features, from the sums over all tokens."""
    m = report.moments.total()
    starts = starts_of(report)
    column = np.array([starts[name] for name in site], dtype=np.int64) + feature
    names = ("n_ref", "n_quant", "sum_ref", "sum_quant", "sum_ref_sq")
    sums = {name: getattr(m, name)[0].cpu().numpy() for name in names}
    n_ref, n_quant, r, q, energy = (sums[name][column] for name in names)
    tokens = float(m.n[0])
    site_energy = {name: sums["sum_ref_sq"][start : start + report.sites[name]].sum() for name, start in starts.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "mean_reference": r / tokens,
            "mean_quantized": q / tokens,
            "strength_reference": r / n_ref,
            # Silent everywhere is no strength, and belongs on the floor of the axis.
            "strength_quantized": np.where(n_quant > 0, q / n_quant, 0),
            "rate_reference": n_ref / tokens,
            "rate_quantized": n_quant / tokens,
            "share": energy / np.array([site_energy[name] for name in site], dtype=np.float64),
        }


def starts_of(report: "AuditReport") -> dict[str, int]:
    """Site → index of its first feature in `report.moments`."""
    ends = np.cumsum([0, *report.sites.values()])
    return dict(zip(report.sites, ends.tolist(), strict=False))
