"""What is preserved of sets of features: CPFR, and shares that survived, are blurred, damaged, degraded or muted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tracelens.auditing.replicates import Replicated
from tracelens.metrics.cpfr import cpfr, fidelity, fidelity_of_sums
from tracelens.metrics.drift import correlation
from tracelens.metrics.moments import FeatureMoments
from tracelens.metrics.muting import MUTED_AT, muting_rate
from tracelens.metrics.result import Result
from tracelens.stats import Estimate

SHARE_RESAMPLES = 200
"""Resamples behind the intervals of shares: they take three times the sums of a CPFR, and their ends are told to three digits."""
_CHUNK = 2048
"""Features resampled at once: 2048 × 1000 resamples × 3 sums take 50 MB."""


@dataclass(frozen=True)
class Thresholds:
    """Where the classes of a feature begin; every report prints them."""

    survived_at: float
    damaged_at: float
    degradation_threshold: float
    muted_at: float = MUTED_AT


@dataclass(frozen=True)
class Shares(Result):
    """Shares of a set's live features, each with its bootstrap interval over prompts."""

    survived: Estimate
    """Pearson correlation of at least `survived_at`."""
    blurred: Estimate
    """Between the two thresholds."""
    damaged: Estimate
    """Below `damaged_at`."""
    degraded: Estimate
    """Fidelity below `degradation_threshold`."""
    muted: Estimate
    """Muting rate of at least 0.9."""


SHARES = tuple(field.name for field in fields(Shares))


def classes_of(m: FeatureMoments, at: Thresholds) -> Float64[Tensor, "share block feature"]:
    """Whether each feature belongs to each class of `Shares`, as 0 and 1; NaN where the reference does not fire it.

    Survival also is NaN where the reference does not vary.
    """
    rho, phi, muted = correlation(m), fidelity(m), muting_rate(m)
    rows = [rho >= at.survived_at, (rho >= at.damaged_at) & (rho < at.survived_at), rho < at.damaged_at]
    rows = [row.double().where(~rho.isnan(), torch.nan) for row in rows]
    rows += [
        (phi < at.degradation_threshold).double().where(~phi.isnan(), torch.nan),
        (muted >= at.muted_at).double().where(~muted.isnan(), torch.nan),
    ]
    return torch.stack(rows)


def bootstrap_cpfr(
    moments: FeatureMoments,
    sets: Mapping[str, Bool[Tensor, "feature"]],
    weights: Float[Tensor, "resample block"],
    n_prompts: int,
) -> dict[str, Replicated]:
    """CPFR of each set of features, with one replicate per row of `weights`; NaN for an empty set.

    A feature that a resample never fires is left out there, as it would be in a new sample of prompts.
    """
    members = torch.stack(list(sets.values()), 1)
    total = torch.zeros(len(weights), len(sets), dtype=torch.float64)
    fired = torch.zeros_like(total)
    weights = weights.to(moments.n)
    for part in members.any(1).nonzero().squeeze(1).split(_CHUNK):
        sums = (moments.sum_cross, moments.sum_ref_sq, moments.sum_quant_sq)
        phi = fidelity_of_sums(*(weights @ x[:, part.to(x.device)] for x in sums))
        member = members[part].to(phi)
        total += (phi.nan_to_num() @ member).cpu()
        fired += ((~phi.isnan()).to(phi) @ member).cpu()
    values = {name: cpfr(moments.select(mask.to(moments.n.device)).total()).item() for name, mask in sets.items()}
    replicates = (total / fired).unbind(1)
    return {name: Replicated(values[name], r, n_prompts) for name, r in zip(sets, replicates, strict=True)}


def bootstrap_shares(
    moments: FeatureMoments,
    sets: Mapping[str, Bool[Tensor, "feature"]],
    weights: Float[Tensor, "resample block"],
    n_prompts: int,
    at: Thresholds,
) -> dict[str, dict[str, Replicated]]:
    """Set → name of the share → the share, with a replicate for each of the first `SHARE_RESAMPLES` rows of `weights`.

    A resample holds fewer distinct prompts, so that more features cross a threshold in it: the replicates are moved to have the
    measured share as their mean, and tell how much it varies.
    """
    members = torch.stack(list(sets.values()), 1)
    weights = weights[:SHARE_RESAMPLES].to(moments.n)
    hit = torch.zeros(len(SHARES), len(weights) + 1, len(sets), dtype=torch.float64)
    of = torch.zeros_like(hit)
    for part in members.any(1).nonzero().squeeze(1).split(_CHUNK):
        some = moments.select(part)
        # Row 0 is what was measured, the others are resamples.
        classes = torch.cat([classes_of(some.total(), at), classes_of(some.resample(weights), at)], 1)
        member = members[part].to(classes)
        hit += (classes.nan_to_num() @ member).cpu()
        of += ((~classes.isnan()).to(classes) @ member).cpu()
    measured, resampled = (hit / of).split([1, len(weights)], 1)
    centred = (resampled - resampled.nanmean(1, keepdim=True) + measured).clamp(0, 1)
    return {
        name: {
            share: Replicated(measured[k, 0, column].item(), centred[k, :, column], n_prompts)
            for k, share in enumerate(SHARES)
        }
        for column, name in enumerate(sets)
    }
