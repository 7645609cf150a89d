"""`MutedTable`: muting of each feature in each precision, as arrays."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from tracelens.auditing.tables import CAPABILITY
from tracelens.errors import MetricInputError, PrecisionSpecError, UnknownNameError

if TYPE_CHECKING:
    from tracelens.studies.muting import MutingThresholds
    from tracelens.studies.muting_causes import MutingTrace

REFERENCE_BITS = 16.0
RATE = "rate "
FIRES, CAPABILITY_FIRES, MUTED, MOVED, CLIPPED = range(5)
"""States of a feature: indices into `muting_figures.STATES`."""


class MutedTable:
    """Columns of `MutingThresholds.table`, in its order: safety features first, then those that fall silent at most bits.

    Attributes:
        precisions, bits: of the ladder, most bits first.
        rates: [precision, feature], in [0, 1].
        state: [precision + 1, feature]; row 0 is the reference, in which every live feature fires.
        cause: precision → feature's share of muted firings that moved and that were clipped (`n_moved`, `n_clipped`); only where known.
        unmatched: labels of causes whose precision is not on the ladder.
    """

    def __init__(self, thresholds: "MutingThresholds", causes: "Sequence[MutingTrace]" = ()) -> None:
        table: Any = thresholds.table
        self.precisions = thresholds.precisions
        known = dict(zip(thresholds.shares["precision"], thresholds.shares["bits"], strict=True))
        self.bits = [float(known[name]) for name in self.precisions]
        self.muted_at = thresholds.muted_at
        n = len(table)
        self.site, self.behaviour, self.censored = (
            _column(table, name, object) for name in ("site", "behaviour", "censored")
        )
        self.feature, self.n_active = (_column(table, name, np.int64) for name in ("feature", "n_active"))
        self.kept_at, self.muted_below = (_column(table, name, float) for name in ("kept_at", "muted_below"))
        self.monotone = _column(table, "monotone", bool)
        self.rates = (
            np.stack([_column(table, RATE + name, float) for name in self.precisions])
            if n
            else np.zeros((len(self.bits), 0))
        )
        self.safety = self.behaviour != CAPABILITY
        base = np.where(self.safety, FIRES, CAPABILITY_FIRES)
        self.state = np.stack([base, *(np.where(rate >= self.muted_at, MUTED, base) for rate in self.rates)])
        self.cause: dict[str, Int[np.ndarray, "feature 2"]] = {}
        self.unmatched: list[str] = []
        self._rows = {(s, f): k for k, (s, f) in enumerate(zip(self.site, self.feature.tolist(), strict=True))}
        for trace in causes:
            self._take(trace)

    def __len__(self) -> int:
        return len(self.site)

    def shown_at(self, bits: float) -> int:
        """Row of `state` for so many bits: the measured precision of fewest bits that has at least as many; 0, the reference, above all."""
        return sum(b >= bits - 1e-9 for b in self.bits) if bits < REFERENCE_BITS else 0

    def row(self, site: str, feature: int) -> int:
        """Raises `UnknownNameError` for a feature that is not live."""
        if (site, feature) not in self._rows:
            raise UnknownNameError(f"#{feature} of {site} is not among the {len(self):,} live features of this ladder")
        return self._rows[site, feature]

    def first(self, rows: Int[np.ndarray, "some"]) -> Int[np.ndarray, "some"]:
        """These features, those first that fall silent at most bits; of those that never do, those with the highest rate anywhere."""
        silent = np.where(self.censored[rows] == "never muted", -1.0, np.nan_to_num(self.kept_at[rows], nan=np.inf))
        return rows[np.lexsort((-self.rates[:, rows].max(axis=0, initial=0), -silent))]

    def interval(self, row: int) -> Float[np.ndarray, "2 precision"]:
        """Wilson intervals of a feature's muting rates, over the tokens on which the reference fires it."""
        from tracelens.stats import wilson

        n = int(self.n_active[row])
        found = [wilson(min(n, max(0, round(rate * n))), n) for rate in np.nan_to_num(self.rates[:, row])]
        return np.array([[e.low for e in found], [e.high for e in found]]).reshape(2, -1)

    def others(self, row: int, most: int = 150) -> Float[np.ndarray, "precision some"]:
        """Rates of other features of its site, at most so many (always the same ones)."""
        there = np.flatnonzero((self.site == self.site[row]) & (np.arange(len(self)) != row))
        if len(there) > most:
            there = np.random.default_rng(0).choice(there, most, replace=False)
        return self.rates[:, there]

    def _take(self, trace: "MutingTrace") -> None:
        if trace.unit != "feature":
            raise MetricInputError(
                f"causes are those of {trace.unit}s; this explorer shows features: studies.feature_muting(...)"
            )
        name = _named(trace.label, self.precisions)
        if name is None:
            self.unmatched.append(trace.label)
            return
        counts, table = np.zeros((len(self), 2), np.int64), trace.table
        for site, unit, moved, clipped in zip(
            *(table[c] for c in ("site", "unit", "n_moved", "n_clipped")), strict=True
        ):
            if (k := self._rows.get((str(site), int(unit)))) is not None:
                counts[k] = int(moved), int(clipped)
        self.cause[name] = counts
        state, known = self.state[self.precisions.index(name) + 1], counts.sum(1) > 0
        state[:] = np.where((state == MUTED) & known, np.where(counts[:, 1] > counts[:, 0], CLIPPED, MOVED), state)


def listed(causes: "MutingTrace | Sequence[MutingTrace] | Mapping[str, MutingTrace] | None") -> "list[MutingTrace]":
    """Causes however they were given; a mapping's keys are the precisions."""
    from dataclasses import replace

    if causes is None:
        return []
    if isinstance(causes, Mapping):
        return [replace(trace, label=name) for name, trace in causes.items()]
    return list(causes) if isinstance(causes, Sequence) else [causes]


def _named(label: str, precisions: Sequence[str]) -> str | None:
    """The precision of the ladder that a label means."""
    from tracelens.precision import QuantizationConfig

    def meant(text: str) -> str:
        try:
            return QuantizationConfig.parse(text).label
        except PrecisionSpecError:
            return text

    return next((name for name in precisions if name == label or meant(name) in (label, meant(label))), None)


def _column(table: Any, name: str, dtype: Any) -> np.ndarray:
    return table[name].to_numpy(dtype=dtype) if name in table else np.zeros(0, dtype)
