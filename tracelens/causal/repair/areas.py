"""Areas under repair curves: one number an order, and whether it beats random and magnitude."""

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.repair.measures import LEVEL, Measure, columns, estimated, gains, rank_p, tested
from tracelens.stats import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd

    from tracelens.causal.repair.curve_result import RepairCurve

Axis = Literal["components", "bytes"]
CONTROLS = ("random", "magnitude")


def area_gains(curve: "RepairCurve", axis: Axis, measure: Measure) -> Float64[Tensor, "order prompt"]:
    """`gains` under each order's curve over the share restored, from 0 to 1 (trapezoid rule). Zero where nothing costs bytes."""
    if axis == "components":
        x = torch.tensor(curve.counts, dtype=torch.float64)[None] / max(1, len(curve.names))
    else:
        x = curve.spent / curve.bytes.sum().clamp(min=1e-300)
    step = (x[:, 1:] - x[:, :-1])[..., None]
    gained = gains(curve, curve.measured, measure)
    return (step * (gained[:, 1:] + gained[:, :-1]) / 2).sum(1)


def areas_table(curve: "RepairCurve", axis: Axis, measure: Measure) -> "pd.DataFrame":
    """One row a line: its area, and how it compares with the better one of random and magnitude.

    Columns: order; area with its 95 % bootstrap interval over the held-out prompts (.5 if every component brings the same, 1 if the
    first brings all); versus, the better of the two controls; difference from it with interval; p_value (paired sign flips of
    what the prompts add to the difference) and p_adjusted over the orders that are no controls (Benjamini & Hochberg);
    random_as_good, how many of the random orders have no smaller an area; wins.

    An order wins if its difference from the better control is above 0, p_adjusted < .05, and so few of the random orders are as good
    that `rank_p` ≤ .05 (with 20 none, with 39 one, with fewer than 19 nothing wins): better than random on average is not
    enough, since single random orders differ much. p_adjusted speaks of other prompts on this pair of models, not of other
    models. The rank among random orders is not adjusted over orders: of m orders worth no more than random, up to
    m / 20 are expected to pass it.
    """
    import pandas as pd

    each = area_gains(curve, axis, measure)
    names = list(curve.lines)
    lines = torch.stack([each[curve.rows(name)].mean(0) for name in names])
    found = dict(zip(names, estimated(curve, lines).effect, strict=True))
    single = [e.value for e in estimated(curve, each[curve.rows("random")]).effect]
    best = max(CONTROLS, key=lambda name: found[name].value)
    off = lines - lines[names.index(best)]
    differences = estimated(curve, off).effect
    p = tested(curve, off)
    adjusted = torch.full_like(p, torch.nan)
    others = [name not in CONTROLS for name in names]
    if p.isfinite().all():
        adjusted[others] = benjamini_hochberg(p[others])
    records = []
    for i, name in enumerate(names):
        as_good = sum(value >= found[name].value for value in single)
        wins = differences[i].value > 0 and float(adjusted[i]) < LEVEL and rank_p(as_good, len(single)) <= LEVEL
        records.append(
            {"order": name}
            | columns("area", found[name])
            | {"versus": best}
            | columns("difference", differences[i])
            | {"p_value": float(p[i]), "p_adjusted": float(adjusted[i]), "random_as_good": as_good, "wins": bool(wins)}
        )
    return pd.DataFrame(records)
