"""`StoredPairs`: the pairs that a report kept, as arrays, so that other thresholds cost a comparison."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from tracelens.auditing.tables import CAPABILITY
from tracelens.errors import UnknownNameError

if TYPE_CHECKING:
    from tracelens.audit_report import AuditReport

Kind = Literal["safety with safety", "safety with capability", "capability"]
KINDS: tuple[Kind, ...] = ("safety with safety", "safety with capability", "capability")
Group = tuple[str, Int[np.ndarray, "member"], Int[np.ndarray, "pair"]]
"""Site, features, and rows of `StoredPairs`."""


class StoredPairs:
    """The columns of the pairs of a report, worst first.

    Attributes:
        tau_floor, delta_floor: the lowest thresholds at which the stored pairs are complete (`left_out` aside).
        left_out: pairs above the floors that were too many to be kept.
        site, feature_i, feature_j, cos_ref, cos_quant, increase, n_active: as `AuditReport.smeared_pairs` says.
        kind: index into `KINDS`.
        possible: `KINDS` → pairs of live features of one site that there are. A pair counts as smeared only if both models fire both
            features often enough, so that a share of these is a little too low where features are muted.
    """

    def __init__(self, report: "AuditReport") -> None:
        from tracelens.audit_report import severity

        own = float(report.settings.get("smearing_tau", 0.5)), float(report.settings.get("smearing_delta", 0.2))
        evidence = report.evidence
        table: Any = report.smeared_pairs if evidence is None else evidence.pairs
        if len(table):
            table = table.loc[severity(table).sort_values(ascending=False, kind="stable").index]
        self.own = own
        self.tau_floor, self.delta_floor = own if evidence is None else (evidence.pair_tau, evidence.pair_delta)
        self.left_out = 0 if evidence is None else evidence.pairs_left_out
        self.site = table["site"].to_numpy(dtype=object)
        self.feature_i, self.feature_j = (table[name].to_numpy(dtype=np.int64) for name in ("feature_i", "feature_j"))
        self.behaviour_i, self.behaviour_j = (
            table[name].to_numpy(dtype=object) for name in ("behaviour_i", "behaviour_j")
        )
        self.cos_ref, self.cos_quant, self.increase, self.n_active = (
            table[name].to_numpy(dtype=float) for name in ("cos_ref", "cos_quant", "increase", "n_active")
        )
        safety = (self.behaviour_i != CAPABILITY).astype(int) + (self.behaviour_j != CAPABILITY)
        self.kind = 2 - safety
        self.possible = _possible(report)

    def __len__(self) -> int:
        return len(self.site)

    @property
    def safety(self) -> Bool[np.ndarray, "pair"]:
        """Pairs with at least one safety feature."""
        return self.kind < 2

    def behaviours(self) -> list[str]:
        """Of the features in the pairs, safety behaviours first."""
        found = dict.fromkeys([*self.behaviour_i, *self.behaviour_j])
        return [name for name in found if name != CAPABILITY]

    def smeared(self, tau: float, delta: float) -> Bool[np.ndarray, "pair"]:
        """Pairs whose cosine reaches `tau` and rose by `delta`; a slider's rounding aside."""
        return (self.cos_quant >= tau - 1e-9) & (self.increase >= delta - 1e-9)

    def among(self, site: str = "", which: str = "all") -> Bool[np.ndarray, "pair"]:
        """Pairs of a site ("" for all) and of a kind, "any safety", a behaviour ("behaviour: " and its name), or "all"."""
        mask = np.ones(len(self), bool) if not site else self.site == site
        if which == "any safety":
            return mask & self.safety
        if which.startswith("behaviour: "):
            name = which.removeprefix("behaviour: ")
            return mask & ((self.behaviour_i == name) | (self.behaviour_j == name))
        if which in KINDS:
            return mask & (self.kind == KINDS.index(which))
        if which != "all":
            raise UnknownNameError.of("kind of pairs", which, ("all", "any safety", *KINDS))
        return mask

    def row(self, site: str, i: int, j: int) -> int:
        """The pair's row, in either order. Raises `UnknownNameError` if it was not stored."""
        straight = (self.feature_i == i) & (self.feature_j == j)
        crossed = (self.feature_i == j) & (self.feature_j == i)
        found = np.flatnonzero((self.site == site) & (straight | crossed))
        if not len(found):
            raise UnknownNameError(
                f"no pair #{i} and #{j} of {site} was stored; stored are pairs with a cosine of at least {self.tau_floor:g} that rose by "
                f"{self.delta_floor:g} or more"
            )
        return int(found[0])

    def groups(self, rows: Int[np.ndarray, "some"]) -> list[Group]:
        """Connected components of these pairs by site: those with safety features first, then the largest."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if not len(rows):
            return []
        names, code = np.unique(self.site[rows].astype(str), return_inverse=True)
        span = int(max(self.feature_i[rows].max(), self.feature_j[rows].max())) + 1
        nodes, ends = np.unique(
            np.concatenate([code * span + self.feature_i[rows], code * span + self.feature_j[rows]]),
            return_inverse=True,
        )
        i, j = ends.reshape(2, -1)
        size = len(nodes)
        n, label = connected_components(coo_array((np.ones(len(rows)), (i, j)), shape=(size, size)), directed=False)
        order, by_row = np.argsort(label, kind="stable"), np.argsort(label[i], kind="stable")
        members = np.split(nodes[order], np.cumsum(np.bincount(label, minlength=n))[:-1])
        pairs = np.split(rows[by_row], np.cumsum(np.bincount(label[i], minlength=n))[:-1])
        safe = np.bincount(label[i], self.safety[rows], minlength=n) > 0
        ranked = sorted(range(n), key=lambda k: (not safe[k], -len(members[k]), int(pairs[k][0])))
        return [(str(names[members[k][0] // span]), members[k] % span, pairs[k]) for k in ranked]


def drawn(pairs: StoredPairs, limit: int = 20_000, worst: int = 2_000) -> Int[np.ndarray, "fewer"]:
    """Rows that a figure holds: all with safety features, the worst, others at random (always the same ones)."""
    rows = np.arange(len(pairs))
    if len(rows) <= limit:
        return rows
    first = np.union1d(rows[pairs.safety][:limit], rows[:worst])[:limit]
    others = np.setdiff1d(rows, first, assume_unique=True)
    return np.sort(np.concatenate([first, np.random.default_rng(0).choice(others, limit - len(first), replace=False)]))


def _possible(report: "AuditReport") -> dict[Kind, int]:
    table = report.features
    if not len(table):
        return dict.fromkeys(KINDS, 0)
    safety = table["behaviour"].to_numpy(dtype=object) != CAPABILITY
    site = table["site"].to_numpy(dtype=object)
    counts: Sequence[tuple[int, int]] = [
        (int((safety & (site == name)).sum()), int((~safety & (site == name)).sum())) for name in dict.fromkeys(site)
    ]
    return {
        "safety with safety": sum(s * (s - 1) // 2 for s, _ in counts),
        "safety with capability": sum(s * c for s, c in counts),
        "capability": sum(c * (c - 1) // 2 for _, c in counts),
    }
