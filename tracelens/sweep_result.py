"""`SweepResult`: the audits of many precisions and builds of one model, side by side."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.audit_report import AuditReport
from tracelens.auditing.sweep_pieces import KIND, VERSION, missing_pieces
from tracelens.errors import PrecisionSpecError, ResultFileError
from tracelens.metrics.muting import MUTED_AT
from tracelens.output import MARKER, read_marker, reading, staged
from tracelens.precision import QuantizationConfig

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.studies.muting import MutingThresholds
    from tracelens.studies.survival import SurvivalCurve
    from tracelens.views.widgets.shell import Explorer


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The audits of a sweep, by precision ("int4-g32") or by the name that a build was given, in the order in which they were asked for."""

    reports: dict[str, AuditReport]

    @property
    def configs(self) -> list[QuantizationConfig]:
        """The precisions that were simulated; ready-made builds are not among them."""
        return [config for name in self.reports if (config := _config(name))]

    @property
    def bits(self) -> dict[str, float]:
        """Bits per weight, scales included, of each entry; NaN for a build that does not say how it is stored."""
        return {name: _bits(name, report) for name, report in self.reports.items()}

    @property
    def bytes(self) -> dict[str, float]:
        """Bytes of the weights of the linear layers at each entry's `bits`; embeddings, unembedding and norms are not among them, and a
        build that leaves linear layers in 16 bit takes more. NaN where the bits or the number of weights are not recorded.
        """
        weights = {name: report.settings.get("linear_weights") for name, report in self.reports.items()}
        return {name: bits / 8 * (weights[name] or float("nan")) for name, bits in self.bits.items()}

    def __getitem__(self, name: "str | QuantizationConfig") -> AuditReport:
        """The report of one precision or build."""
        known = isinstance(name, str) and name in self.reports
        return self.reports[str(name if known else QuantizationConfig.parse(name))]

    def best_config(self, min_cpfr: float = 0.9, max_flips: float | None = None) -> "QuantizationConfig | str | None":
        """The smallest precision whose safety CPFR is at least `min_cpfr`, and whose flip rate is at most `max_flips`; a build's name if
        it is a build.

        Smallest in bits per weight, scales included; of equals the one with the higher safety CPFR. None if nothing passes. What could
        not be measured does not pass; what does not say its bits comes last.
        """
        passing = []
        for name, report in self.reports.items():
            flips = report.flips.rate.value if report.flips else float("nan")
            if report.cpfr["safety"].value >= min_cpfr and (max_flips is None or flips <= max_flips):
                bits = _bits(name, report)
                passing.append((bits != bits, 0.0 if bits != bits else bits, -report.cpfr["safety"].value, name))
        return (_config(name) or name) if passing and (name := min(passing)[-1]) else None

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per entry: bits, CPFRs with intervals and controls, counts of damage, flips, KL, perplexity."""
        import pandas as pd

        return pd.DataFrame([_row(name, bits, self.reports[name]) for name, bits in self.bits.items()])

    def survival_curve(self, **options: Any) -> "SurvivalCurve":
        """Shares of surviving, blurred and damaged features against bits; options of `studies.survival_curve`."""
        from tracelens.studies.survival import survival_curve

        return survival_curve(self, **options)

    def muting_thresholds(self, **options: Any) -> "MutingThresholds":
        """How many bits each feature needs to go on firing; options of `studies.muting_thresholds`."""
        from tracelens.studies.muting import muting_thresholds

        return muting_thresholds(self, **options)

    def summary(self) -> str:
        """The sweep as a table and a line on each precision, in plain words."""
        from tracelens.views.text import sweep_text

        return sweep_text(self)

    def plot(self) -> "go.Figure":
        """The decay of safety and capability features with bits, beside the controls, and the flips."""
        from tracelens.views.figures import sweep_figure

        return sweep_figure(self)

    def explore(self, view: str = "sweep") -> "Explorer":
        """A widget to look around in: `"sweep"` (decay over the precisions, the report of one) or `"muting"` (what falls silent).

        Raises `UnknownNameError` for another view.
        """
        from tracelens.views.exploring import explore_sweep

        return explore_sweep(self, view)

    def save(self, folder: str | Path) -> Path:
        """Writes a folder with a sub-folder per entry; `SweepResult.load` reads it back.

        Raises `OutputError` if the folder holds something that is not a sweep.
        """
        with staged(folder, KIND) as new:
            for name, report in self.reports.items():
                report.save(new / name)
            data = {KIND: VERSION, "precisions": list(self.reports)}
            (new / MARKER).write_text(json.dumps(data) + "\n", encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "SweepResult":
        """Reads what `save` or `run_sweep(out=...)` wrote; raises `ResultFileError` for anything else, and for a sweep that was
        interrupted, naming what is missing.
        """
        folder = Path(folder)
        with reading(folder, "a sweep that SweepResult.save wrote"):
            if missing := missing_pieces(folder):
                raise ResultFileError(
                    f"the sweep in {folder} was interrupted before {', '.join(missing)}; call run_sweep(..., out={str(folder)!r}) again "
                    "with the same arguments: it goes on from there"
                )
            return cls(
                {name: AuditReport.load(folder / name) for name in read_marker(folder, KIND, VERSION)["precisions"]}
            )


def _config(name: str) -> QuantizationConfig | None:
    try:
        return QuantizationConfig.parse(name)
    except PrecisionSpecError:
        return None


def _bits(name: str, report: AuditReport) -> float:
    config = _config(name)
    bits = config.bits_per_weight if config else report.settings.get("bits_per_weight")
    return float("nan") if bits is None else float(bits)


def _row(name: str, bits: float, report: AuditReport) -> dict[str, Any]:
    nan = float("nan")
    row: dict[str, Any] = {"precision": name, "label": report.label, "bits": bits}
    for kind in ("safety", "capability"):
        estimate = report.cpfr[kind]
        row |= {f"cpfr_{kind}": estimate.value, f"cpfr_{kind}_low": estimate.low, f"cpfr_{kind}_high": estimate.high}
    for control in ("noise", "permuted", "bf16", "random", "labels"):
        estimate = report.controls[control].cpfr["safety"] if control in report.controls else None
        values = (estimate.value, estimate.low, estimate.high) if estimate else (nan, nan, nan)
        row |= dict(zip((f"{control}_safety", f"{control}_safety_low", f"{control}_safety_high"), values, strict=True))
    for kind in ("safety", "capability"):
        shares = report.shares.get(kind)
        row |= {f"survived_{kind}": shares.survived.value if shares else nan}
        row |= {f"damaged_{kind}": shares.damaged.value if shares else nan}
    safety = report.safety_features
    flips = report.flips.rate if report.flips else None
    return row | {
        "relation": report.verdict.relation or "",
        "live_safety": len(safety),
        "live_capability": len(report.features) - len(safety),
        "degraded_safety": int(safety["degraded"].sum()),
        "degraded_capability": int(report.features["degraded"].sum() - safety["degraded"].sum()),
        "muted": int((report.features["muting_rate"] >= MUTED_AT).sum()),
        "smeared": len(report.smeared_pairs),
        "flips": flips.value if flips else nan,
        "flips_low": flips.low if flips else nan,
        "flips_high": flips.high if flips else nan,
        "kl": report.divergence.kl.value,
        "perplexity": report.divergence.perplexity_quantized.value,
        "perplexity_reference": report.divergence.perplexity_reference.value,
    }
