"""Muting thresholds: how many bits each feature needs to go on firing, read from a sweep.

A ladder is made of precisions of one family, which differ in nothing but the width of their integers, or of named
builds that do. Muting of a
feature depends on how often and how strongly it fires, so safety features are compared with random capability features
of the same site and firing rate too, and with matched noise where its moments are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tracelens.audit_report import AuditReport
from tracelens.auditing.assembly import CAPABILITY
from tracelens.auditing.random_sets import matched_members, mean_of_members
from tracelens.auditing.verdict import two_sided_rank
from tracelens.errors import UnknownNameError
from tracelens.metrics.moments import FeatureMoments
from tracelens.metrics.muting import MUTED_AT, muting_rate
from tracelens.metrics.muting_thresholds import threshold_brackets
from tracelens.optimization_auditor import SweepResult
from tracelens.precision import QuantizationConfig
from tracelens.stats import Estimate, percentile_interval, wilson, wilson_low
from tracelens.studies.ladders import ladder
from tracelens.studies.storage import read_result, restored, table_to_dict, write_result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracelens.views.widgets.muting import MutingExplorer

KIND = "tracelens_muting_thresholds"
RATE = "rate "
"""Before a precision's name, the column that holds the muting rates in it."""


@dataclass(frozen=True)
class ThresholdComparison:
    """Whether safety features fall silent at more bits than capability features.

    Features of one circuit go together, so the p values, which take each for itself, are lower than they should be.
    """

    n_safety: int
    n_capability: int
    earlier: float
    """P(a safety feature's threshold is higher than a capability feature's), ties counting half; .5 is no difference."""
    p_value: float
    """Mann–Whitney U, two-sided, with ties; NaN if a side has no feature."""
    p_matched: float
    """Two-sided rank of the safety features' mean step of the ladder among random capability features of the same
    sites and firing rates; 1 if there are none."""


@dataclass(frozen=True, eq=False)
class MutingThresholds:
    """Muting of every live feature on a ladder of precisions.

    Attributes:
        table: one row per live feature, safety features first, then those that fall silent at most bits: site, feature,
            behaviour, n_active, `kept_at` (fewest bits at which it still fires), `muted_below` (the next fewer bits tried,
            where it is muted), censored ("" or which end of the ladder was not enough: "never muted", "always muted"),
            monotone, and the muting rate in each precision ("rate int4").
        shares: one row per precision and set of features ("safety", "capability", "random" capability features that match
            the safety ones, and with a noise control "safety, noise" and "capability, noise"): features, share that is
            muted with its interval (Wilson; for random sets the range of 95 % of them).
        comparison: safety against capability thresholds.
        precisions: the ladder, most bits first.
        muted_at, min_active: a feature is live if the reference fires it on at least `min_active` tokens, and muted if at
            least `muted_at` of these are silent.
    """

    table: "pd.DataFrame"
    shares: "pd.DataFrame"
    comparison: ThresholdComparison
    precisions: tuple[str, ...]
    muted_at: float
    min_active: int

    def dead_at(self, precision: str | QuantizationConfig) -> "pd.DataFrame":
        """Features that are muted in one precision of the ladder, safety features first, worst first.

        Raises `UnknownNameError` for a precision that is not on the ladder.
        """
        known = isinstance(precision, str) and precision in self.precisions
        spec = str(precision) if known else str(QuantizationConfig.parse(precision))
        if spec not in self.precisions:
            raise UnknownNameError.of("precision of this ladder", spec, self.precisions)
        columns = ["site", "feature", "behaviour", "n_active", RATE + spec]
        table: Any = self.table[columns]
        return _dead(table.rename(columns={RATE + spec: "muting_rate"}), self.muted_at)

    def to_dataframe(self) -> "pd.DataFrame":
        """The table of features."""
        return self.table

    def plot(self) -> "go.Figure":
        """The share of muted features against bits, safety and capability, beside the controls."""
        from tracelens.views.muting_figures import thresholds_figure

        return thresholds_figure(self)

    def explore(self) -> "MutingExplorer":
        """A widget to look around in: a slider of bits that silences features as it moves, and the curve of each."""
        from tracelens.views.widgets.muting import MutingExplorer

        return MutingExplorer(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "table": table_to_dict(self.table),
            "shares": table_to_dict(self.shares),
            "comparison": vars(self.comparison),
            "precisions": list(self.precisions),
            "muted_at": self.muted_at,
            "min_active": self.min_active,
        }

    def save(self, path: str | Path) -> Path:
        """Writes one JSON file, which `load` reads back."""
        return write_result(path, KIND, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "MutingThresholds":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        data: dict[str, Any] = restored(read_result(path, KIND), "table", "shares")
        numbers: dict[str, Any] = {
            name: float("nan") if value is None else value for name, value in data["comparison"].items()
        }
        ends: dict[str, Any] = {"comparison": ThresholdComparison(**numbers), "precisions": tuple(data["precisions"])}
        return cls(**data | ends)


def muting_thresholds(
    sweep: SweepResult,
    configs: Sequence[str | QuantizationConfig] | None = None,
    *,
    noise: Mapping[str, FeatureMoments] | None = None,
    muted_at: float = MUTED_AT,
    min_active: int | None = None,
    seed: int = 0,
) -> MutingThresholds:
    """Muting thresholds in bits from a sweep's moments.

    Args:
        configs: the precisions of the ladder; by default those of the one family of which the sweep has several. The
            names of builds, to which the same was done at several widths, make a ladder too.
        noise: precision → moments of the reference against matched noise, as `noise_moments` measures them.
        min_active: by default that of the sweep.

    Raises `MetricInputError` if the precisions are not a ladder, `UnknownNameError` for one that is not in the sweep.
    """
    specs = ladder(sweep, configs)
    bits = {spec: sweep.bits[spec] for spec in specs}
    reports = [sweep[spec] for spec in specs]
    report = reports[0]
    least: int = report.settings["min_active"] if min_active is None else min_active
    keys = _features(report)
    n_ref = report.moments.total().n_ref[0].cpu()
    live = n_ref >= max(1, least)
    rates = torch.stack([muting_rate(r.moments.total())[0].cpu() for r in reports])
    brackets = threshold_brackets(rates, list(bits.values()), muted_at)
    safety = torch.tensor([behaviour != CAPABILITY for *_, behaviour in keys])
    population = (n_ref, _site_codes(report), live & safety, live & ~safety)
    return MutingThresholds(
        table=_table(keys, n_ref, live, rates, brackets, specs),
        shares=_shares(rates >= muted_at, bits, population, noise, muted_at, seed),
        comparison=_comparison((rates >= muted_at).sum(0), population, seed),
        precisions=tuple(specs),
        muted_at=muted_at,
        min_active=least,
    )


def dead_features(report: AuditReport, muted_at: float = MUTED_AT) -> "pd.DataFrame":
    """Live features that are muted in one audit, safety features first, worst first: a list to hand on."""
    return _dead(report.features[["site", "feature", "behaviour", "n_active", "muting_rate"]], muted_at)


def _dead(table: Any, muted_at: float) -> "pd.DataFrame":
    dead = table[table["muting_rate"] >= muted_at]
    low = wilson_low(dead["muting_rate"].to_numpy(float), dead["n_active"].to_numpy(float))
    order = np.lexsort((-low, (dead["behaviour"] == CAPABILITY).to_numpy()))
    return dead.iloc[order].reset_index(drop=True)


def _features(report: AuditReport) -> list[tuple[str, int, str]]:
    """(site, feature, behaviour) of every feature, in the order of the moments."""
    behaviours = {(str(row.site), row.feature): row.behaviour for row in report.fingerprint.features}
    return [
        (site, i, behaviours.get((site, i), CAPABILITY)) for site, size in report.sites.items() for i in range(size)
    ]


def _site_codes(report: AuditReport) -> Tensor:
    sizes = torch.tensor(list(report.sites.values()))
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def _table(keys: list, n_ref: Tensor, live: Tensor, rates: Tensor, brackets: Any, specs: list[str]) -> "pd.DataFrame":
    import pandas as pd

    chosen = live.nonzero().squeeze(1).tolist()
    table = pd.DataFrame([keys[k] for k in chosen], columns=pd.Index(["site", "feature", "behaviour"]))
    table["n_active"] = n_ref[live].long().numpy()
    for name in ("kept_at", "muted_below", "monotone"):
        table[name] = getattr(brackets, name)[live].numpy()
    ends = [table["muted_below"].isna(), table["kept_at"].isna()]
    table["censored"] = np.select(ends, ["never muted", "always muted"], default="")
    for spec, row in zip(specs, rates, strict=True):
        table[RATE + spec] = row[live].numpy()
    capability, silent = table["behaviour"] == CAPABILITY, table["kept_at"].fillna(np.inf)
    mean_rate = table[[RATE + spec for spec in specs]].mean(axis=1)
    return table.iloc[np.lexsort((-mean_rate, -silent, capability))].reset_index(drop=True)


def _shares(
    muted: Tensor,
    bits: Mapping[str, float],
    population: tuple,
    noise: Mapping[str, FeatureMoments] | None,
    muted_at: float,
    seed: int,
) -> "pd.DataFrame":
    import pandas as pd

    n_ref, site, safety, capability = population
    masks = {"safety": safety, CAPABILITY: capability}
    random = matched_members(n_ref, site, safety, capability, seed=seed)
    rows = []

    def add(spec: str, name: str, n: int, share: Estimate) -> None:
        rows.append((spec, bits[spec], name, n, share.value, share.low, share.high))

    for spec, silent in zip(bits, muted, strict=True):
        for name, mask in masks.items():
            add(spec, name, int(mask.sum()), wilson(int(silent[mask].sum()), int(mask.sum())))
        if random.numel():
            means = mean_of_members(silent.double(), random)
            add(spec, "random", int(safety.sum()), percentile_interval(means.mean().item(), means))
        if noise is not None:
            quiet = muting_rate(noise[spec].total())[0].cpu() >= muted_at
            for name, mask in masks.items():
                add(spec, f"{name}, noise", int(mask.sum()), wilson(int(quiet[mask].sum()), int(mask.sum())))
    columns = ["precision", "bits", "set", "n", "share", "low", "high"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def _comparison(steps: Tensor, population: tuple, seed: int) -> ThresholdComparison:
    """`steps`: precisions of the ladder in which each feature is muted, an order even where thresholds are censored."""
    from scipy.stats import mannwhitneyu

    *_, safety, capability = population
    first, second = steps[safety].numpy(), steps[capability].numpy()
    earlier = p_value = float("nan")
    if len(first) and len(second):
        test = mannwhitneyu(first, second, alternative="two-sided", method="asymptotic")
        earlier = float(test.statistic) / (len(first) * len(second))
        # Where all are equal there is nothing to rank, and scipy's p is not a number.
        p_value = 1.0 if np.isnan(test.pvalue) else float(test.pvalue)
    null = mean_of_members(steps.double(), matched_members(*population, with_own=True, seed=seed))
    p_matched = two_sided_rank(float(first.mean()), null) if len(first) else 1.0
    return ThresholdComparison(len(first), len(second), earlier, p_value, p_matched)
