"""Why a firing is gone: the activation itself moved, or the number format clipped it where it was read."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from tracelens.errors import MetricInputError, NonFiniteError
from tracelens.metrics.muting import MUTED_AT
from tracelens.metrics.result import Result
from tracelens.metrics.support import JointSupport


@dataclass(frozen=True, eq=False)
class MutingCauses(Result):
    """Counts of tokens per feature or neuron; every muted firing is counted once, under one cause.

    Raises `MetricInputError` if more firings are muted than there were.
    """

    n_ref: Int64[Tensor, "feature"]
    """The reference fires."""
    n_moved: Int64[Tensor, "feature"]
    """The reference fires; the quantized model does not, and would not have without the rounding at this place either."""
    n_clipped: Int64[Tensor, "feature"]
    """The reference fires and so does the quantized model just before the rounding at this place, but not after it."""

    def __post_init__(self) -> None:
        if (self.n_moved + self.n_clipped > self.n_ref).any():
            raise MetricInputError("more firings are muted than the reference has; the counts are of different tokens")

    @property
    def n_muted(self) -> Int64[Tensor, "feature"]:
        return self.n_moved + self.n_clipped

    @property
    def rate(self) -> Float64[Tensor, "feature"]:
        """The muting rate of DESIGN, in [0, 1]: muted firings over firings; NaN where the reference never fires."""
        return (self.n_muted / self.n_ref.double()).where(self.n_ref > 0, torch.nan)

    @property
    def clipped_share(self) -> Float64[Tensor, "feature"]:
        """Share of the muted firings that the format clipped, in [0, 1]; NaN where none is muted."""
        return (self.n_clipped / self.n_muted.double()).where(self.n_muted > 0, torch.nan)

    def muted(self, muted_at: float = MUTED_AT, min_active: int = 1) -> list[int]:
        """Those that the reference fires on at least `min_active` tokens and whose rate is at least `muted_at`, worst first."""
        found = ((self.n_ref >= max(1, min_active)) & (self.rate >= muted_at)).nonzero().squeeze(1)
        return found[self.rate[found].argsort(descending=True, stable=True)].tolist()


class CauseAccumulator:
    """Streams activations of the same tokens in the reference, and in the quantized model before and after its rounding."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self._counts = torch.zeros(3, n_features, dtype=torch.int64)

    def update(
        self,
        reference: Float[Tensor, "*token feature"],
        before: Float[Tensor, "..."],
        quantized: Float[Tensor, "..."],
    ) -> "CauseAccumulator":
        """Adds activations ≥ 0, in which 0 is silence.

        Raises `MetricInputError` for shapes that differ, another number of features and negative activations,
        `NonFiniteError` for NaN and infinity.
        """
        support = JointSupport.of(reference, quantized)
        if support.n_features != self.n_features:
            raise MetricInputError(f"activations have {support.n_features} features, expected {self.n_features}")
        if before.shape != reference.shape:
            raise MetricInputError(
                f"activations before the rounding have shape {tuple(before.shape)}, those after it {tuple(reference.shape)}"
            )
        entry = support.token * self.n_features + support.feature
        unrounded = before.detach().reshape(-1).to(entry.device).index_select(0, entry)
        if not unrounded.isfinite().all():
            raise NonFiniteError(
                "activations before the rounding hold NaN or infinity; look for an overflow in the model"
            )
        fired = support.reference > 0
        muted = fired & (support.quantized == 0)
        clipped = muted & (unrounded > 0)
        for count, chosen in zip(self._counts, (fired, muted & ~clipped, clipped), strict=True):
            count += torch.bincount(support.feature[chosen], minlength=self.n_features).cpu()
        return self

    def merge(self, other: "CauseAccumulator") -> "CauseAccumulator":
        """Adds what another accumulator has seen; raises `MetricInputError` for another number of features."""
        if self.n_features != other.n_features:
            raise MetricInputError(f"cannot merge causes of {other.n_features} features into {self.n_features}")
        self._counts += other._counts
        return self

    def finalize(self) -> MutingCauses:
        """The counts so far, on the CPU; more may be added afterwards."""
        n_ref, n_moved, n_clipped = self._counts.clone()
        return MutingCauses(n_ref, n_moved, n_clipped)
