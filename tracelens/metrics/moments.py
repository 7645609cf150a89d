"""Joint moments of each feature's activation in two models: the sums that fidelity, drift and muting follow from.

They stream (`update`), merge (`merge`) and, kept per block (a prompt), resample: a bootstrap is one matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tracelens.errors import MetricInputError
from tracelens.metrics.support import Activations, JointSupport

_SUMS = ("n_ref", "n_quant", "n_both", "sum_ref", "sum_quant", "sum_ref_sq", "sum_quant_sq", "sum_cross")

_CHUNK = 2**15
"""Entries added at once: their products (64 bytes each) stay in cache."""


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Sums over the tokens of each block, in float64; with r and q the activations in reference and quantized model.

    Raises `MetricInputError` if the shapes do not fit together.
    """

    n: Float64[Tensor, "block"]
    """Tokens."""
    n_ref: Float64[Tensor, "block feature"]
    """Tokens with r > 0."""
    n_quant: Float64[Tensor, "block feature"]
    """Tokens with q > 0."""
    n_both: Float64[Tensor, "block feature"]
    """Tokens with r > 0 and q > 0."""
    sum_ref: Float64[Tensor, "block feature"]
    sum_quant: Float64[Tensor, "block feature"]
    sum_ref_sq: Float64[Tensor, "block feature"]
    sum_quant_sq: Float64[Tensor, "block feature"]
    sum_cross: Float64[Tensor, "block feature"]
    """Σ r q."""
    max_ref: Float64[Tensor, "feature"]
    """Over all tokens of all blocks, also after `resample`."""
    max_quant: Float64[Tensor, "feature"]

    def __post_init__(self) -> None:
        if any(getattr(self, name).shape != (len(self.n), len(self.max_ref)) for name in _SUMS):
            raise MetricInputError(f"moments of {len(self.n)} blocks × {len(self.max_ref)} features have other shapes")

    def total(self) -> "FeatureMoments":
        """All blocks as one: what the result is read from, at `[0]` of the block axis."""
        return self._map(lambda x: x.sum(0, keepdim=True))

    def resample(self, weights: Float[Tensor, "resample block"]) -> "FeatureMoments":
        """Weighted sums over the blocks; the result's block axis is the resample.

        Takes 64 bytes × resamples × features: `select` the features of interest first.
        """
        weights = weights.to(self.n)
        return self._map(lambda x: weights @ x)

    def select(self, features: Int[Tensor, "_"] | Bool[Tensor, "feature"] | Sequence[int]) -> "FeatureMoments":
        """The moments of some features, by index or mask."""
        index = torch.as_tensor(features, device=self.n.device)
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index.long()
        columns = {name: getattr(self, name)[..., index] for name in (*_SUMS, "max_ref", "max_quant")}
        return FeatureMoments(n=self.n, **columns)

    @classmethod
    def concatenate(cls, moments: Sequence["FeatureMoments"]) -> "FeatureMoments":
        """The features of several sites side by side; the blocks must be the same tokens.

        Raises `MetricInputError` for none, and if the token counts differ.
        """
        if not moments or any(not torch.equal(m.n, moments[0].n) for m in moments):
            raise MetricInputError("only moments over the same tokens and blocks can stand side by side; got others")
        if len(moments) == 1:
            return moments[0]
        columns = (*_SUMS, "max_ref", "max_quant")
        return cls(n=moments[0].n, **{name: torch.cat([getattr(m, name) for m in moments], -1) for name in columns})

    def _map(self, over_blocks) -> "FeatureMoments":
        # One product per sum and no stacking: equal sums must stay equal to the bit (fidelity exactly 1).
        mapped = {f.name: getattr(self, f.name) for f in fields(self)}
        return FeatureMoments(**mapped | {name: over_blocks(mapped[name]) for name in ("n", *_SUMS)})


class MomentAccumulator:
    """Streams pairs of activations into `FeatureMoments`; memory is 64 bytes × blocks × features.

    Sums are float64 of products that are exact for float32 inputs, added in row order on any device: the split into
    batches matters only at the 1e-15 level, and identical inputs give bit-identical Σrq, Σr² and Σq².
    """

    def __init__(self, n_features: int, n_blocks: int = 1) -> None:
        self.n_features, self.n_blocks = n_features, n_blocks
        self._n = torch.zeros(n_blocks, dtype=torch.float64)
        # The eight sums of one (block, feature) share a cache line, so that an entry is one random access.
        self._sums = torch.zeros(n_blocks * n_features, len(_SUMS), dtype=torch.float64)
        self._max = torch.zeros(2, n_features, dtype=torch.float64)

    def update(
        self,
        reference: Activations,
        quantized: Activations,
        block: Int[Tensor, "..."] | None = None,
    ) -> "MomentAccumulator":
        """Adds activations ≥ 0 of the same tokens in both models, dense, scipy.sparse or `SparseActivations`; `block` [token] says
        which block each belongs to.

        Raises `MetricInputError` for shapes that differ, another number of features, negative activations and blocks
        out of range; `NonFiniteError` for NaN and infinity.
        """
        return self.add(JointSupport.of(reference, quantized), block)

    def add(self, support: JointSupport, block: Int[Tensor, "..."] | None = None) -> "MomentAccumulator":
        """`update` with a support that is already there, as when smearing is measured on the same activations."""
        if support.n_features != self.n_features:
            raise MetricInputError(f"activations have {support.n_features} features, expected {self.n_features}")
        self._to(support.reference.device)
        cell = support.feature
        if block is None:
            self._n[0] += support.n_tokens
        else:
            block = self._checked(block, support.n_tokens)
            self._n += torch.bincount(block, minlength=self.n_blocks)
            cell = cell + self.n_features * block.index_select(0, support.token)
        entries = (cell, support.feature, support.reference, support.quantized)
        for part in zip(*(x.split(_CHUNK) for x in entries), strict=True):
            self._add_entries(*part)
        return self

    def _add_entries(self, cell: Tensor, feature: Tensor, reference: Tensor, quantized: Tensor) -> None:
        r, q = reference.double(), quantized.double()
        rows = r.new_empty(len(r), len(_SUMS))
        rows[:, 0] = r > 0
        rows[:, 1] = q > 0
        rows[:, 3] = r
        rows[:, 4] = q
        for column, (a, b) in {2: (0, 1), 5: (3, 3), 6: (4, 4), 7: (3, 4)}.items():
            torch.mul(rows[:, a], rows[:, b], out=rows[:, column])
        # index_put_ adds in a fixed order on CPU and CUDA alike; index_add_ and bincount do not on CUDA.
        self._sums.index_put_((cell,), rows, accumulate=True)
        for maximum, values in zip(self._max, (r, q), strict=True):
            maximum.scatter_reduce_(0, feature, values, "amax")

    def merge(self, other: "MomentAccumulator") -> "MomentAccumulator":
        """Adds what another accumulator of the same shape has seen; raises `MetricInputError` for another shape."""
        if (self.n_features, self.n_blocks) != (other.n_features, other.n_blocks):
            raise MetricInputError(
                f"cannot merge moments of {other.n_blocks} blocks × {other.n_features} features into "
                f"{self.n_blocks} × {self.n_features}"
            )
        self._n += other._n.to(self._n.device)
        self._sums += other._sums.to(self._n.device)
        self._max = torch.maximum(self._max, other._max.to(self._n.device))
        return self

    def finalize(self) -> FeatureMoments:
        """The moments so far, on the device of the inputs; more may be added afterwards."""
        sums = self._sums.view(self.n_blocks, self.n_features, len(_SUMS)).permute(2, 0, 1)
        columns = {name: sums[k].clone(memory_format=torch.contiguous_format) for k, name in enumerate(_SUMS)}
        max_ref, max_quant = self._max.clone()
        return FeatureMoments(n=self._n.clone(), max_ref=max_ref, max_quant=max_quant, **columns)

    def _to(self, device: torch.device) -> None:
        self._n, self._sums, self._max = (x.to(device) for x in (self._n, self._sums, self._max))

    def _checked(self, block: Tensor, n_tokens: int) -> Tensor:
        block = block.reshape(-1).to(self._n.device, torch.int64)
        if len(block) != n_tokens:
            raise MetricInputError(f"block has {len(block)} entries for {n_tokens} tokens; expected one per token")
        if n_tokens and not (int(block.min()) >= 0 and int(block.max()) < self.n_blocks):
            raise MetricInputError(
                f"blocks run from {int(block.min())} to {int(block.max())}; expected 0 to {self.n_blocks - 1}"
            )
        return block
