"""Do two treatments damage the same features? Overlap of damaged sets, against chance (arXiv 2606.03002)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.audit_report import AuditReport
from tracelens.errors import MetricInputError
from tracelens.metrics.overlap import SetOverlap, set_overlap, spearman, stratified_overlap
from tracelens.output import encode
from tracelens.stats import Estimate, wilson
from tracelens.studies.comparable import check_same_reference

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class DamageOverlap:
    """How far two audits of one reference agree about which features are damaged, and how much.

    Attributes:
        label_a, label_b: of the two treatments.
        damaged_at: correlation ρ below which a feature counts as damaged.
        sets: the two damaged sets, against random sets of their sizes.
        matched: the same, against random sets that hold as many features of each site and firing rate as the damaged sets do: what
            is left is agreement beyond "both hit the rare ones".
        jaccard: of the two sets, with Wilson's interval over the features in either.
        spearman: of the damage 1 − ρ over all live features, bootstrapped over features.
        table: a row per live feature: site, feature, behaviour, n_active, damage_a, damage_b.
    """

    label_a: str
    label_b: str
    damaged_at: float
    sets: SetOverlap
    matched: SetOverlap
    jaccard: Estimate
    spearman: Estimate
    table: "pd.DataFrame"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the table, as JSON can hold it."""
        return {name: encode(getattr(self, name)) for name in self.__dataclass_fields__ if name != "table"}

    def to_dataframe(self) -> "pd.DataFrame":
        """One row: sizes, Jaccard, what chance gives, Spearman."""
        return overlap_table([self])

    def plot(self) -> "go.Figure":
        """The damage of one against that of the other, feature by feature."""
        from tracelens.views.survival_figures import overlap_figure

        return overlap_figure(self)


def damage_overlap(
    a: AuditReport,
    b: AuditReport,
    *,
    damaged_at: float | None = None,
    rate_bins: int = 8,
    n_permutations: int = 2000,
    n_resamples: int = 1000,
    seed: int = 0,
) -> DamageOverlap:
    """Overlap of the features that two precisions, or a precision and pruning, damage.

    Args:
        a, b: audits of one reference through the same SAEs on the same prompts.
        damaged_at: by default that of the first audit.
        rate_bins: groups of equal size by firing rate, within each site, for `matched`.

    Raises `PairMismatchError` for audits of different references, SAEs or prompts, `MetricInputError` without live features.
    """
    check_same_reference([a, b])
    damaged_at = float(a.settings["damaged_at"] if damaged_at is None else damaged_at)
    where = ["site", "feature"]
    kept = [report.features[[*where, "correlation"]].dropna() for report in (a, b)]
    table = a.features[[*where, "behaviour", "n_active"]].merge(kept[0], on=where).merge(kept[1], on=where)
    table = table.sort_values(where).reset_index(drop=True)
    if table.empty:
        raise MetricInputError("no feature is live in both audits; use more prompts or a lower min_active")
    rho = [table.pop(f"correlation_{side}").to_numpy(np.float64) for side in ("x", "y")]
    set_a, set_b = (values < damaged_at for values in rho)
    damage = [1 - values for values in rho]
    strata = _strata(table["site"].to_numpy(str), table["n_active"].to_numpy(), rate_bins)
    sets = set_overlap(set_a, set_b)
    strata = _strata(table["site"].to_numpy(str), table["n_active"].to_numpy(), rate_bins)
    return DamageOverlap(
        label_a=a.label,
        label_b=b.label,
        damaged_at=damaged_at,
        sets=sets,
        matched=stratified_overlap(set_a, set_b, strata, n_permutations=n_permutations, seed=seed),
        jaccard=wilson(sets.n_both, sets.n_a + sets.n_b - sets.n_both),
        spearman=spearman(damage[0], damage[1], n_resamples=n_resamples, seed=seed),
        table=table.assign(damage_a=damage[0], damage_b=damage[1]),
    )


def overlap_table(overlaps: "list[DamageOverlap]") -> "pd.DataFrame":
    """One row per overlap: the two treatments, sizes of the sets, Jaccard with interval, chance, Spearman with interval."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "a": o.label_a,
                "b": o.label_b,
                "n": o.sets.n,
                "damaged_a": o.sets.n_a,
                "damaged_b": o.sets.n_b,
                "both": o.sets.n_both,
                "jaccard": o.jaccard.value,
                "jaccard_low": o.jaccard.low,
                "jaccard_high": o.jaccard.high,
                "chance": o.sets.chance,
                "p": o.sets.p,
                "chance_matched": o.matched.chance,
                "p_matched": o.matched.p,
                "spearman": o.spearman.value,
                "spearman_low": o.spearman.low,
                "spearman_high": o.spearman.high,
            }
            for o in overlaps
        ]
    )


def _strata(site: np.ndarray, n_ref: np.ndarray, bins: int) -> np.ndarray:
    """Groups of features of one site and similar firing rate, as integers."""
    strata = np.zeros(len(site), dtype=np.int64)
    for number, name in enumerate(np.unique(site)):
        here = site == name
        rank = n_ref[here].argsort(kind="stable").argsort(kind="stable")
        strata[here] = number * bins + rank * bins // max(1, int(here.sum()))
    return strata
