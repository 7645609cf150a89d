"""Spearman's rank correlation over components, with what may be said about it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64, Int
from scipy.stats import rankdata
from torch import Tensor

from tracelens.stats import Estimate, percentile_interval

MIN_COMPONENTS = 4
"""Fewer have no rank correlation worth the name: of 3, a third of all orders are perfect."""
MIN_FREEDOM = 3
"""Degrees of freedom that must be left once what is controlled for is taken out."""


@dataclass(frozen=True, eq=False)
class RankCorrelation:
    """A rank correlation; all NaN where there is none (too few components, or one side does not vary).

    Attributes:
        estimate: in [−1, 1], with its bootstrap interval over *prompts*: what other prompts would have made of these
            components. Prompts are few and noise blurs ranks, so the interval may lie nearer to 0 than the value.
        p_value: two-sided permutation p over *components*, their pairing being shuffled: whether these components would line
            up by chance.
        detectable: |ρ| from which on p ≤ .05: with few components only strong associations can be seen; NaN if not even 1 is.
        replicates: of the bootstrap.
        n: components that entered.
    """

    estimate: Estimate
    p_value: float
    detectable: float
    replicates: Float64[Tensor, "resample"] = field(repr=False)
    n: int


def rank_correlation(
    x: Float64[Tensor, "component"],
    y: Float64[Tensor, "component"],
    x_replicates: Float64[Tensor, "resample component"],
    y_replicates: Float64[Tensor, "resample component"],
    *,
    given: Float64[Tensor, "component covariate"] | None = None,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's ρ of x and y; partial if `given`: Pearson's r of what is left of their ranks after a linear regression on
    the columns of `given` and a constant.

    p as Freedman & Lane (1983): the residual ranks of y are shuffled and made residual again; without `given` it is the plain
    permutation test, p = (1 + #{|ρ*| ≥ |ρ|}) / (1 + n_permutations). Components where x or y is NaN are left out; a resample
    that knows nothing of a component takes the component's value from all prompts. `given` is not resampled.
    """
    known = x.isfinite() & y.isfinite()
    n = int(known.sum())
    basis = _basis(n, None if given is None else given[known])
    a, b = _residual(x[known][None], basis), _residual(y[known][None], basis)
    nothing = torch.full((len(x_replicates),), torch.nan, dtype=torch.float64)
    enough = n >= MIN_COMPONENTS and (given is None or n - basis.shape[1] >= MIN_FREEDOM)
    value = float(_cosine(a, b)) if enough else float("nan")
    if value != value:
        return RankCorrelation(Estimate(value, value, value, n, "bootstrap"), value, value, nothing, n)
    replicates = _cosine(
        *(
            _residual(r[:, known].where(r[:, known].isfinite(), v[known]), basis)
            for r, v in ((x_replicates, x), (y_replicates, y))
        )
    )
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1))
    shuffled = _without(b[0][order], basis)
    by_chance = _cosine(a, shuffled).abs().nan_to_num(0)
    p = (1 + int((by_chance >= abs(value) - 1e-9).sum())) / (1 + n_permutations)
    return RankCorrelation(percentile_interval(value, replicates, n=n), p, detectable_at(by_chance), replicates, n)


def detectable_at(by_chance: Float64[Tensor, "permutation"], alpha: float = 0.05) -> float:
    """The smallest |ρ| that as much is reached by at most `alpha` of the permutations; NaN if none is."""
    values, counts = by_chance.round(decimals=9).unique(return_counts=True)
    at_least = counts.flip(0).cumsum(0).flip(0).double() / len(by_chance)
    rare = values[at_least <= alpha]
    return float(rare[0]) if len(rare) else float("nan")


def covariates(
    norm: Float64[Tensor, "component"], layer: Int[Tensor, "component"]
) -> Float64[Tensor, "component covariate"]:
    """What a partial correlation of components controls for: the rank of their norm, and their layer: as a factor (so that
    components of the same layer are compared) where layers have two components each on average, as a trend where not.
    """
    layers = layer.unique()
    factor = len(layer) >= 2 * len(layers)
    # Without the first one: with the constant they would add up to 1.
    by_layer = (layer[:, None] == layers[1:]).double() if factor else _ranks(layer.double()[None]).T
    return torch.cat([_ranks(norm[None]).T, by_layer], 1)


def _basis(n: int, given: Float64[Tensor, "component covariate"] | None) -> Float64[Tensor, "component column"]:
    """Orthonormal columns that span the constant and the covariates."""
    columns = torch.ones(n, 1, dtype=torch.float64)
    if given is not None:
        columns = torch.cat([columns, given], 1)
    if not n:
        return columns
    left, size, _ = torch.linalg.svd(columns / columns.norm(dim=0).clamp(min=1e-12), full_matrices=False)
    return left[:, size > 1e-9 * size[0]]


def _residual(
    values: Float64[Tensor, "row component"], basis: Float64[Tensor, "component column"]
) -> Float64[Tensor, "row component"]:
    return _without(_ranks(values), basis)


def _without(
    ranks: Float64[Tensor, "row component"], basis: Float64[Tensor, "component column"]
) -> Float64[Tensor, "row component"]:
    return ranks - ranks @ basis @ basis.T


def _ranks(values: Float64[Tensor, "row component"]) -> Float64[Tensor, "row component"]:
    return torch.from_numpy(np.asarray(rankdata(values.numpy(), axis=1), dtype=np.float64))


def _cosine(a: Float64[Tensor, "_row component"], b: Float64[Tensor, "_other component"]) -> Float64[Tensor, "row"]:
    """Row by row; NaN where one has no length: ranks are of the order of 1, so what is left of 1e-6 is rounding."""
    size = a.norm(dim=1) * b.norm(dim=1)
    return ((a * b).sum(1) / size).where((a.norm(dim=1) > 1e-6) & (b.norm(dim=1) > 1e-6), torch.nan).clamp(-1, 1)
