"""Between how many bits a feature falls silent, from its muting rate on a ladder of precisions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tracelens.errors import MetricInputError
from tracelens.metrics.muting import MUTED_AT
from tracelens.metrics.result import Result


@dataclass(frozen=True, eq=False)
class ThresholdBrackets(Result):
    """Each feature's muting threshold lies above `muted_below` and at or below `kept_at` bits.

    A threshold that the ladder does not reach is censored: NaN stands at the end that was not seen. Both are NaN where
    the reference never fires.
    """

    bits: tuple[float, ...]
    """The ladder, descending."""
    kept_at: Float64[Tensor, "feature"]
    """Fewest bits at which the feature is not muted, nor at any more; NaN if it is muted at the most bits tried."""
    muted_below: Float64[Tensor, "feature"]
    """The next fewer bits that were tried, where it is muted; NaN if it is muted nowhere."""
    monotone: Bool[Tensor, "feature"]
    """False where a feature that fell silent came back at fewer bits; the bracket is then of the first silence."""
    muted_at: float


def threshold_brackets(
    rates: Float[Tensor, "precision feature"], bits: Sequence[int | float], muted_at: float = MUTED_AT
) -> ThresholdBrackets:
    """Brackets from muting rates in [0, 1] (NaN where the reference never fires) at so many bits, in any order.

    Raises `MetricInputError` unless there is one distinct number of bits for each row.
    """
    if len(bits) != len(rates) or len(set(bits)) < len(bits) or not len(bits):
        raise MetricInputError(
            f"bits are {list(bits)} for {len(rates)} rows of rates; a ladder needs a different number of bits for each"
        )
    order = sorted(range(len(bits)), key=lambda i: -bits[i])
    ladder = torch.tensor([float(bits[i]) for i in order], dtype=torch.float64)
    rates = rates[order].double().cpu()
    fires = ~rates.isnan().any(0)
    muted = rates >= muted_at
    steps = len(ladder)
    first = torch.where(muted.any(0), muted.int().argmax(0), steps)  # of equal maxima the first
    nan = torch.full((1,), torch.nan, dtype=torch.float64)
    return ThresholdBrackets(
        bits=tuple(ladder.tolist()),
        kept_at=torch.cat([nan, ladder])[first].where(fires, torch.nan),
        muted_below=torch.cat([ladder, nan])[first].where(fires, torch.nan),
        monotone=(muted.int().diff(dim=0) >= 0).all(0) if steps > 1 else torch.ones_like(fires),
        muted_at=muted_at,
    )
