"""What repairs are measured by: recovery, and what is closed of the gap between the models."""

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from tracelens.causal.effects import Effects, effects
from tracelens.stats import sign_flip_tests

Measure = Literal["recovery", "closed"]
"""recovery: Σ n d / Σ d², 1 at the reference and more beyond it. closed: 1 − Σ (m_ref − m)² / Σ d², 1 at the reference alone."""
LEVEL = 0.05
"""Of the tests that verdicts rest on."""


@runtime_checkable
class Ends(Protocol):
    """The metric of the two models, which repairs lie between."""

    @property
    def start(self) -> Float64[Tensor, "prompt"]: ...
    @property
    def goal(self) -> Float64[Tensor, "prompt"]: ...
    @property
    def min_difference(self) -> float: ...


def gains(ends: Ends, measured: Float64[Tensor, "*arms prompt"], measure: Measure) -> Float64[Tensor, "*arms prompt"]:
    """What a measure adds up over prompts; divided by Σ d² it is the measure."""
    d = ends.goal - ends.start
    if measure == "recovery":
        return (measured - ends.start) * d
    return d.square() - (ends.goal - measured).square()


def estimated(ends: Ends, gained: Float64[Tensor, "arm prompt"], n_permutations: int = 1) -> Effects:
    """Σ gained / Σ d² with intervals, as `effects` makes them of n = gained / d."""
    d = ends.goal - ends.start
    usable = d.abs() >= ends.min_difference
    n = torch.where(usable, gained / torch.where(usable, d, 1), 0)
    options = {"min_difference": ends.min_difference, "n_permutations": n_permutations}
    return effects(ends.start + n, ends.start, ends.goal, **options)  # pyright: ignore[reportArgumentType]


def tested(ends: Ends, gained: Float64[Tensor, "arm prompt"]) -> Float64[Tensor, "arm"]:
    """Two-sided sign-flip p that what prompts add to a measure is 0 in sum; NaN where the models agree on all prompts."""
    usable = (ends.goal - ends.start).abs() >= ends.min_difference
    if not usable.any():
        return torch.full((len(gained),), torch.nan, dtype=torch.float64)
    return sign_flip_tests(gained[:, usable].T.contiguous())


def rank_p(as_good: int, n_random: int) -> float:
    """One-sided Monte Carlo p that a choice is itself a random one, where `as_good` of `n_random` are no worse; never 0."""
    return (1 + as_good) / (1 + n_random)


def columns(name: str, estimate: object) -> dict[str, float]:
    """An estimate as three columns of a table."""
    value, low, high = (float(getattr(estimate, part)) for part in ("value", "low", "high"))
    return {name: value, f"{name}_low": low, f"{name}_high": high}
