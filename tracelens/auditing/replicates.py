"""Numbers with their bootstrap replicates, and what one more draw of a random error would give."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64
from scipy.stats import t as student
from torch import Tensor

from tracelens.stats import Estimate, percentile_interval

Scale = Literal["fidelity", "positive", "count", "share"]
"""On which scale draws of noise are alike:

- fidelity: log of the loss 1 − x. A loss is a sum of squares, so draws are skewed in x itself and symmetric in its log.
- positive: log x, for divergences.
- count: √(n x + 3/8) for x a share of n prompts (Anscombe 1948), where a count varies by at least 1/4 whatever its size.
- share: x itself.
"""
RESOLUTION = 1e-5
"""Losses and divergences below this may be float32 rounding, however certain they are."""


@dataclass(frozen=True)
class Replicated:
    """A number with its bootstrap replicates over prompts."""

    value: float
    replicates: Float64[Tensor, "resample"]
    n_prompts: int

    @property
    def estimate(self) -> Estimate:
        return percentile_interval(self.value, self.replicates, n=self.n_prompts)


def further_draw(
    draws: Sequence[Replicated], seed: int, *, scale: Scale = "fidelity", alike: Sequence[Replicated] = ()
) -> Replicated:
    """What one more draw of a random error would give: the typical draw, with replicates that hold prompts and draws.

    A model that is itself such a draw is to be compared with this and not with the mean of the draws that were made. On the scale of
    `scale`, where draws are close to normal, a further draw lies at mean + t · s · √(1 + 1/k), t of Student with as many degrees of
    freedom as s has (the prediction interval of a normal sample, Whitmore 1986); each resample of prompts gets one such deviation,
    stratified over t's quantiles. So few draws make it wide. Prompts are resampled on top, which only widens it.

    Args:
        alike: draws of another kind of error that vary as much; they help to tell s, about their own mean.

    With fewer than two draws to tell s from, the replicates are NaN.
    """
    n = draws[0].n_prompts
    groups = [_to_scale(np.array([run.value for run in group]), scale, n) for group in (draws, alike) if len(group)]
    centre = groups[0].mean(keepdims=True)
    freedom = sum(len(group) - 1 for group in groups)
    variance = sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom if freedom else np.nan
    if scale == "count" and freedom:
        variance = max(variance, 0.25)
    spread = np.sqrt(variance * (1 + 1 / len(draws)))
    resampled = np.stack([_to_scale(run.replicates.numpy(), scale, n) for run in draws]).mean(0)
    replicates = _from_scale(resampled + spread * _deviations(len(resampled), max(1, freedom), seed), scale, n)
    return Replicated(_from_scale(centre, scale, n).item(), torch.from_numpy(replicates), n)


def _deviations(n: int, freedom: int, seed: int) -> np.ndarray:
    """The n mid-quantiles of Student's t, in random order: a sample without the luck of one."""
    quantiles = student.ppf((np.arange(n) + 0.5) / n, freedom)
    return np.random.default_rng(seed).permutation(quantiles)


def _to_scale(x: np.ndarray, scale: Scale, n: int) -> np.ndarray:
    if scale == "fidelity":
        return np.log(np.maximum(1 - x, RESOLUTION))
    if scale == "positive":
        return np.log(np.maximum(x, RESOLUTION))
    return np.sqrt(n * x + 3 / 8) if scale == "count" else x


def _from_scale(y: np.ndarray, scale: Scale, n: int) -> np.ndarray:
    """Ends within the range of the number; what is exactly preserved comes back as exactly preserved."""
    if scale == "fidelity":
        return np.maximum(1 - _from_scale(y, "positive", n), 0)
    if scale == "positive":
        return np.where(y <= np.log(RESOLUTION), 0.0, np.exp(y))
    return np.clip((np.maximum(y, 0) ** 2 - 3 / 8) / max(n, 1) if scale == "count" else y, 0, 1)
