"""Which live features are meant: filters, a line of search, a brush, and what the chosen ones are like beside the others."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq, ge, gt, le, lt
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from tracelens.errors import UnknownNameError
from tracelens.views.widgets.drift_table import LiveFeatures

DRAWN_AT_MOST = 20_000
"""Points that a figure holds; beyond, some are left out."""
WORST_KEPT = 2_000
"""Of the features that are drawn when not all are, so many are the worst."""
Damage = Literal["all", "survived", "blurred", "damaged", "degraded", "muted"]

_COMPARE = {"<": lt, "<=": le, ">": gt, ">=": ge, "=": eq}
_CONDITION = re.compile(r"([a-z_]+)\s*(<=|>=|<|>|=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", re.IGNORECASE)
_NUMBER = re.compile(r"#?(\d+)")


@dataclass(frozen=True)
class Choice:
    """What the filters are set to."""

    behaviours: str = "all"
    """"all", "safety", "capability", or "behaviour: " and its name."""
    site: str = ""
    """"" for all."""
    damage: Damage = "all"
    min_tokens: int = 0
    """Tokens on which the reference fires the feature."""
    search: str = ""
    """Numbers of features ("#123, #7"), conditions on axes ("fidelity < .5, muting_rate >= .9"), or both."""

    def mask(self, live: LiveFeatures) -> Bool[np.ndarray, "feature"]:
        """Features that meet all of it. Raises `UnknownNameError` for a search that cannot be read."""
        chosen = (live.n_active >= self.min_tokens) & _behaviours(live, self.behaviours) & _damage(live, self.damage)
        if self.site:
            chosen = chosen & (live.site == self.site)
        return chosen & _search(live, self.search)


def behaviour_options(live: LiveFeatures) -> list[tuple[str, str]]:
    """Labels and values of `Choice.behaviours`."""
    plain = [("all features", "all"), ("safety", "safety"), ("capability", "capability")]
    return plain + [(f"  {name}", f"behaviour: {name}") for name in live.members]


def thinned(live: LiveFeatures, rows: Int[np.ndarray, "some"], limit: int = DRAWN_AT_MOST) -> Int[np.ndarray, "fewer"]:
    """At most `limit` of the rows, in order: all safety features, the worst, and others at random (always the same ones)."""
    if len(rows) <= limit:
        return rows
    first = np.union1d(rows[live.safety[rows]][:limit], rows[:WORST_KEPT])[:limit]
    others = np.setdiff1d(rows, first, assume_unique=True)
    drawn = np.random.default_rng(0).choice(others, limit - len(first), replace=False)
    return np.sort(np.concatenate([first, drawn]))


def comparison(live: LiveFeatures, chosen: Bool[np.ndarray, "feature"], how: str) -> str:
    """The chosen features in a sentence beside the others: how many, mean fidelity and its spread, the control, how many are muted.

    The spread is over features (5th to 95th percentile), no confidence interval: the same prompts measured them all.
    """
    n, total = int(chosen.sum()), len(live)
    if not n:
        return f"None of the {total:,} live features is {how}."
    if (live.values["fidelity"] == 1).all():
        some = "" if n == total else f"; {n:,} of them {how}"
        return f"Nothing changed: each of the {total:,} live features is the same in both models{some}."
    if n == total:
        return f"All {total:,} live features: {_described(live, chosen)}."
    rest = f"The other {total - n:,}: {_described(live, ~chosen)}."
    return f"{n:,} of {total:,} live features {how}: {_described(live, chosen)}. {rest}"


def _described(live: LiveFeatures, chosen: Bool[np.ndarray, "feature"]) -> str:
    fidelity, noise = (live.values[name][chosen] for name in ("fidelity", "fidelity_noise"))
    fidelity, noise = fidelity[np.isfinite(fidelity)], noise[np.isfinite(noise)]
    parts = []
    if len(fidelity):
        low, high = np.percentile(fidelity, [5, 95])
        control = f", {noise.mean():.3f} under noise" if len(noise) else ""
        parts.append(f"mean fidelity {fidelity.mean():.3f} (5–95 % of them: {low:.2f} to {high:.2f}){control}")
    muted = int(live.muted[chosen].sum())
    return ", ".join([*parts, f"{muted:,} muted ({muted / int(chosen.sum()):.1%})"])


def _behaviours(live: LiveFeatures, which: str) -> Bool[np.ndarray, "feature"]:
    if which in ("all", "safety", "capability"):
        return {"all": np.ones(len(live), bool), "safety": live.safety, "capability": ~live.safety}[which]
    name = which.removeprefix("behaviour: ")
    if name not in live.members:
        raise UnknownNameError.of("behaviour", name, live.members)
    return live.members[name]


def _damage(live: LiveFeatures, which: Damage) -> Bool[np.ndarray, "feature"]:
    if which == "all":
        return np.ones(len(live), bool)
    return {"degraded": live.degraded, "muted": live.muted}.get(which, live.survival == which)


def _search(live: LiveFeatures, text: str) -> Bool[np.ndarray, "feature"]:
    chosen = np.ones(len(live), bool)
    for name, sign, number in _CONDITION.findall(text):
        chosen &= _COMPARE[sign](_column(live, name.lower()), float(number))
    left = _CONDITION.sub(" ", text)
    numbers = [int(number) for number in _NUMBER.findall(left)]
    if strange := _NUMBER.sub(" ", left).replace(",", " ").split():
        raise UnknownNameError(
            f"cannot search for {strange[0]!r}; give numbers of features (#123, #7), conditions (fidelity < 0.5, n_active > 100), or both"
        )
    return chosen & np.isin(live.feature, numbers) if numbers else chosen


def _column(live: LiveFeatures, name: str) -> np.ndarray:
    columns: dict[str, np.ndarray] = {**live.values, "n_active": live.n_active}
    if name not in columns:
        raise UnknownNameError.of("column", name, columns)
    return columns[name]


def listed(live: LiveFeatures, rows: Sequence[int]) -> list[tuple[str, int]]:
    """Labels and rows for a list of features; as text, which no front end reads tags in."""
    from tracelens.views.escaping import visible

    return [
        (
            f"#{live.feature[k]} · {visible(str(live.behaviour[k]), 30)} · {short(live.site[k])} · φ {live.values['fidelity'][k]:.2f} · "
            f"{live.kind[k]}",
            k,
        )
        for k in rows
    ]


def short(site: str) -> str:
    """`blocks.3.hook_resid_post` as `3 resid_post`."""
    parts = site.split(".", 2)
    return f"{parts[1]} {parts[2].removeprefix('hook_')}" if len(parts) == 3 and parts[0] == "blocks" else site
