"""What a b-bit grid would clip to zero, judged from the reference's own activations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from tracelens.errors import MetricInputError
from tracelens.metrics.muting import MUTED_AT
from tracelens.metrics.result import Result
from tracelens.metrics.support import JointSupport

BITS = (8, 7, 6, 5, 4, 3, 2)


@dataclass(frozen=True, eq=False)
class Clipping(Result):
    """Firings that a symmetric integer grid of so many bits would round to zero: hypothetical, nothing is quantized."""

    bits: tuple[int, ...]
    """Descending."""
    n: Int64[Tensor, "feature"]
    """Firings."""
    n_clipped: Int64[Tensor, "bits feature"]
    """Of these, those below half a step."""

    @property
    def share(self) -> Float64[Tensor, "bits feature"]:
        """In [0, 1]; NaN where there is no firing."""
        return (self.n_clipped / self.n.double()).where(self.n > 0, torch.nan)

    def bits_needed(self, clipped_at: float = MUTED_AT) -> Float64[Tensor, "feature"]:
        """The fewest bits at which less than `clipped_at` of the firings are clipped; infinity if no tried grid is
        enough, NaN where there is no firing. A coarser grid clips all that a finer one does, so there is one such number.
        """
        enough = self.share < clipped_at
        fewest = torch.where(enough, torch.tensor(self.bits, dtype=torch.float64)[:, None], torch.inf).amin(0)
        return fewest.where(self.n > 0, torch.nan)


class ClippingAccumulator:
    """Streams the magnitudes of activations, 0 being silence, with the range that each token's grid spans."""

    def __init__(self, n_features: int, bits: Sequence[int] = BITS) -> None:
        self.n_features, self.bits = n_features, tuple(sorted(set(bits), reverse=True))
        if not self.bits or self.bits[-1] < 1:
            raise MetricInputError(f"bits are {tuple(bits)}; expected at least one, each of at least 1")
        self._n = torch.zeros(n_features, dtype=torch.int64)
        self._clipped = torch.zeros(len(self.bits), n_features, dtype=torch.int64)

    def update(
        self, magnitudes: Float[Tensor, "token feature"], peak: Float[Tensor, "#token"] | float
    ) -> "ClippingAccumulator":
        """Adds tokens whose grid reaches from −peak to peak: the largest magnitude of each token, or one of the tensor.

        A step is 2 · peak / (2^bits − 1), as integer kernels with a scale per token have it, and what is at most half of
        it rounds to zero. Raises as `JointSupport.of`, and `MetricInputError` for another number of features.
        """
        support = JointSupport.of(magnitudes, magnitudes)
        if support.n_features != self.n_features:
            raise MetricInputError(f"activations have {support.n_features} features, expected {self.n_features}")
        peaks = torch.as_tensor(peak, device=support.token.device).double().expand(support.n_tokens)
        peaks, values = peaks.index_select(0, support.token), support.reference.double()
        self._n += torch.bincount(support.feature, minlength=self.n_features).cpu()
        for count, bits in zip(self._clipped, self.bits, strict=True):
            clipped = values * (2**bits - 1) <= peaks
            count += torch.bincount(support.feature[clipped], minlength=self.n_features).cpu()
        return self

    def merge(self, other: "ClippingAccumulator") -> "ClippingAccumulator":
        """Adds what another accumulator of the same shape has seen; raises `MetricInputError` for another shape."""
        if (self.n_features, self.bits) != (other.n_features, other.bits):
            raise MetricInputError(
                f"cannot merge clipping of {other.n_features} features at {other.bits} bits into {self.n_features} at {self.bits}"
            )
        self._n += other._n
        self._clipped += other._clipped
        return self

    def finalize(self) -> Clipping:
        """The counts so far, on the CPU; more may be added afterwards."""
        return Clipping(self.bits, self._n.clone(), self._clipped.clone())
