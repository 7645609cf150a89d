"""Intervals and permutation tests: what may be said about a number, given the prompts it was measured on."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.stats import binomtest, false_discovery_control, norm, rankdata
from torch import Tensor

from tracelens.errors import MetricInputError

_CHUNK = 2**22
"""Elements of a permutation matrix held at once (32 MB)."""


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval; prints as `0.934 [0.921, 0.945]`."""

    value: float
    low: float
    high: float
    n: int | None = None
    """How many independent units (prompts, trials) it rests on."""
    method: str = ""
    """How the interval was made: "wilson", "bootstrap", or empty where there is no sampling."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict:
        """As JSON can hold it: NaN becomes None."""
        numbers = {name: getattr(self, name) for name in ("value", "low", "high")}
        return {k: None if math.isnan(v) else v for k, v in numbers.items()} | {"n": self.n, "method": self.method}

    @classmethod
    def from_dict(cls, data: dict) -> "Estimate":
        numbers = {k: math.nan if data[k] is None else data[k] for k in ("value", "low", "high")}
        return cls(**numbers, n=data.get("n"), method=data.get("method", ""))


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """The rate `successes / n` with its Wilson score interval (no continuity correction); NaN for n = 0.

    Raises `MetricInputError` unless 0 ≤ successes ≤ n.
    """
    if not 0 <= successes <= n:
        raise MetricInputError(f"{successes} successes of {n} trials is no rate; expected 0 ≤ successes ≤ n")
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, "wilson")
    interval = binomtest(successes, n).proportion_ci(level, "wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n, "wilson")


def wilson_low(share: np.ndarray, n: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Lower end of the Wilson score interval of shares in [0, 1] that were seen over `n` trials; elementwise, in [0, 1].

    For putting findings in order: what is total but rests on a handful of trials comes after what is nearly total over
    many. Shares need not be counts over `n`.
    """
    z = norm.ppf(0.5 + level / 2)
    centre = share + z**2 / (2 * n)
    spread = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.clip((centre - spread) / (1 + z**2 / n), 0, 1)


def bootstrap_weights(n_blocks: int, n_resamples: int = 1000, seed: int = 0) -> Float64[Tensor, "resample block"]:
    """How often each block (a prompt) is drawn in each bootstrap resample; each row sums to `n_blocks`.

    Statistics made of per-block sums are resampled by one matrix product, and two models that share the weights are
    resampled in pairs. Raises `MetricInputError` for no block.
    """
    if n_blocks < 1:
        raise MetricInputError("a bootstrap needs at least one block (prompt), got none")
    draws = np.random.default_rng(seed).multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=n_resamples)
    return torch.from_numpy(draws.astype(np.float64))


def percentile_interval(
    value: float, replicates: Float[Tensor, "resample"], level: float = 0.95, n: int | None = None
) -> Estimate:
    """`value` with the percentile bootstrap interval of its replicates (linear interpolation).

    Replicates that are NaN (a resample in which the statistic does not exist) are left out; all NaN gives NaN.
    """
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(replicates.double().cpu(), tails).tolist()
    return Estimate(float(value), low, high, n, "bootstrap")


def sign_flip_test(differences: Float[Tensor, "prompt"], n_permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p that paired differences are symmetric around 0, by flipping the sign of each at random.

    Statistic |Σd|; p = (1 + #{permuted ≥ observed}) / (1 + n_permutations), so never 0, and 1.0 when all are zero or
    there is none. Raises `MetricInputError` for NaN.
    """
    d = differences.double().cpu().numpy()
    _no_nan("differences", d)
    # Sums that are equal in exact arithmetic must count as ties although they round differently.
    observed = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    rng = np.random.default_rng(seed)
    extreme = 0
    for count in _chunks(n_permutations, len(d)):
        signs = rng.integers(0, 2, size=(count, len(d)), dtype=np.int8) * 2.0 - 1
        extreme += int((np.abs(signs @ d) >= observed).sum())
    return (1 + extreme) / (1 + n_permutations)


def sign_flip_tests(
    differences: Float[Tensor, "prompt feature"], n_permutations: int = 10_000, seed: int = 0
) -> Float64[Tensor, "feature"]:
    """`sign_flip_test` of every column, with the same signs for all, in float32: matrix products of [permutation, prompt] signs.

    Sums within 1e-6 of Σ|d| of each other count as ties. Raises `MetricInputError` for NaN.
    """
    _no_nan("differences", differences.double().cpu().numpy())
    d = differences.double().cpu()
    size = d.abs().sum(0)
    d = (d / size.where(size > 0, 1)).float()
    observed = d.double().sum(0).abs().float() - 1e-6
    extreme = torch.zeros(d.shape[1], dtype=torch.int64)
    rng = np.random.default_rng(seed)
    for count in _chunks(n_permutations, max(d.shape)):
        signs = torch.from_numpy(rng.integers(0, 2, size=(count, len(d)), dtype=np.int8)).float() * 2 - 1
        extreme += ((signs @ d).abs_() >= observed).sum(0)
    return (1 + extreme).double() / (1 + n_permutations)


def auroc(scores: Float[Tensor, "prompt feature"], labels: Bool[Tensor, "prompt"]) -> Float64[Tensor, "feature"]:
    """P(score of a True prompt > score of a False prompt), ties counting half: Mann–Whitney U / (n₁ n₀), in [0, 1].

    Raises `MetricInputError` for NaN and unless both labels occur.
    """
    ranks, n_true, n_false = _ranks(scores, labels)
    return _auroc(ranks[labels.cpu()].sum(0), n_true, n_false)


def auroc_max_permutation(
    scores: Float[Tensor, "prompt feature"],
    labels: Bool[Tensor, "prompt"],
    n_permutations: int = 1000,
    seed: int = 0,
) -> Float64[Tensor, "feature"]:
    """Family-wise adjusted p that a feature's AUROC is higher than chance (one-sided: higher where the label is True).

    Westfall & Young (1993), single step: labels are permuted, and each AUROC is compared with the permutation
    distribution of the largest AUROC over all features; p = (1 + #{max ≥ observed}) / (1 + n_permutations). With p ≤ α
    as the rule, the chance of any false discovery is at most α, whatever the dependence between features.
    Raises as `auroc`.
    """
    ranks, n_true, _ = _ranks(scores, labels)
    n_prompts, n_features = ranks.shape
    # Group sizes are fixed, so ordering rank sums is ordering AUROCs; half-integers add up exactly: ties stay ties.
    observed = ranks[labels.cpu()].sum(0)
    rng = np.random.default_rng(seed)
    exceeded = torch.zeros(n_features, dtype=torch.float64)
    for count in _chunks(n_permutations, max(n_prompts, n_features)):
        chosen = rng.permuted(np.tile(np.arange(n_prompts) < n_true, (count, 1)), axis=1)
        largest = (torch.from_numpy(chosen.astype(np.float64)) @ ranks).amax(1)
        exceeded += count - torch.searchsorted(largest.sort().values, observed)
    return (1 + exceeded) / (1 + n_permutations)


def auroc_under_permutation(
    scores: Float[Tensor, "prompt feature"], labels: Bool[Tensor, "permutation prompt"]
) -> Float64[Tensor, "permutation feature"]:
    """`auroc` for each of several labelings that have equally many True. Raises as `auroc`."""
    ranks, n_true, n_false = _ranks(scores, labels[0])
    return _auroc(labels.double() @ ranks, n_true, n_false)


def benjamini_hochberg(p: Float[Tensor, "feature"]) -> Float64[Tensor, "feature"]:
    """p values adjusted to control the false discovery rate (Benjamini & Hochberg, 1995); none gives none."""
    if not len(p):
        return torch.zeros(0, dtype=torch.float64)
    return torch.from_numpy(np.asarray(false_discovery_control(p.double().cpu().numpy())))


def _ranks(
    scores: Float[Tensor, "prompt feature"], labels: Bool[Tensor, "prompt"]
) -> tuple[Float64[Tensor, "prompt feature"], int, int]:
    values = scores.detach().double().cpu().numpy()
    _no_nan("scores", values)
    n_true = int(labels.sum())
    n_false = len(labels) - n_true
    if not n_true or not n_false:
        raise MetricInputError(f"an AUROC needs prompts of both labels, got {n_true} True and {n_false} False")
    return torch.from_numpy(rankdata(values, axis=0)), n_true, n_false


def _auroc(rank_sum: Float64[Tensor, "..."], n_true: int, n_false: int) -> Float64[Tensor, "..."]:
    return (rank_sum - n_true * (n_true + 1) / 2) / (n_true * n_false)


def _no_nan(name: str, values: np.ndarray) -> None:
    if np.isnan(values).any():
        raise MetricInputError(f"{name} hold NaN, first at index {tuple(map(int, np.argwhere(np.isnan(values))[0]))}")


def _chunks(total: int, width: int) -> list[int]:
    size = max(1, _CHUNK // max(1, width))
    return [min(size, total - start) for start in range(0, total, size)]
