"""What an intervention brought back: normalised effects with intervals and permutation tests.

With m the metric of a prompt, d = m_clean − m_corrupted (reference − quantized across precisions) and
n = m_patched − m_unpatched towards it, the normalised effect of one prompt is n / d. Where |d| is near zero it is not
divided; such prompts are counted. Over prompts the effect is Σ n d / Σ d²: the mean of the prompts' effects weighted by d²,
which is the slope of n on d, and is 1 if every prompt is brought back wholly, whatever the signs of d, and 0 if none moves.
It does not see what goes too far, nor what moves at random. Hence `closed`, the share of the squared gap that is gone:
1 − Σ (d − n)² / Σ d², 1 only where every prompt arrives, 0 where none moves, negative where the gap has widened.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tracelens.errors import MetricInputError
from tracelens.stats import Estimate, bootstrap_weights, percentile_interval, sign_flip_tests

MIN_DIFFERENCE = 1e-4
"""In the metric's units: below it a prompt's two runs are called equal. Rounding of float32 logits makes some 1e-6."""


@dataclass(frozen=True)
class Effects:
    """Effects of several interventions over the same prompts. Where no prompt's runs differ, effects are NaN: 0 / 0.

    Attributes:
        effect: Σ n d / Σ d² of each arm, with its paired 95 % bootstrap interval over prompts; of one prompt alone no
            interval can be said: NaN.
        closed: 1 − Σ (d − n)² / Σ d² of each arm, ≤ 1; with its interval.
        ratio_of_means: Σ n / Σ d of each arm, what is usual where all d have one sign; NaN if the mean of d is near zero.
        change: mean of n · sign(d), in the metric's units: how far towards the clean run a prompt moves; with its interval.
        p_value: two-sided sign-flip p that `change` is 0.
        n_usable: prompts with |d| ≥ `min_difference`; only these enter.
        n_prompts: all of them.
    """

    effect: list[Estimate]
    closed: list[Estimate]
    ratio_of_means: Float64[Tensor, "arm"]
    change: list[Estimate]
    p_value: Float64[Tensor, "arm"]
    n_usable: int
    n_prompts: int


def differing(
    start: Float64[Tensor, "prompt"], goal: Float64[Tensor, "prompt"], min_difference: float = MIN_DIFFERENCE
) -> Bool[Tensor, "prompt"]:
    """Prompts whose two runs differ by `min_difference` or more, and by more than nothing: the others are 0 / 0."""
    d = (goal - start).abs()
    return (d >= min_difference) & (d > 0)


def per_prompt(
    patched: Float64[Tensor, "arm prompt"],
    start: Float64[Tensor, "prompt"],
    goal: Float64[Tensor, "prompt"],
    *,
    min_difference: float = MIN_DIFFERENCE,
) -> Float64[Tensor, "arm prompt"]:
    """(m_patched − m_start) / (m_goal − m_start); NaN where the denominator is below `min_difference`."""
    d = goal - start
    return (patched - start) / torch.where(differing(start, goal, min_difference), d, torch.nan)


def effects(
    patched: Float64[Tensor, "arm prompt"],
    start: Float64[Tensor, "prompt"],
    goal: Float64[Tensor, "prompt"],
    *,
    min_difference: float = MIN_DIFFERENCE,
    n_resamples: int = 1000,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Effects:
    """Effects of runs `patched` that begin at `start` (corrupted, quantized) and should reach `goal` (clean, reference).

    Raises `MetricInputError` for NaN or infinity.
    """
    for name, values in (("patched", patched), ("start", start), ("goal", goal)):
        if not values.isfinite().all():
            raise MetricInputError(f"{name} metrics hold NaN or infinity; check the metric and the models' logits")
    n_arms, n_prompts = patched.shape
    usable = differing(start, goal, min_difference)
    d = (goal - start)[usable]
    n = (patched - start)[:, usable]
    nan = torch.full((n_arms,), torch.nan, dtype=torch.float64)
    if not len(d) or not n_arms:
        empty = [Estimate(*[float("nan")] * 3, n=0, method="bootstrap")] * n_arms
        return Effects(empty, empty, nan, empty, nan, len(d), n_prompts)
    weights = bootstrap_weights(len(d), n_resamples, seed)
    total = (weights @ d.square())[:, None]
    slopes, left = (weights @ (n * d).T) / total, (weights @ (d - n).square().T) / total
    oriented = n * d.sign()
    means = weights @ oriented.T / len(d)
    mean_d = d.mean()
    return Effects(
        effect=_estimates((n * d).sum(1) / d.square().sum(), slopes, len(d)),
        closed=_estimates(1 - (d - n).square().sum(1) / d.square().sum(), 1 - left, len(d)),
        ratio_of_means=n.mean(1) / mean_d if mean_d.abs() >= min_difference else nan,
        change=_estimates(oriented.mean(1), means, len(d)),
        p_value=sign_flip_tests(oriented.T.contiguous(), n_permutations, seed),
        n_usable=len(d),
        n_prompts=n_prompts,
    )


def versus(
    patched: Float64[Tensor, "arm prompt"],
    placebo: Float64[Tensor, "arm prompt"],
    start: Float64[Tensor, "prompt"],
    goal: Float64[Tensor, "prompt"],
    *,
    min_difference: float = MIN_DIFFERENCE,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Float64[Tensor, "arm"]:
    """Two-sided sign-flip p that an arm moves prompts as far towards the goal as its placebo does."""
    usable = differing(start, goal, min_difference)
    if not usable.any() or not len(patched):
        return torch.full((len(patched),), torch.nan, dtype=torch.float64)
    gain = ((patched - placebo) * (goal - start).sign())[:, usable]
    return sign_flip_tests(gain.T.contiguous(), n_permutations, seed)


def _estimates(values: Float[Tensor, "arm"], replicates: Float[Tensor, "resample arm"], n: int) -> list[Estimate]:
    if n == 1:
        return [Estimate(float(value), math.nan, math.nan, 1, "bootstrap") for value in values]
    return [percentile_interval(float(value), column, n=n) for value, column in zip(values, replicates.T, strict=True)]
