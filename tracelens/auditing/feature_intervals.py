"""Where single features' statistics would be on other prompts, and under other draws of noise."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tracelens.metrics.cpfr import fidelity
from tracelens.metrics.drift import correlation, drift, retention
from tracelens.metrics.moments import FeatureMoments

RESAMPLED: dict[str, Callable[[FeatureMoments], Tensor]] = {
    "fidelity": fidelity,
    "correlation": correlation,
    "drift": drift,
    "retention": retention,
}
"""Column of the feature table → what it is; those that have an interval over prompts."""
_TAIL = 0.025
_CHUNK = 256
"""Features resampled at a time: about 25 MB with 1,000 resamples."""


def bootstrap_intervals(
    moments: FeatureMoments, weights: Float[Tensor, "resample block"]
) -> dict[str, Float64[Tensor, "feature"]]:
    """`<column>_low` and `<column>_high` of each of `RESAMPLED`: 95 % percentile bootstrap over blocks of prompts, paired.

    Both models are resampled together, by the same `weights` as the report's other intervals. A resample in which the statistic does
    not exist (the reference never fires the feature) is left out. NaN for a feature that the reference fires in fewer than two blocks:
    its ratio is the same in every resample, which would read as certainty. Firings in a handful of blocks give too narrow an interval
    for the same reason, as every percentile bootstrap of few units does. Each interval is of its feature alone: of many features, some
    lie outside theirs.
    """
    weights = weights.to(moments.n)
    several = (moments.n_ref > 0).sum(0) > 1
    columns = [f"{name}_{end}" for name in RESAMPLED for end in ("low", "high")]
    found = torch.full((len(columns), len(several)), torch.nan, dtype=torch.float64)
    for part in several.nonzero().squeeze(1).split(_CHUNK):
        resampled = _resampled(moments, weights, part)
        found[:, part.cpu()] = torch.cat([percentile_ends(measure(resampled).T) for measure in RESAMPLED.values()])
    return dict(zip(columns, found, strict=True))


def percentile_ends(replicates: Float[Tensor, "row resample"]) -> Float64[Tensor, "2 row"]:
    """The 2.5 % and 97.5 % quantiles of each row, as `stats.percentile_interval` takes them, on the CPU.

    NaN is left out; a row of nothing else gives NaN.
    """
    values = np.sort(replicates.double().cpu().contiguous().numpy(), axis=1)  # NaN last, and faster than torch
    last = (~np.isnan(values)).sum(1) - 1
    ends = []
    for share in (_TAIL, 1 - _TAIL):
        place = share * last.clip(min=0)
        lower = place.astype(np.int64)
        a, b = (
            np.take_along_axis(values, i[:, None], 1)[:, 0] for i in (lower, np.minimum(lower + 1, last.clip(min=0)))
        )
        ends.append(a + (place - lower) * (b - a))
    return torch.from_numpy(np.stack(ends))


def over_draws(noise: list[FeatureMoments], features: Tensor) -> dict[str, Float64[Tensor, "feature"]]:
    """`fidelity_noise`, the mean fidelity over draws of matched noise, and `fidelity_noise_low` and `_high`, the least and the largest.

    The two are what the draws were, and no 95 % interval: one more of them lies below the lowest of k with a chance of 1 in k + 1.
    NaN without noise; the ends also of a single draw.
    """
    ends = ("fidelity_noise", "fidelity_noise_low", "fidelity_noise_high")
    if not noise:
        return {name: torch.full((len(features),), torch.nan, dtype=torch.float64) for name in ends}
    draws = torch.stack([fidelity(draw.select(features).total())[0].cpu() for draw in noise])
    mean, nothing = draws.mean(0), torch.full_like(draws[0], torch.nan)
    spread = (draws.amin(0), draws.amax(0)) if len(noise) > 1 else (nothing, nothing)
    return dict(zip(ends, (mean, *spread), strict=True))


def _resampled(moments: FeatureMoments, weights: Float[Tensor, "resample block"], features: Tensor) -> FeatureMoments:
    """Weighted sums over the blocks, of those that `RESAMPLED` reads; the others are zero, and cost nothing."""
    some = moments.select(features)
    nothing = weights.new_zeros(1, 1).expand(len(weights), len(features))
    names = ("sum_ref", "sum_quant", "sum_ref_sq", "sum_quant_sq", "sum_cross")
    return FeatureMoments(
        n=weights @ some.n,
        **dict.fromkeys(("n_ref", "n_quant", "n_both"), nothing),
        **{name: weights @ getattr(some, name) for name in names},
        max_ref=some.max_ref,
        max_quant=some.max_quant,
    )
